"""Accuracy of each gene's prediction."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pixnet.pl._style import GROUPS, INK, MUTED, style

LINE_PT = 10.5
"""Height of a line of gene names, in points."""

LETTER_PT = 3.9
"""Width of a letter of them, about, in points."""


def evaluation(
    df: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    n_named: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Show how well each gene is predicted: Pearson's r, genes ranked from best to worst.

    Parameters
    ----------
    df
        The result of :func:`pixnet.tl.evaluate`, or several by name, for instance one for each scale. A table with a
        column ``section`` gives a curve for each of its sections, the result of :func:`pixnet.tl.cross_validate` one
        for each held-out group.
    n_named
        Number of the best and of the worst genes to name of each curve; ``None``: 5 of a single one, 2 of each of up to
        four, none of more.
    ax
        Axes to draw in; ``None``: a new figure.

    Returns
    -------
    Axes
        x is the share of genes in percent, y Pearson's r; the legend gives mean and median of each curve.

    Raises
    ------
    KeyError
        If a table has no column ``pearson``.
    TypeError
        If ``df`` is neither a DataFrame nor a mapping of them, or ``ax`` is not Axes.
    ValueError
        If no gene has a finite Pearson's r, or ``n_named`` is negative.

    Examples
    --------
    >>> import pandas as pd
    >>> import pixnet as px
    >>> scores = pd.DataFrame({"pearson": [0.6, 0.4, 0.1]}, index=["FASN", "ERBB2", "ACTB"])
    >>> ax = px.pl.evaluation({"spots": scores, "8 µm": scores * 0.6}, n_named=1)
    """
    curves = _curves(df)
    if n_named is not None and (isinstance(n_named, bool) or not isinstance(n_named, (int, np.integer)) or n_named < 0):
        raise ValueError(f"n_named is {n_named!r}; a whole number of at least 0 is needed")
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"ax is {type(ax).__name__}; matplotlib Axes are needed")
    with style():
        if ax is None:
            _, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
        for i, (name, scores) in enumerate(curves.items()):
            colour = GROUPS[i % len(GROUPS)]
            x = _positions(len(scores))
            few = len(scores) <= 400
            ax.plot(
                x,
                scores.to_numpy(),
                color=colour,
                linewidth=1.4 if len(curves) > 1 or not few else 0.7,
                marker="o" if few and len(curves) == 1 else None,
                markersize=3,
                markeredgewidth=0,
                label=f"{name}   mean {scores.mean():.2f}, median {scores.median():.2f}".strip(),
                zorder=3,
            )
        ax.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        low = min(scores.min() for scores in curves.values())
        high = max(scores.max() for scores in curves.values())
        span = max(high - low, 0.2)
        ax.set_xlim(-2, 102)
        ax.set_ylim(min(low, 0) - 0.08 * span, high + 0.10 * span)
        ax.set_xlabel("genes, best to worst (%)", fontsize=9.5)
        ax.set_ylabel("Pearson's r", fontsize=9.5)
        ax.grid(axis="y", color="#e6e6ea", linewidth=0.7, zorder=0)
        ax.tick_params(length=0, labelsize=8.5)
        ax.spines[["left", "top", "right"]].set_visible(False)
        default = 5 if len(curves) == 1 else 2 if len(curves) <= 4 else 0
        _name_genes(ax, curves, default if n_named is None else int(n_named))
        ax.legend(loc="lower left", handlelength=1.2)  # curves fall, so that corner is free
    return ax


def _curves(df: pd.DataFrame | Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """Return the sorted Pearson's r of each curve, by its name."""
    if isinstance(df, pd.DataFrame):
        if {"group", "gene", "metric", "value"} <= set(df.columns):  # from cross_validate
            pearson = df[df["metric"] == "pearson"].rename(columns={"value": "pearson"}).set_index("gene")
            by = ["group", *(["shapes"] if "shapes" in df.columns else [])]
            frames = {
                ", ".join(map(str, name)): part.groupby(level="gene")[["pearson"]].mean()
                for name, part in pearson.groupby(by, sort=False)
            }
        elif "section" in df.columns and df["section"].nunique() > 1:
            frames = {str(name): part for name, part in df.groupby("section", sort=False)}
        else:
            frames = {"": df}
    elif isinstance(df, Mapping):
        frames = dict(df)
    else:
        raise TypeError(f"df is {type(df).__name__}; a DataFrame of pixnet.tl.evaluate, or a dict of them, is needed")
    curves = {}
    for name, frame in frames.items():
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"df[{name!r}] is {type(frame).__name__}; a DataFrame is needed")
        if "pearson" not in frame.columns:
            raise KeyError(f"no column 'pearson' in the evaluation; it has: {list(frame.columns)}")
        scores = frame["pearson"].dropna().sort_values(ascending=False)
        if len(scores):
            curves[str(name)] = scores
    if not curves:
        raise ValueError("no gene has a finite Pearson's r: there is nothing to show")
    return curves


def _positions(n: int) -> np.ndarray:
    """Return the rank of each gene in percent."""
    return np.array([50.0]) if n == 1 else np.linspace(0, 100, n)


def _name_genes(ax: Axes, curves: dict[str, pd.Series], n_named: int) -> None:
    """Name the best and the worst genes of each curve above all curves, in the upper right: room is made for it."""
    width, height = (length / ax.figure.dpi * 72 for length in (ax.bbox.width, ax.bbox.height))
    letters = width / LETTER_PT
    lines: list[tuple[str, str]] = []
    for i, scores in enumerate(curves.values()):
        n = min(n_named, len(scores) // 2)
        if n == 0:
            continue
        ends = {"best": scores.index[:n], "worst": scores.index[-n:]}
        if len(curves) == 1:
            lines = [(f"{end}  {_fitting(genes, letters - 7)}", INK) for end, genes in ends.items()]
        else:
            best, worst = (_fitting(genes, letters / 2 - 8) for genes in ends.values())
            text = f"best  {best}   worst  {worst}"
            lines.append((text if len(text) <= letters else f"best  {best}", GROUPS[i % len(GROUPS)]))
    low, high = ax.get_ylim()
    ax.set_ylim(low, low + (high - low) / (1 - min(LINE_PT * len(lines) / height, 0.6)))
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= 1.001])
    for i, (text, colour) in enumerate(lines):
        written = ax.annotate(
            text, (1, 1), xycoords="axes fraction", xytext=(0, -LINE_PT * (i + 0.5)), textcoords="offset points",
            ha="right", va="center", fontsize=7, color=colour, zorder=4,
        )  # fmt: skip
        written.set_in_layout(False)  # a long name must not squeeze the axes


def _fitting(genes: pd.Index, letters: float) -> str:
    """Return the names of genes, as many as fit into some letters."""
    out = str(genes[0])
    for i, gene in enumerate(genes[1:], 1):
        if len(out) + len(str(gene)) + 10 > letters:
            return f"{out}, {len(genes) - i} more"
        out = f"{out}, {gene}"
    return out
