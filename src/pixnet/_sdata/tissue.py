"""The tissue mask of a slide, as tl functions use it."""

from __future__ import annotations

import numpy as np
from spatialdata import SpatialData

from pixnet._core.masking import SlideExtent, TissueMask
from pixnet._core.tiling import ModelGrid
from pixnet._sdata.elements import full_resolution, tissue_key
from pixnet._sdata.geometry import affine_to_pixels


def open_mask(
    sdata: SpatialData, image_key: str, mask_key: str | bool | None, out_px: tuple[float, float]
) -> TissueMask | SlideExtent:
    """Return the tissue mask of an image, to be asked per output pixel.

    Parameters
    ----------
    sdata
        The object.
    image_key
        The H&E image.
    mask_key
        A labels element; None: ``"{image_key}_tissue"`` where it exists, else computed and not kept; False: everything.
    out_px
        Level-0 pixels per output pixel, ``(y, x)``.
    """
    key = tissue_key(sdata, image_key, mask_key)
    image = full_resolution(sdata.images[image_key])
    if key is False:
        return SlideExtent((image.sizes["y"] / out_px[0], image.sizes["x"] / out_px[1]))
    if key is None:
        from pixnet.pp import tissue_mask

        key = "tissue"
        mask = tissue_mask(sdata, image_key, inplace=False)
        sdata = SpatialData(images={image_key: sdata.images[image_key]}, labels={key: mask})
    to_pixels = affine_to_pixels(sdata, key, image_key)
    to_mask = np.linalg.inv(to_pixels) @ np.diag([out_px[1], out_px[0], 1.0])
    return TissueMask(full_resolution(sdata.labels[key]).data, to_mask)


def mask_on_grid(
    sdata: SpatialData, image_key: str, mask_key: str | bool | None, grid: ModelGrid
) -> TissueMask | SlideExtent:
    """Return the tissue mask of an image on the output pixels of a model's grid."""
    return open_mask(sdata, image_key, mask_key, grid.out_px)
