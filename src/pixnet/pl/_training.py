"""The course of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pixnet.pl._style import ACCENT, MUTED, SECOND, panels, returned, style

if TYPE_CHECKING:
    from pixnet.models import PixNet

_METRICS = {"expression": "loss of expression", "pcc": "Pearson's r", "total": "loss of totals"}
_PARTS = {"train": ("training", ACCENT), "val": ("validation", SECOND)}


def training(model: PixNet, *, ax: Axes | Sequence[Axes] | None = None) -> Axes | np.ndarray:
    """Show the losses of expression and of totals, and Pearson's r over shapes, epoch by epoch.

    Parameters
    ----------
    model
        A model with a history (:func:`pixnet.tl.train`; :func:`pixnet.models.load` keeps it).
    ax
        Axes to draw in: one, which is divided, or one for each panel. ``None``: a new figure.

    Returns
    -------
    Axes or ndarray of Axes
        Loss of expression, Pearson's r, loss of totals; a single Axes where the history has one of them only. A dashed
        line and a ring mark the epoch that validation chose. The legend says whether the model was then trained anew on
        all data, as :func:`pixnet.tl.train` does by default: the curves are of the run with held-out shapes, the
        weights of the one after it. Epochs of a model that was trained further are counted on, and a solid line marks
        where its next training began.

    Raises
    ------
    TypeError
        If ``model`` is not a model, or ``ax`` is of the wrong type.
    ValueError
        If the model was not trained.

    Examples
    --------
    >>> import pixnet as px
    >>> axes = px.pl.training(px.models.load("her2st"))
    """
    frame, starts = _history(model)
    kept, label_kept = _kept(model, starts[-1])
    metrics = [name for name in _METRICS if any(f"{part}_{name}" in frame for part in _PARTS)]
    with style():
        axes = panels(len(metrics), ax, ncols=3, aspect=1.35, bar_inches=0.7)
        for panel, metric in zip(axes, metrics, strict=True):
            for part, (label, colour) in _PARTS.items():
                if f"{part}_{metric}" in frame:
                    panel.plot(frame.index, frame[f"{part}_{metric}"], color=colour, linewidth=1.6, label=label)
            for start in starts[1:]:
                panel.axvline(start + 0.5, color=MUTED, linewidth=0.9, zorder=1, label="trained further", gid="further")
            if kept is not None:
                _mark(panel, kept, frame.get(f"val_{metric}"), label_kept, below=metric == "pcc")
            panel.set_xlabel("epoch")
            panel.set_ylabel(_METRICS[metric])
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            panel.grid(axis="y", color="#e6e6ea", linewidth=0.7, zorder=0)
            panel.set_axisbelow(True)
            panel.tick_params(length=0, labelsize=8.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.03, y=0.12)
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        axes[0].legend(handles.values(), handles.keys(), loc="best", handlelength=1.2)
    return returned(axes)


def _history(model: PixNet) -> tuple[pd.DataFrame, list[int]]:
    """Return the rows of the history by number of the epoch, counted on over all runs, and the epochs before each run."""
    history = getattr(model, "history", None)
    if history is None:
        raise TypeError(f"model is {type(model).__name__}, which has no history; pass what pixnet.tl.train returns")
    if not history:
        raise ValueError("the model's history is empty: it has not been trained with pixnet.tl.train")
    frame = pd.DataFrame(history, index=np.arange(1, len(history) + 1))
    begins = frame["epoch"].diff() <= 0  # each run counts its epochs from 1
    return frame, [0, *(int(number) - 1 for number in frame.index[begins])]


def _kept(model: PixNet, start: int) -> tuple[int | None, str]:
    """Return the epoch of the last run whose weights were kept, and its label in the legend."""
    epochs = model.provenance.get("epochs")
    if epochs is None:
        return None, ""
    again = model.provenance.get("options", {}).get("refit", False)
    passes = model.provenance.get("refit_epochs", epochs)  # of files that do not tell: as many
    more = f"; then all data, {passes} epoch{'s' * (passes > 1)}" if again else ""
    return start + int(epochs), f"kept: epoch {start + int(epochs)}{more}"


def _mark(panel: Axes, kept: int, validation: pd.Series | None, label: str, *, below: bool) -> None:
    """Mark the epoch that was kept: by a line, and by a ring on the curve of validation, with its value."""
    panel.axvline(kept, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1, label=label, gid="kept")
    if validation is None or kept not in validation.index:
        return
    panel.plot(
        kept,
        validation[kept],
        marker="o",
        markersize=7,
        markerfacecolor="none",
        markeredgecolor=SECOND,
        gid="best-epoch",
    )
    panel.annotate(
        f"{validation[kept]:.3g}",
        (kept, validation[kept]),
        xytext=(0, -15 if below else 8),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=SECOND,
        path_effects=[withStroke(linewidth=3, foreground=panel.get_facecolor())],
        zorder=4,
    )
