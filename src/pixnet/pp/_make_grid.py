"""A regular grid of squares or hexagons over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray
from spatialdata.models import ShapesModel

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._logging import logger
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.element_store import put
from pixnet._sdata.target import check_target
from pixnet._sdata.tissue import read_mask

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

# Number of shapes whose share of tissue is computed at once.
BATCH = 200_000
MAX_SHAPES = 50_000_000


def make_grid(
    sdata: SpatialData,
    size_um: float,
    *,
    image_key: str | None = None,
    shape: str = "square",
    mask_key: str | Literal[False] | None = None,
    key_added: str = "grid",
    overwrite: bool = False,
    inplace: bool = True,
) -> GeoDataFrame | None:
    """Lay a grid over an image, for :func:`pixnet.tl.aggregate`.

    Parameters
    ----------
    sdata
        Object that holds the image; its pixel size must be known.
    size_um
        Distance between neighbouring centres (µm): the edge of a square, the width across flats of a hexagon.
    image_key
        The image; ``None``: the recorded one, else the only one.
    shape
        ``"square"`` or ``"hex"``.
    mask_key
        Labels that mark tissue; ``None`` takes ``"{image_key}_tissue"``, else computes it; ``False`` takes everything
        for tissue. Shapes of which less than half is tissue are left out; there is no tissue outside the image.
    key_added
        Name of the shapes element.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    GeoDataFrame or None
        Polygons in the image's pixels and coordinate systems, starting at its upper left corner, with columns ``row``
        and ``col`` (place in the grid) and ``tissue`` (share of the area on tissue).

    Raises
    ------
    KeyError
        If an element is missing.
    ValueError
        If ``size_um`` is not positive, ``shape`` is unknown, the pixel size is unknown, ``key_added`` exists, or no
        shape would be on tissue.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.make_grid(sdata, 50, mask_key=False)
    >>> len(sdata["grid"])
    36
    """
    if shape not in {"square", "hex"}:
        raise ValueError(f"shape is {shape!r}; valid: 'square', 'hex'")
    if isinstance(size_um, bool) or not isinstance(size_um, int | float | np.number):
        raise TypeError(f"size_um is {size_um!r}; a number (µm) is needed")
    if not (np.isfinite(size_um) and size_um > 0):
        raise ValueError(f"size_um is {size_um!r}; a positive number (µm) is needed")
    slide = Slide.open(sdata, image_key, mask_key)
    image_key = slide.key
    size = float(size_um) / slide.mpp
    if inplace:
        check_target(sdata, key_added, "shapes", overwrite=overwrite)
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    if height * width / size**2 > MAX_SHAPES:
        raise ValueError(
            f"a grid of {size_um:g} µm would have {height * width / size**2:,.0f} shapes, more than {MAX_SHAPES:,}; "
            "take a larger size_um"
        )
    polygons, row, col = (_squares if shape == "square" else _hexagons)(size, height, width)
    mask, matrix = read_mask(slide)
    share = np.concatenate(
        [_share(polygons[i : i + BATCH], mask, matrix) for i in range(0, len(polygons), BATCH)] or [np.empty(0)]
    )
    keep = share >= 0.5 - 1e-6
    if not keep.any():
        raise ValueError(
            f"no shape of the grid is at least half on tissue of image {image_key!r}; is the slide empty, or size_um="
            f"{size_um:g} larger than the tissue? mask_key=False lays the grid over the whole image"
        )
    grid = geopandas.GeoDataFrame(
        {"row": row[keep], "col": col[keep], "tissue": share[keep].clip(0, 1), "geometry": polygons[keep]}
    )
    element = ShapesModel.parse(grid, transformations=slide.systems)
    if not inplace:
        return element
    put(sdata, key_added, element, overwrite=overwrite)
    logger.info("%d shapes of %g µm added as %r", len(element), size_um, key_added)
    return None


def _squares(size: float, height: int, width: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return squares, their rows and their columns."""
    # A last row or column of which less than half lies in the image is never kept.
    rows, cols = (int(np.floor(length / size + 0.5 + 1e-9)) for length in (height, width))
    row, col = (index.ravel() for index in np.indices((rows, cols)))
    return shapely.box(col * size, row * size, (col + 1) * size, (row + 1) * size), row, col


def _hexagons(size: float, height: int, width: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return hexagons, their rows and their columns."""
    radius = size / np.sqrt(3)  # from the centre to a corner, which points up
    rows = int(np.floor((height - radius) / (1.5 * radius) + 1e-9)) + 2
    cols = int(np.floor(width / size + 1e-9)) + 1
    row, col = (index.ravel() for index in np.indices((rows, cols)))
    x = size * (col + 0.5 + 0.5 * (row % 2))
    y = radius * (1 + 1.5 * row)
    angles = np.deg2rad(30 + 60 * np.arange(6))
    corners = np.stack([x[:, None] + radius * np.cos(angles), y[:, None] + radius * np.sin(angles)], axis=-1)
    return shapely.polygons(corners), row, col


def _share(polygons: NDArray, mask: NDArray[np.bool_], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each polygon's area that is tissue."""
    geometries = ShapeArrays.from_geometries(polygons).transform(matrix)
    x0, y0 = np.maximum(np.floor(geometries.bounds[:, :2].min(axis=0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(geometries.bounds[:, 2:].max(axis=0)).astype(int), mask.shape[::-1])
    if x1 <= x0 or y1 <= y0:
        return np.zeros(len(polygons))
    weights = coverage(geometries, window=(y0, x0, y1 - y0, x1 - x0))
    return weights @ mask[y0:y1, x0:x1].ravel().astype(np.float64) / geometries.area
