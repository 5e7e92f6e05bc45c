"""Cells on H&E, for slides that come with none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import geopandas
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from spatialdata.models import ShapesModel
from tqdm.auto import tqdm

from pixnet._core.cells import Watershed, joined, segment_tile
from pixnet._core.parallel import run
from pixnet._core.placement import PointLookup
from pixnet._core.slide.stain import sample
from pixnet._logging import logger
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.element_store import put
from pixnet._sdata.target import check_target
from pixnet._sdata.tissue import no_tissue, open_mask
from pixnet._settings import settings

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

MAX_MPP = 1.0
"""Nuclei are a few pixels across on a coarser slide, and are not told apart."""


def segment_cells(
    sdata: SpatialData,
    image_key: str | None = None,
    *,
    method: Callable[[NDArray[np.uint8]], NDArray[np.integer]] | None = None,
    mpp: float = 0.5,
    expand_um: float = 4.0,
    mask_key: str | Literal[False] | None = None,
    tile_size: int = 1024,
    key_added: str = "cells",
    overwrite: bool = False,
    inplace: bool = True,
) -> GeoDataFrame | None:
    """Find the cells of an H&E image: its nuclei, and a few µm around each.

    The slide is read in tiles that overlap, so that no cell is cut where two tiles meet. Without ``method``, nuclei are
    found by their haematoxylin and cut apart with a watershed, and the result does not depend on the tiles. That is
    quick and right for most nuclei. Trained networks are better where nuclei are pale or lie on one another; any of
    them can be the ``method``.

    Parameters
    ----------
    sdata
        Object that holds the image; its pixel size must be known.
    image_key
        The H&E image; ``None``: the recorded one, else the only one.
    method
        Called with each tile, ``uint8 (y, x, 3)``, and returns integers ``(y, x)``: the number of the nucleus (or cell)
        of each pixel, 0 where there is none. It is called by one thread at a time. ``None``: the watershed.
    mpp
        Pixel size at which the slide is read (µm/px), the one that ``method`` wants.
    expand_um
        How far a cell reaches around its nucleus (µm), unless another is nearer. 0 keeps what was found.
    mask_key
        Labels that mark tissue; ``None`` takes ``"{image_key}_tissue"``, else computes it; ``False`` takes everything
        for tissue. Cells whose centre is not on tissue are left out.
    tile_size
        Edge of a tile, in pixels of ``mpp``; 64 µm around it are read as well.
    key_added
        Name of the shapes element.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    GeoDataFrame or None
        Polygons in the image's pixels and coordinate systems, numbered from 1 on down the slide.

    Raises
    ------
    KeyError
        If an element is missing.
    TypeError
        If ``method`` returns anything but integers of a tile's size.
    ValueError
        If the pixel size is unknown or above 1 µm/px, a value is out of range, ``key_added`` exists, there is no
        tissue, or no cell is found.

    See Also
    --------
    pixnet.io.read_geojson : Cells that QuPath found.
    pixnet.io.write_geojson : Look at the cells in QuPath.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.segment_cells(sdata, key_added="found")
    >>> 100 < len(sdata["found"]) < 1000
    True
    """
    if method is not None and not callable(method):
        raise TypeError(f"method is {method!r}; a function of an RGB tile, or None, is needed")
    _check_range("mpp", mpp, 0.1, MAX_MPP, "µm/px")
    _check_range("expand_um", expand_um, 0, 20, "µm")
    _check_range("tile_size", tile_size, 64, 16_384, "px")
    slide = Slide.open(sdata, image_key, mask_key)
    if slide.mpp > MAX_MPP:
        raise ValueError(
            f"image {slide.key!r} has {slide.mpp:g} µm/px, and nuclei are told apart up to {MAX_MPP:g}: use the full-resolution "
            "image, or cells from another source; if the pixel size is wrong, fix it with pixnet.pp.set_mpp"
        )
    if inplace:
        check_target(sdata, key_added, "shapes", overwrite=overwrite)
    # A slide that is a little coarser than asked for is enlarged.
    grid = slide.grid(max(mpp, slide.mpp / 2), 1)
    reader = slide.reader(grid)
    mask = open_mask(slide, grid.out_px)
    if not mask.any():
        raise ValueError(no_tissue(slide))
    threads = 1 if method is not None else None
    find: Any = Watershed.fitted(sample(reader, mask), grid.mpp) if method is None else method

    corners = product(range(0, grid.shape[0], tile_size), range(0, grid.shape[1], tile_size))
    tiles = [(y, x) for y, x in corners if mask.near(y, x, tile_size, tile_size)]
    parts = {}
    with tqdm(
        total=len(tiles), desc="cells", unit="tile", file=sys.stderr, leave=False, disable=not settings.progress
    ) as bar:
        for where, found in run(segment_tile, (reader, find, tile_size, float(expand_um)), tiles, threads=threads):
            parts[where] = found
            bar.update()
    reader.check()
    cells = joined([parts[where] for where in tiles])

    kept = PointLookup(mask.mask, mask.to_mask).at(*cells.centres.T[::-1])
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    polygons = shapely.intersection(cells.polygons[kept], shapely.box(0, 0, width, height))
    polygons = polygons[shapely.area(polygons) > 0]
    if len(polygons) == 0:
        raise ValueError(f"no cell was found on image {slide.key!r}; look at it, and at its tissue mask")
    frame = geopandas.GeoDataFrame(geometry=polygons, index=pd.RangeIndex(1, len(polygons) + 1))
    element = ShapesModel.parse(frame, transformations=slide.systems)
    if not inplace:
        return element
    put(sdata, key_added, element, overwrite=overwrite)
    logger.info("%d cells of image %r added as %r", len(element), slide.key, key_added)
    return None


def _check_range(name: str, value: Any, low: float, high: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; a number from {low:g} to {high:g} ({unit}) is needed")
