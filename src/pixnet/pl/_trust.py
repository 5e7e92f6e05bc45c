"""What held-out shapes showed of each gene, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from pixnet._evidence import CEILING, HIGH, LOW, PEARSON
from pixnet._sdata.evidence import GeneEvidence
from pixnet.pl._style import GROUPS, INK, MUTED, style

if TYPE_CHECKING:
    from pixnet.models import PixNet

FEW = 60
"""Genes up to which the interval of each is drawn."""


def trust(model: PixNet | AnnData, *, n_named: int = 8, ax: Axes | None = None) -> Axes:
    """Show how far each gene can be believed: its held-out Pearson's r against the r of a perfect prediction.

    Genes on the line are predicted as well as their noisy counts allow. Genes near 0 are not predicted, however crisp
    their maps look; those whose 95 % interval reaches 0 are grey.

    Parameters
    ----------
    model
        A model that `pixnet.tl.train` made, or a table of its predictions or loadings.
    n_named
        Number of the best genes to name.
    ax
        Axes to draw in; None: a new figure.

    Returns
    -------
    Axes
        x is the noise ceiling, y Pearson's r.

    Raises
    ------
    TypeError
        If ``model`` is neither a model nor a table, or ``ax`` is not Axes.
    ValueError
        If nothing is known of its genes, or ``n_named`` is negative.

    See Also
    --------
    pixnet.tl.evaluate : The same for a table that you measured.

    Examples
    --------
    >>> import pixnet as px
    >>> ax = px.pl.trust(px.models.load("her2st"))
    """
    frame = _evidence(model)
    if isinstance(n_named, bool) or not isinstance(n_named, int | np.integer) or n_named < 0:
        raise ValueError(f"n_named is {n_named!r}; a whole number of at least 0 is needed")
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"ax is {type(ax).__name__}; matplotlib Axes are needed")
    frame = frame.dropna(subset=[PEARSON, LOW, CEILING])
    known = frame[LOW] > 0
    with style():
        if ax is None:
            _, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
        highest = max(0.1, *frame[[CEILING, PEARSON]].max()) * 1.04
        ax.plot([0, highest], [0, highest], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        ax.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
        for part, colour, label in ((~known, "#c4c4cc", "interval reaches 0"), (known, GROUPS[0], "predicted")):
            shown = frame[part]
            if len(frame) <= FEW and len(shown):
                ends = np.abs(shown[[LOW, HIGH]].to_numpy() - shown[[PEARSON]].to_numpy()).T
                ax.errorbar(shown[CEILING], shown[PEARSON], ends, fmt="none", ecolor=colour, elinewidth=0.7, zorder=2)
            size = 14 if len(frame) <= 400 else 5
            name = f"{label}: {len(shown):,} genes"
            ax.scatter(
                shown[CEILING], shown[PEARSON], size, color=colour, linewidths=0, alpha=0.8, label=name, zorder=3
            )
        best = frame[known].nlargest(n_named, PEARSON)
        lowest = min(0.0, float(frame[LOW if len(frame) <= FEW else PEARSON].min()))
        ax.set_ylim(lowest - 0.05, highest)
        for (gene, row), height in zip(best.iterrows(), _spread(best[PEARSON].tolist(), 0.045 * (highest - lowest))):
            ax.annotate(
                str(gene), (row[CEILING], row[PEARSON]), (highest * 1.02, height), textcoords="data", va="center",
                fontsize=7.5, style="italic", color=INK, annotation_clip=False, zorder=4,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2},
            )  # fmt: skip
        ax.set_xlim(0, highest)
        ax.set_xlabel("r of a perfect prediction (noise ceiling)", fontsize=9.5)
        ax.set_ylabel("held-out Pearson's r", fontsize=9.5)
        ax.tick_params(length=0, labelsize=8.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="upper left", handlelength=1.0)
    return ax


def _spread(heights: list[float], gap: float) -> list[float]:
    """Return falling heights, each at least a gap below the one before."""
    out: list[float] = []
    for height in heights:
        out.append(min(height, out[-1] - gap) if out else height)
    return out


def _evidence(model: PixNet | AnnData) -> pd.DataFrame:
    """Return what is known of the genes of a model or of a table."""
    if isinstance(model, AnnData):
        found = GeneEvidence.of_table(model)
        frame = None if found is None else found.frame
    elif hasattr(model, "evidence") and hasattr(model, "genes"):
        frame = None if model.evidence is None else model.evidence.frame(model.genes)
    else:
        raise TypeError(f"model is {type(model).__name__}; a PixNet or a table of predictions or loadings is needed")
    if frame is None or not frame[[PEARSON, CEILING]].notna().all(axis=1).any():
        raise ValueError(
            "nothing is known of how well these genes are predicted: the model was trained by an earlier version, or its "
            "held-out shapes were too few; train again with pixnet.tl.train, or measure with pixnet.tl.evaluate"
        )
    return frame
