"""The look of pixnet's figures: fonts, panels, colour limits, colour bars and scale bars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.font_manager import fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

INK = "#1b1b1f"
MUTED = "#6b6b76"
ACCENT = "#0072b2"  # Okabe and Ito: told apart with any colour vision
SECOND = "#d55e00"
GROUPS = (ACCENT, SECOND, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b5a400")
PANEL_INCHES = 3.0


@cache
def _fonts() -> tuple[str, ...]:
    """Return the font families that are installed: a missing one logs a warning at every draw."""
    installed = {font.name for font in fontManager.ttflist}
    wanted = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "Nimbus Sans")
    return (*(name for name in wanted if name in installed), "DejaVu Sans")


@contextmanager
def style() -> Iterator[None]:
    """Apply pixnet's figure style inside the block, and restore the caller's rcParams after it."""
    with mpl.rc_context(
        {
            "font.family": list(_fonts()),
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.titlepad": 6.0,
            "axes.labelsize": 9.5,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "text.color": INK,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "mathtext.default": "regular",
        }
    ):
        try:
            yield
        finally:
            interactive = mpl.is_interactive()
    # The first figure of a notebook starts its backend, which turns interactive mode on: keep it so.
    mpl.interactive(interactive)


def panels(
    n: int, ax: Axes | Sequence[Axes] | None, *, ncols: int, aspect: float, bar_inches: float = 0.55
) -> list[Axes]:
    """Return ``n`` Axes to draw in.

    Parameters
    ----------
    n
        Number of panels.
    ax
        ``None`` makes a figure; ``n`` Axes are used as they are; a single Axes is divided when more are needed.
    ncols
        Panels per row.
    aspect
        Width over height of a panel.
    bar_inches
        Room beside each panel for its colour bar.

    Raises
    ------
    TypeError
        If ``ax`` is neither Axes nor a sequence of them.
    ValueError
        If ``ncols`` is below 1, or ``ax`` is a sequence of another length.
    """
    if isinstance(ncols, bool) or not isinstance(ncols, (int, np.integer)) or ncols < 1:
        raise ValueError(f"ncols is {ncols!r}; a whole number of at least 1 is needed")
    cols = min(int(ncols), n)
    rows = math.ceil(n / cols)
    if isinstance(ax, Axes):
        if n == 1:
            return [ax]
        ax.set_axis_off()
        gap_x, gap_y = 0.3, 0.2
        width = 1 / (cols + gap_x * (cols - 0.3))
        height = 1 / (rows + gap_y * (rows - 1))
        corners = [(i % cols * width * (1 + gap_x), 1 - height - i // cols * height * (1 + gap_y)) for i in range(n)]
        return [ax.inset_axes((x, y, width, height)) for x, y in corners]
    if ax is not None:
        if isinstance(ax, (str, bytes)) or not isinstance(ax, (Sequence, np.ndarray)):
            raise TypeError(f"ax is {type(ax).__name__}; matplotlib Axes, or a sequence of them, are needed")
        given = list(np.asarray(ax, dtype=object).ravel())
        if not all(isinstance(one, Axes) for one in given):
            raise TypeError("ax holds something that is not matplotlib Axes")
        if len(given) != n:
            raise ValueError(f"ax has {len(given)} Axes, but {n} are drawn; pass {n}, a single one, or None")
        return given
    # Panels have the same area whatever their shape, so that wide and tall slides make figures of similar size.
    height = PANEL_INCHES / math.sqrt(min(max(aspect, 0.4), 2.5))
    width = height * min(max(aspect, 0.4), 2.5)
    figure, grid = plt.subplots(
        rows,
        cols,
        figsize=(cols * (width + bar_inches), rows * (height + 0.42)),
        squeeze=False,
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, wspace=0.02, hspace=0.02),
    )
    axes = list(grid.ravel())
    for spare in axes[n:]:
        spare.remove()
    return axes[:n]


def returned(axes: list[Axes]) -> Axes | np.ndarray:
    """Return a single Axes as it is, several as an array."""
    if len(axes) == 1:
        return axes[0]
    array = np.empty(len(axes), dtype=object)
    array[:] = axes
    return array


def colour_map(cmap: str | Colormap | None, default: str) -> Colormap:
    """Return a colour map whose missing values are transparent.

    Raises
    ------
    ValueError
        If matplotlib has no map of that name.
    """
    if isinstance(cmap, str) and cmap not in mpl.colormaps:
        raise ValueError(
            f"cmap is {cmap!r}, which matplotlib does not have; good ones are 'magma', 'viridis', 'cividis'"
        )
    chosen = mpl.colormaps[cmap or default] if cmap is None or isinstance(cmap, str) else cmap
    return chosen.with_extremes(bad=(0, 0, 0, 0))


def limits(
    values: np.ndarray,
    percentiles: tuple[float, float],
    vmin: float | None = None,
    vmax: float | None = None,
) -> Normalize:
    """Return colour limits: robust percentiles of the finite values, each end replaced where one is given.

    Raises
    ------
    ValueError
        If the percentiles are not two rising numbers from 0 to 100, or ``vmin`` is not below ``vmax``.
    """
    try:
        low, high = (float(p) for p in percentiles)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles is {percentiles!r}; two rising numbers from 0 to 100 are needed, as (1, 99)")
    if vmin is not None and vmax is not None and not vmin < vmax:
        raise ValueError(f"vmin ({vmin}) is not below vmax ({vmax})")
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        finite = np.array([0.0, 1.0])
    bottom = float(np.percentile(finite, low)) if vmin is None else float(vmin)
    top = float(np.percentile(finite, high)) if vmax is None else float(vmax)
    if top <= bottom and vmax is None:  # nearly all values are alike, as for a gene that is hardly expressed
        top = max(float(finite.max()), bottom)
    if top <= bottom:
        bottom, top = (bottom, bottom + 1.0) if vmin is not None or vmax is None else (top - 1.0, top)
    return Normalize(bottom, top)


def bare(ax: Axes) -> None:
    """Leave the picture only: no ticks, no frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.patch.set_alpha(0.0)


def colour_bar(ax: Axes, mappable: ScalarMappable, values: np.ndarray, label: str) -> Any:
    """Draw a slim colour bar beside a picture; its ends point where values lie beyond the limits."""
    finite = values[np.isfinite(values)]
    below = finite.size and finite.min() < mappable.norm.vmin
    above = finite.size and finite.max() > mappable.norm.vmax
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
        (bool(below), bool(above)), "neither"
    )
    cax = ax.inset_axes((1.03, 0.0, 0.045, 1.0))
    bar = ax.figure.colorbar(mappable, cax=cax, extend=extend, extendfrac=0.035)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
    bar.ax.tick_params(length=2.5, width=0.6, pad=2, labelsize=8)
    bar.set_label(label, fontsize=8.5, labelpad=4)
    bar.update_ticks()
    return bar


def scale_bar(ax: Axes, width: float, left: float, unit: str = "µm") -> None:
    """Draw a scale bar of a round length below the lower left corner of a picture.

    Parameters
    ----------
    ax
        Axes whose x axis counts µm (or pixels).
    width, left
        Width and left edge of the picture, in the same unit.
    unit
        Unit of the axis.
    """
    target = width / 4
    magnitude = 10 ** math.floor(math.log10(target))
    length = max(step * magnitude for step in (1, 2, 5) if step * magnitude <= target)
    shown, shown_unit = (length / 1000, "mm") if unit == "µm" and length >= 1000 else (length, unit)
    points = ScaledTranslation(0, -7 / 72, ax.figure.dpi_scale_trans)
    placed = blended_transform_factory(ax.transData, ax.transAxes) + points
    ax.plot(
        [left, left + length],
        [0, 0],
        transform=placed,
        color=INK,
        linewidth=2.6,
        solid_capstyle="butt",
        clip_on=False,
        gid="scale-bar",
    )
    ax.text(
        left + length + 0.015 * width,
        0,
        f"{shown:g} {shown_unit}",
        transform=placed,
        fontsize=8.5,
        va="center_baseline",
        ha="left",
        path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.6)],
    )
