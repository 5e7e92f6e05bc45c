"""The tissue mask of a slide: computed at a coarse resolution, or opened as tl functions use it."""

from __future__ import annotations

import numpy as np

from pixnet._core.placement import PointLookup
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.tissue import ISLAND_SHARE, ISLAND_UM2, compute_mask
from pixnet._logging import logger
from pixnet._sdata.rasters import full_resolution
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.transforms import affine_to_pixels

# About the pixel size of the mask (µm/px): fine enough for the outline, coarse enough to be quick.
TARGET_MPP = 5.5


def read_coarse(slide: Slide) -> tuple[np.ndarray, tuple[float, float], float]:
    """Return coarse pixels ``uint8 (3, y, x)``, level-0 pixels per pixel ``(y, x)``, and their pixel size (µm/px)."""
    import dask.array as da

    mpp, pyramid = slide.mpp, slide.levels
    # The coarsest level that is not coarser than wanted costs least to read.
    fitting = [level for level in pyramid if mpp * max(level.scale) <= TARGET_MPP * 1.4]
    level = fitting[-1] if fitting else pyramid[0]
    data, (scale_y, scale_x) = level.data.data, level.scale
    factor = max(1, round(TARGET_MPP / (mpp * float(np.sqrt(scale_y * scale_x)))))
    factor = min(factor, *data.shape[1:])
    if factor > 1:
        data = da.coarsen(np.mean, da.asarray(data), {1: factor, 2: factor}, trim_excess=True)
    scale = (scale_y * factor, scale_x * factor)
    pixels = np.asarray(data)
    check_bound(level.data, f"image {slide.key!r}")
    return pixels.round().astype(np.uint8), scale, mpp * float(np.sqrt(scale[0] * scale[1]))


def find_tissue(slide: Slide) -> tuple[np.ndarray, tuple[float, float]]:
    """Compute the tissue mask ``bool (y, x)`` of an image, and level-0 pixels per pixel of it, ``(y, x)``."""
    small, scale, mpp = read_coarse(slide)
    mask = compute_mask(small, mpp)
    share = float(mask.mean())
    if share == 0:
        logger.warning("%s", no_tissue(slide))
    else:
        logger.info("tissue covers %.0f %% of image %r", 100 * share, slide.key)
    return mask, scale


def no_tissue(slide: Slide) -> str:
    """Return the sentence that says that a slide has no tissue, and by which rule."""
    if slide.mask_key:
        return f"the mask {slide.mask_key!r} of image {slide.key!r} has no tissue"
    width, height = (slide.mpp * slide.image.sizes[axis] for axis in ("x", "y"))
    return (
        f"no tissue found on image {slide.key!r} of {width:.4g} x {height:.4g} µm at {slide.mpp:g} µm/px: pieces smaller than "
        f"{ISLAND_UM2:,.0f} µm², or {ISLAND_SHARE:.0%} of a small image, count as debris. If the pixel size is wrong, fix it "
        "with pixnet.pp.set_mpp"
    )


def read_mask(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Return the tissue mask ``bool (y, x)`` and the matrix ``(3, 3)`` from level-0 pixels of the slide to its pixels.

    A slide without a mask element gets one that is computed and not kept; with ``mask_key=False`` it is one pixel.
    """
    if slide.mask_key is False:
        sizes = slide.image.sizes
        return np.ones((1, 1), dtype=bool), np.diag([1 / sizes["x"], 1 / sizes["y"], 1.0])
    if slide.mask_key is None:
        mask, (scale_y, scale_x) = find_tissue(slide)
        return mask, np.diag([1 / scale_x, 1 / scale_y, 1.0])
    element = slide.sdata.labels[slide.mask_key]
    labels = np.asarray(full_resolution(element).data)
    check_bound(element, f"mask {slide.mask_key!r}")
    return labels != 0, np.linalg.inv(affine_to_pixels(slide.sdata, slide.mask_key, slide.key))


def on_tissue(slide: Slide, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return whether points (level-0 pixels) are on the tissue of a slide."""
    return PointLookup(*read_mask(slide)).at(x, y)


def open_mask(slide: Slide, out_px: tuple[float, float], out_margin: tuple[float, float] = (0.0, 0.0)) -> TissueMask:
    """Return the tissue mask of a slide, to be asked per output pixel of ``out_px`` level-0 pixels ``(y, x)``.

    ``out_margin`` are the output pixels above and to the left of the slide.
    """
    mask, to_mask = read_mask(slide)
    to_slide = np.diag([out_px[1], out_px[0], 1.0])
    to_slide[:2, 2] = -out_px[1] * out_margin[1], -out_px[0] * out_margin[0]
    return TissueMask(mask, to_mask @ to_slide, masked=slide.mask_key is not False)
