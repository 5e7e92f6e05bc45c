"""Do the spots lie on the tissue? Mirrored, turned or swapped coordinates are found before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet._logging import logger
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_shapes
from pixnet._sdata.rasters import levels
from pixnet._sdata.shapes import read_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import read_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

# Below this share of spots on tissue, or where another placement is better by this much, a warning is given.
ENOUGH = 0.75
BETTER = 0.10


def check_spots(
    sdata: SpatialData,
    shapes: str | None = None,
    *,
    image_key: str | None = None,
    mask_key: str | None = None,
    coordinate_system: str | None = None,
    plot: bool = False,
    ax: Axes | None = None,
) -> pd.DataFrame:
    """Check that spots, bins or cells lie on tissue, as they are placed and mirrored, turned or swapped.

    Coordinates that are mirrored, or whose x and y are exchanged, train a model on the wrong pixels without any error.
    The placement as given should be the best one; where another is clearly better, or few shapes are on tissue, a
    warning says so. Symmetric tissue can hide a mistake: look at the picture.

    Parameters
    ----------
    sdata
        Object that holds shapes and image.
    shapes
        The shapes element; ``None``: the recorded one, else the only one.
    image_key
        The H&E image; ``None``: the recorded one, else the only one.
    mask_key
        Labels that mark tissue; ``None`` takes ``"{image_key}_tissue"``, else computes it.
    coordinate_system
        Where shapes and image meet; ``None`` takes "global" if shared, else the first shared one.
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
        If ``mask_key`` is False, the element is empty, or um/px is needed for the mask and unknown.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600)
    >>> px.pp.check_spots(sdata, "spots").index[0]
    'as given'
    """
    check_sdata(sdata, "pp.check_spots")
    (shapes,) = resolve_shapes(sdata, shapes)
    if mask_key is False:
        raise ValueError("mask_key=False takes everything for tissue: there is nothing to check")
    slide = Slide.open(sdata, image_key, mask_key)
    image_key = slide.key
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    bounds = read_shapes(sdata, shapes, image_key, coordinate_system).geometries.bounds
    if len(bounds) == 0:
        raise ValueError(f"{shapes!r} is empty: there is nothing to check")
    x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
    mask, to_mask = read_mask(slide)

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
    on_tissue = {name: _on(mask, to_mask, *places) for name, places in placements.items()}
    shares = pd.Series({name: float(found.mean()) for name, found in on_tissue.items()})
    order = ["as given", *shares.drop("as given").sort_values(ascending=False, kind="stable").index]
    _warn(shares, shapes, image_key, float(((x < 0) | (y < 0) | (x >= width) | (y >= height)).mean()))
    if plot or ax is not None:
        _draw(sdata, image_key, x, y, on_tissue["as given"], f"{shares['as given']:.0%} of {shapes} on tissue", ax)
    return shares[order].rename_axis("placement").to_frame("on_tissue")


def _on(mask: NDArray[np.bool_], to_mask: NDArray[np.float64], x: NDArray, y: NDArray) -> NDArray[np.bool_]:
    """Whether points of the image are on tissue."""
    at = np.floor(to_mask[:2, :2] @ np.stack([x, y]) + to_mask[:2, 2:]).astype(np.int64)
    inside = (at[0] >= 0) & (at[1] >= 0) & (at[0] < mask.shape[1]) & (at[1] < mask.shape[0])
    found = np.zeros(len(x), dtype=bool)
    found[inside] = mask[at[1, inside], at[0, inside]]
    return found


def _warn(shares: pd.Series, shapes: str, image_key: str, outside: float) -> None:
    given, best = shares["as given"], shares.drop("as given")
    if best.max() > given + BETTER:
        logger.warning(
            "%.0f %% of %r lie on the tissue of image %r; with coordinates '%s' it would be %.0f %%: check x and y, and the "
            "transformations (pixnet.pp.check_spots(sdata, %r, plot=True) draws it)",
            100 * given,
            shapes,
            image_key,
            best.idxmax(),
            100 * best.max(),
            shapes,
        )
    elif given < ENOUGH:
        logger.warning(
            "only %.0f %% of %r lie on the tissue of image %r (%.0f %% outside the image): shifted, or at another scale?",
            100 * given,
            shapes,
            image_key,
            100 * outside,
        )


def _draw(
    sdata: Any, image_key: str, x: NDArray, y: NDArray, on: NDArray[np.bool_], title: str, ax: Axes | None
) -> None:
    import matplotlib.pyplot as plt

    pyramid = levels(sdata[image_key])
    fitting = [level for level in pyramid if max(level.data.shape[1:]) >= 500]
    level = fitting[-1] if fitting else pyramid[0]
    step = max(1, max(level.data.shape[1:]) // 1500)
    pixels = np.asarray(level.data.data[:, ::step, ::step]).transpose(1, 2, 0)
    full = pyramid[0].data
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 6 * full.sizes["y"] / full.sizes["x"] + 0.4), layout="constrained")
    ax.imshow(pixels, extent=(0, full.sizes["x"], full.sizes["y"], 0))
    size = float(np.clip(8000 / max(len(x), 1), 0.5, 30))
    for wanted, colour, label in ((True, "#0072b2", "on tissue"), (False, "#d55e00", "not on tissue")):
        ax.scatter(x[on == wanted], y[on == wanted], s=size, c=colour, label=label, linewidths=0, alpha=0.8)
    ax.set(title=title, xticks=[], yticks=[])
    ax.legend(loc="lower right", markerscale=max(1.0, 4 / size), framealpha=0.9)
