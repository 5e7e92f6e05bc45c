"""A slide as a model sees it: its grid, and what reads it."""

from __future__ import annotations

from spatialdata import SpatialData

from pixnet._core.tiling import ModelGrid, SlideReader, choose_grid
from pixnet._sdata.elements import get_mpp, levels


def slide_grid(sdata: SpatialData, image_key: str, model_mpp: float, stride: int) -> ModelGrid:
    """Return the grid on which a model sees an image; nothing is read."""
    pyramid = levels(sdata.images[image_key])
    shapes = [(level.data.sizes["y"], level.data.sizes["x"]) for level in pyramid]
    return choose_grid([level.scale for level in pyramid], shapes, get_mpp(sdata, image_key), model_mpp, stride)


def slide_reader(sdata: SpatialData, image_key: str, grid: ModelGrid) -> SlideReader:
    """Return what reads an image on a grid."""
    return SlideReader(levels(sdata.images[image_key])[grid.level].data.data, grid, image_key)
