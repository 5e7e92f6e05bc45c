"""The tissue mask of a slide: found at a coarse resolution, or opened as tl functions use it."""

from __future__ import annotations

import numpy as np
from spatialdata import SpatialData

from pixnet._core.masking import SlideExtent, TissueMask
from pixnet._core.tiling import ModelGrid
from pixnet._core.tissue import compute_mask
from pixnet._logging import logger
from pixnet._sdata.elements import full_resolution, get_mpp, levels, tissue_key
from pixnet._sdata.geometry import affine_to_pixels

# The mask is made at about this many um per pixel: fine enough for the outline, coarse enough to be quick.
TARGET_MPP = 5.5


def _read_coarse(sdata: SpatialData, image_key: str) -> tuple[np.ndarray, tuple[float, float], float]:
    """Read an image as `pixnet._core.tissue.compute_mask` takes it.

    Returns
    -------
    tuple
        Pixels ``uint8 (3, y, x)``, level-0 pixels per pixel ``(y, x)``, um per pixel.
    """
    import dask.array as da

    mpp = get_mpp(sdata, image_key)
    pyramid = levels(sdata[image_key])
    # The coarsest level that is not coarser than wanted costs least to read.
    fitting = [level for level in pyramid if mpp * max(level.scale) <= TARGET_MPP * 1.4]
    level = fitting[-1] if fitting else pyramid[0]
    data, (scale_y, scale_x) = level.data.data, level.scale
    factor = max(1, round(TARGET_MPP / (mpp * float(np.sqrt(scale_y * scale_x)))))
    factor = min(factor, *data.shape[1:])
    if factor > 1:
        data = da.coarsen(np.mean, da.asarray(data), {1: factor, 2: factor}, trim_excess=True)
    scale = (scale_y * factor, scale_x * factor)
    return np.asarray(data).round().astype(np.uint8), scale, mpp * float(np.sqrt(scale[0] * scale[1]))


def find_tissue(sdata: SpatialData, image_key: str) -> tuple[np.ndarray, tuple[float, float]]:
    """Return where tissue is on an image.

    Returns
    -------
    tuple
        Mask ``bool (y, x)``, and level-0 pixels of the image per pixel of it, ``(y, x)``.
    """
    small, scale, mpp = _read_coarse(sdata, image_key)
    mask = compute_mask(small, mpp)
    share = float(mask.mean())
    if share == 0:
        logger.warning("no tissue found on image %r", image_key)
    else:
        logger.info("tissue covers %.0f %% of image %r", 100 * share, image_key)
    return mask, scale


def read_mask(sdata: SpatialData, image_key: str, mask_key: str | bool | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask ``bool (y, x)``, and the matrix ``(3, 3)`` from level-0 pixels of the image to its pixels.

    Parameters
    ----------
    sdata, image_key
        The object and its H&E image.
    mask_key
        A labels element; None: computed and not kept; False: one pixel for the whole image.
    """
    if mask_key is False:
        full = full_resolution(sdata.images[image_key])
        return np.ones((1, 1), dtype=bool), np.diag([1 / full.sizes["x"], 1 / full.sizes["y"], 1.0])
    if mask_key is None:
        mask, (scale_y, scale_x) = find_tissue(sdata, image_key)
        return mask, np.diag([1 / scale_x, 1 / scale_y, 1.0])
    labels = np.asarray(full_resolution(sdata.labels[mask_key]).data)
    return labels != 0, np.linalg.inv(affine_to_pixels(sdata, mask_key, image_key))


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
    mask, to_mask = read_mask(sdata, image_key, key)
    return TissueMask(mask, to_mask @ np.diag([out_px[1], out_px[0], 1.0]))


def mask_on_grid(
    sdata: SpatialData, image_key: str, mask_key: str | bool | None, grid: ModelGrid
) -> TissueMask | SlideExtent:
    """Return the tissue mask of an image on the output pixels of a model's grid."""
    return open_mask(sdata, image_key, mask_key, grid.out_px)
