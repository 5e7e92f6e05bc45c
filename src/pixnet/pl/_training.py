"""How training went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pixnet._names import listed
from pixnet.pl._style import ACCENT, MUTED, SECOND, panels, returned, style

if TYPE_CHECKING:
    from pixnet.models import PixNet

_PREFIXES = {"train_": "training", "val_": "validation", "validation_": "validation"}
_NAMES = {"loss": "loss", "expression": "loss of expression", "pcc": "Pearson's r", "total": "loss of totals"}
_COLOURS = {"training": ACCENT, "validation": SECOND}


def training(model: PixNet, *, ax: Axes | Sequence[Axes] | None = None) -> Axes | np.ndarray:
    """Show how training went, epoch by epoch: the losses of expression and of totals, and Pearson's r over shapes.

    Parameters
    ----------
    model
        A model with a history (:func:`pixnet.tl.train`; :func:`pixnet.models.load` keeps it). Its ``history``, a list
        with a dict for each epoch, will do as well.
    ax
        Axes to draw in: one, which is divided, or one for each panel. ``None``: a new figure.

    Returns
    -------
    Axes or ndarray of Axes
        Loss of expression, Pearson's r, loss of totals; the Axes itself where the history has one of them only. A line
        marks the epoch that validation chose, and says whether the model was then trained anew on everything, as
        :func:`pixnet.tl.train` does by default: the curves are of the run with held-out shapes, the weights of the one
        after it. A ring marks the value there. Of a bare history, a ring marks the best epoch of each curve.

    Raises
    ------
    TypeError
        If ``model`` has no history, or ``ax`` is of the wrong type.
    ValueError
        If the history is empty or holds none of these.

    Examples
    --------
    >>> import pixnet as px
    >>> history = [{"epoch": 1, "train_pcc": 0.10, "val_pcc": 0.08}, {"epoch": 2, "train_pcc": 0.25, "val_pcc": 0.19}]
    >>> ax = px.pl.training(history)
    """
    curves = _curves(model)
    kept, again = _kept(model)
    metrics = list(dict.fromkeys(metric for metric, _ in curves))
    with style():
        axes = panels(len(metrics), ax, ncols=3, aspect=1.35, bar_inches=0.7)
        for panel, metric in zip(axes, metrics, strict=True):
            for (its_metric, part), values in curves.items():
                if its_metric != metric:
                    continue
                panel.plot(values.index, values, color=_COLOURS[part], linewidth=1.6, label=part)
                if part == "validation":
                    best = values.idxmax() if metric == _NAMES["pcc"] else values.idxmin()
                    best = best if kept is None else kept
                    panel.plot(
                        best,
                        values[best],
                        marker="o",
                        markersize=7,
                        markerfacecolor="none",
                        markeredgecolor=_COLOURS[part],
                        gid="best-epoch",
                    )
                    panel.annotate(
                        f"{values[best]:.3g}",
                        (best, values[best]),
                        xytext=(0, -15 if metric == _NAMES["pcc"] else 8),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8.5,
                        color=_COLOURS[part],
                    )
            if kept is not None:
                label = f"kept: epoch {kept}" + (f"; then all data, {kept} epoch{'s' * (kept > 1)}" if again else "")
                panel.axvline(
                    kept, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1, label=label, gid="kept"
                )
            panel.set_xlabel("epoch")
            panel.set_ylabel(metric)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            panel.grid(axis="y", color="#e6e6ea", linewidth=0.7, zorder=0)
            panel.set_axisbelow(True)
            panel.tick_params(length=0, labelsize=8.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.03, y=0.12)
        axes[0].legend(loc="best", handlelength=1.2)
    return returned(axes)


def _kept(model: Any) -> tuple[int | None, bool]:
    """Return the epoch that training kept, by its own rule, and whether it then trained anew on everything."""
    recipe = (getattr(model, "provenance", None) or {}).get("options", {})
    rows = [row for row in getattr(model, "history", None) or [] if "val_expression" in row and "epoch" in row]
    if not rows or "total_weight" not in recipe:
        return None, False
    kept, lowest = None, np.inf
    for row in rows:
        criterion = row["val_expression"] + recipe["total_weight"] * row.get("val_total", 0.0)
        if kept is None or criterion < lowest - 1e-4:
            kept, lowest = int(row["epoch"]), criterion
    return kept, bool(recipe.get("refit", False))


def _curves(model: Any) -> dict[tuple[str, str], pd.Series]:
    """Values by epoch for each metric (as shown) and part of the data."""
    history = model if isinstance(model, (list, tuple)) else getattr(model, "history", None)
    if history is None:
        raise TypeError(f"model is {type(model).__name__}, which has no history; pass what pixnet.tl.train returns")
    frame = pd.DataFrame(list(history))
    if frame.empty:
        raise ValueError("the model's history is empty: it has not been trained with pixnet.tl.train")
    frame.index = frame["epoch"] if "epoch" in frame else np.arange(1, len(frame) + 1)
    curves: dict[tuple[str, str], pd.Series] = {}
    for metric in _NAMES:
        for prefix, part in {"": "training", **_PREFIXES}.items():
            column = prefix + metric
            if column in frame:
                values = pd.to_numeric(frame[column], errors="coerce").dropna()
                if len(values):
                    curves.setdefault((_NAMES[metric], part), values)
    if not curves:
        raise ValueError(f"the model's history holds none of {listed(_NAMES)}; it has: {listed(frame.columns)}")
    return curves
