"""A slide of an object, opened once: resolved and checked before any pixel is read, then handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spatialdata import SpatialData
from spatialdata.transformations import get_transformation
from xarray import DataArray

from pixnet._core.slide.grid import ModelGrid, choose_grid
from pixnet._core.slide.reader import SlideReader
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_image, tissue_key
from pixnet._sdata.pixel_size import find_origin, get_mpp, is_pixel_size
from pixnet._sdata.rasters import Level, channel_names, levels
from pixnet._sdata.record import find_entry, identity_of
from pixnet._sdata.store.bound import check_bound


@dataclass(frozen=True)
class Slide:
    """An H&E image of an object.

    Attributes
    ----------
    sdata, key
        The object, and the name of the image.
    mpp
        Pixel size of the full-resolution level (µm/px).
    levels
        The pyramid, finest level first.
    mask_key
        Labels element that marks tissue. None: the mask has to be computed; False: everything is tissue.
    """

    sdata: SpatialData
    key: str
    mpp: float
    levels: list[Level]
    mask_key: str | Literal[False] | None

    @classmethod
    def open(cls, sdata: SpatialData, image_key: str | None = None, mask_key: str | bool | None = None) -> Slide:
        """Check an object, resolve an image and its mask, and check them; reads no pixel.

        Raises
        ------
        FileNotFoundError
            If the store of the pixels is gone.
        KeyError
            If there is no such image or labels element.
        RuntimeError
            If another image was written in its place.
        TypeError
            If it is not a SpatialData object, or the pixels are not uint8.
        ValueError
            If the image is not RGB, several could be meant, or its pixel size is unknown.
        """
        check_sdata(sdata)
        key = resolve_image(sdata, image_key)
        slide = cls(sdata, key, get_mpp(sdata, key), levels(sdata.images[key]), tissue_key(sdata, key, mask_key))
        check_bound(sdata.images[key], f"image {key!r}")
        if isinstance(slide.mask_key, str):
            check_bound(sdata.labels[slide.mask_key], f"mask {slide.mask_key!r}")
        return slide

    @property
    def image(self) -> DataArray:
        """The full-resolution level, ``(c, y, x)``."""
        return self.levels[0].data

    @property
    def transformations(self) -> dict[str, Any]:
        """Transformations of the full-resolution level to each of its coordinate systems, the pixel size among them."""
        return dict(get_transformation(self.image, get_all=True))

    @property
    def systems(self) -> dict[str, Any]:
        """Transformations to the coordinate systems of the object, for elements that lie on the slide."""
        return {name: value for name, value in self.transformations.items() if not is_pixel_size(name)}

    @property
    def channels(self) -> list[str]:
        """Names of the channels."""
        return channel_names(self.image)

    @property
    def identity(self) -> str:
        """What the image is recognised by in the record."""
        return identity_of(self.image)

    @property
    def made(self) -> dict[str, Any]:
        """What is recorded of how the image was made, such as from which one; empty if nothing is."""
        return find_entry(self.sdata, "images", self.key) or {}

    def grid(self, mpp: float, stride: int, *, anchored: bool = False) -> ModelGrid:
        """Return the grid on which a model of this pixel size and stride sees the slide.

        An ``anchored`` grid of a crop has its blocks where they lie on the slide that it was cut from.
        """
        shapes = [(level.data.sizes["y"], level.data.sizes["x"]) for level in self.levels]
        origin = find_origin(self.sdata, self.key) if anchored else (0.0, 0.0)
        return choose_grid([level.scale for level in self.levels], shapes, self.mpp, mpp, stride, origin)

    def reader(self, grid: ModelGrid) -> SlideReader:
        """Return the reader of the slide's pixels on a grid."""
        return SlideReader(self.levels[grid.level].data.data, grid, self.key)
