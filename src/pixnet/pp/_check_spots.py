"""Alignment of spots and tissue: mirrored, turned or swapped coordinates are found before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet._logging import logger
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_shapes
from pixnet._sdata.shapes import read_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import read_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

# A warning is given below this share of shapes on tissue, or where another placement is better by this much.
ENOUGH = 0.75
BETTER = 0.10


def check_spots(
    sdata: SpatialData,
    shapes: str | None = None,
    *,
    image_key: str | None = None,
    mask_key: str | Literal[False] | None = None,
    coordinate_system: str | None = None,
    plot: bool = False,
    ax: Axes | None = None,
) -> pd.DataFrame:
    """Check that spots, bins or cells lie on tissue, as they are placed and mirrored, turned or swapped.

    Coordinates that are mirrored, or whose x and y are exchanged, train a model on the wrong pixels without any error.
    The placement as given should be the best one; a warning is logged where another is clearly better, or where few
    shapes are on tissue. Symmetric tissue can hide a mistake: look at the picture.

    Parameters
    ----------
    sdata
        Object that holds shapes and image.
    shapes
        The shapes element; ``None``: the recorded one, else the only one.
    image_key
        The H&E image; ``None``: the recorded one, else the only one.
    mask_key
        Labels that mark tissue; ``None`` takes ``"{image_key}_tissue"``, else computes it; ``False`` takes the whole image
        for tissue, so that only shapes outside the image are found.
    coordinate_system
        The coordinate system that shapes and image share; ``None`` takes "global" if shared, else the first shared one.
    plot
        Draw the image with the shapes' centres, coloured by whether they are on tissue.
    ax
        Axes to draw on (implies ``plot``).

    Returns
    -------
    DataFrame
        Index ``placement``: ``"as given"`` first, then the other seven by share; column ``on_tissue``: share of the
        shapes whose centre is on tissue.

    Raises
    ------
    KeyError
        If an element is missing.
    ValueError
        If the element is empty, several are named, or the pixel size of the image is unknown.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600)
    >>> px.pp.check_spots(sdata, "spots").index[0]
    'as given'
    """
    check_sdata(sdata, "pp.check_spots")
    names = resolve_shapes(sdata, shapes)
    if len(names) > 1:
        raise ValueError(f"shapes names {len(names)} elements; check them one by one")
    slide = Slide.open(sdata, image_key, mask_key)
    bounds = read_shapes(sdata, names[0], slide.key, coordinate_system).geometries.bounds
    if len(bounds) == 0:
        raise ValueError(f"{names[0]!r} is empty: there is nothing to check")
    x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
    on_tissue = _placements(slide, x, y)
    shares = on_tissue.mean()
    order = ["as given", *shares.drop("as given").sort_values(ascending=False, kind="stable").index]
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    where = f"{'in' if mask_key is False else 'on the tissue of'} image {slide.key!r}"
    _warn(shares, names[0], where, float(((x < 0) | (y < 0) | (x >= width) | (y >= height)).mean()))
    if plot or ax is not None:
        from pixnet.pl._alignment import draw_alignment

        title = f"{shares['as given']:.0%} of {names[0]} on tissue"
        draw_alignment(slide, x, y, on_tissue["as given"].to_numpy(), title, ax)
    return shares[order].rename_axis("placement").to_frame("on_tissue")


def _placements(slide: Slide, x: NDArray, y: NDArray) -> pd.DataFrame:
    """Return whether each point (pixels of the slide) is on tissue, with a column for each placement."""
    mask, to_mask = read_mask(slide)
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    placements = {
        "as given": (x, y),
        "x mirrored": (width - x, y),
        "y mirrored": (x, height - y),
        "turned by 180 degrees": (width - x, height - y),
        "x and y exchanged": (y, x),
        "turned by 90 degrees": (height - y, x),
        "turned by 270 degrees": (y, width - x),
        "x and y exchanged, turned by 180 degrees": (height - y, width - x),
    }
    found = {}
    for name, places in placements.items():
        col, row = np.floor(to_mask[:2, :2] @ np.stack(places) + to_mask[:2, 2:]).astype(np.int64)
        inside = (row >= 0) & (col >= 0) & (row < mask.shape[0]) & (col < mask.shape[1])
        found[name] = inside
        found[name][inside] = mask[row[inside], col[inside]]
    return pd.DataFrame(found)


def _warn(shares: pd.Series, shapes: str, where: str, outside: float) -> None:
    """Log a warning where another placement is better, or few shapes are on tissue."""
    given, best = shares["as given"], shares.drop("as given")
    if best.max() > given + BETTER:
        logger.warning(
            "%.0f %% of %r lie %s; with coordinates '%s' it would be %.0f %%: check x and y, and the "
            "transformations (pixnet.pp.check_spots(sdata, %r, plot=True) draws it)",
            100 * given,
            shapes,
            where,
            best.idxmax(),
            100 * best.max(),
            shapes,
        )
    elif given < ENOUGH:
        logger.warning(
            "only %.0f %% of %r lie %s (%.0f %% outside the image): shifted, or at another scale?",
            100 * given,
            shapes,
            where,
            100 * outside,
        )
