"""Where tissue is on a slide: a labels element at a coarse resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from spatialdata.transformations import get_transformation

from pixnet._logging import logger
from pixnet._sdata import elements
from pixnet._sdata.store import put
from pixnet.io._raster import raster_element

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

# The mask is made at about this many um per pixel: fine enough for the outline, coarse enough to be quick.
TARGET_MPP = 5.5
# um; the window in which texture is measured: wide enough to span nuclei and fibres, narrow enough for thin strands
TEXTURE_UM = 14.0
# Tissue has at least one of these pairs: texture (local standard deviation of optical density), and mean density above
# the glass. Measured: glass and smears of eosin stay below 0.009 of texture, pale and even brain is at 0.012 and more.
SIGNS = ((0.025, 0.02), (0.011, 0.05), (0.0, 0.16))
# um^2; islands smaller than this are debris or fiducial marks, holes smaller than this lumina and fat.
ISLAND_UM2 = 30_000.0
HOLE_UM2 = 60_000.0


def tissue_mask(
    sdata: SpatialData,
    image_key: str | None = None,
    *,
    key_added: str | None = None,
    overwrite: bool = False,
    inplace: bool = True,
) -> DataArray | None:
    """Find tissue on an H&E image.

    Tissue is what has texture or absorbs clearly more than the glass around it. The glass is estimated locally, so
    uneven light and a smear of eosin do not count; lumina and fat inside the tissue do, islands below 0.03 mm^2 do not.

    Parameters
    ----------
    sdata
        Object that holds the image.
    image_key
        The H&E image; its um/px must be known. ``None`` resolves it.
    key_added
        Name of the labels element; ``None`` is ``"{image_key}_tissue"``, which ``tl`` functions find by themselves.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    DataArray or None
        Labels ``uint8 (y, x)``, 1 tissue and 0 background, at 4 to 8 um/px (a coarser image's own), in the coordinate
        systems of the image.

    Raises
    ------
    KeyError
        If there is no such image.
    ValueError
        If um/px is unknown, the image is no 8-bit RGB, or ``key_added`` exists.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.tissue_mask(sdata)
    >>> sorted(set(sdata["he_tissue"].values.ravel().tolist()))
    [0, 1]
    """
    elements.check_sdata(sdata, "pp.tissue_mask")
    image_key = elements.resolve_image(sdata, image_key)
    elements.get_mpp(sdata, image_key)
    key_added = f"{image_key}_tissue" if key_added is None else key_added
    if inplace:
        elements.check_key_free(sdata, key_added, overwrite)
        elements.check_replaces(sdata, key_added, "labels")
    small, scale, mpp = read_coarse(sdata, image_key)
    mask = compute_mask(small, mpp)
    share = float(mask.mean())
    if share == 0:
        logger.warning("no tissue found on image %r", image_key)
    else:
        logger.info("tissue covers %.0f %% of image %r", 100 * share, image_key)
    full = elements.full_resolution(sdata[image_key])
    element = raster_element(
        [mask.astype(np.uint8)], [scale], transformations=get_transformation(full, get_all=True), channels=None
    )
    if not inplace:
        return element
    if key_added == f"{image_key}_tissue" or image_key not in elements.record(sdata)["masks"]:
        elements.record(sdata)["masks"][image_key] = key_added
    put(sdata, key_added, element, overwrite=overwrite)
    return None


def read_coarse(sdata: SpatialData, image_key: str) -> tuple[np.ndarray, tuple[float, float], float]:
    """Read an image as :func:`compute_mask` takes it.

    Returns
    -------
    tuple
        Pixels ``uint8 (3, y, x)``, level-0 pixels per pixel ``(y, x)``, um per pixel.
    """
    import dask.array as da

    mpp = elements.get_mpp(sdata, image_key)
    levels = elements.levels(sdata[image_key])
    # The coarsest level that is not coarser than wanted costs least to read.
    fitting = [level for level in levels if mpp * max(level.scale) <= TARGET_MPP * 1.4]
    level = fitting[-1] if fitting else levels[0]
    data, (scale_y, scale_x) = level.data.data, level.scale
    factor = max(1, round(TARGET_MPP / (mpp * float(np.sqrt(scale_y * scale_x)))))
    factor = min(factor, *data.shape[1:])
    if factor > 1:
        data = da.coarsen(np.mean, da.asarray(data), {1: factor, 2: factor}, trim_excess=True)
    scale = (scale_y * factor, scale_x * factor)
    return np.asarray(data).round().astype(np.uint8), scale, mpp * float(np.sqrt(scale[0] * scale[1]))


def compute_mask(level_array: np.ndarray, mpp_level: float) -> np.ndarray:
    """Find tissue in pixels already read; knows nothing of SpatialData.

    Parameters
    ----------
    level_array
        RGB, ``uint8 (3, y, x)``, at a few um per pixel.
    mpp_level
        um per pixel of ``level_array``.

    Returns
    -------
    numpy.ndarray
        ``bool (y, x)``, True on tissue.
    """
    from skimage.morphology import remove_small_objects

    rgb = np.asarray(level_array)
    # Optical density, the logarithm of the light that is lost; exact black (no image there) counts as glass.
    density = -np.log10(np.maximum(rgb, 1).astype(np.float32) / 255.0)
    padding = (rgb == 0).all(axis=0)
    density[:, padding] = 0
    # Haematoxylin absorbs red, eosin green: the darker of the two shows both.
    stain = np.maximum(density[0], density[1])
    sigma = TEXTURE_UM / mpp_level
    mean = ndimage.gaussian_filter(stain, sigma)
    texture = np.sqrt(np.maximum(ndimage.gaussian_filter(stain**2, sigma) - mean**2, 0))

    glass = _glass(stain, texture, mpp_level)
    excess = mean - glass
    mask = np.zeros(stain.shape, dtype=bool)
    for least_texture, least_excess in SIGNS:
        mask |= (texture >= least_texture) & (excess > least_excess)
    if padding.any():
        mask &= ~ndimage.binary_dilation(padding, iterations=max(1, round(2 * sigma)))
    # Texture spreads over its window: what counts lies beside pixels that are darker than glass themselves.
    dark = ndimage.gaussian_filter(stain, 3 / mpp_level) - glass > 0.05
    mask &= ndimage.distance_transform_edt(~dark) * mpp_level <= 6
    mask = _closing(mask, max(1, round(20 / mpp_level)))
    pixel = mpp_level**2
    island = min(ISLAND_UM2 / pixel, 0.02 * mask.size)
    mask = remove_small_objects(mask, max_size=int(island))
    # A gap that reaches the border of the picture is open glass, not a hole.
    framed = np.pad(~mask, 1, constant_values=True)
    labels, _ = ndimage.label(framed)
    holes = framed & (labels != labels[0, 0])
    filled = holes & ~remove_small_objects(holes, max_size=int(HOLE_UM2 / pixel))
    return mask | filled[1:-1, 1:-1]


def _glass(stain: np.ndarray, texture: np.ndarray, mpp: float) -> np.ndarray | float:
    """Optical density of empty glass at each pixel, from the smooth and bright parts of the picture."""
    smooth = (texture < SIGNS[1][0]) & (stain < 0.25)
    if smooth.mean() < 0.002:
        return 0.02  # tissue everywhere: a clean white
    histogram, edges = np.histogram(stain[smooth], bins=125, range=(0, 0.25))
    histogram = ndimage.gaussian_filter1d(histogram.astype(float), 2)
    usual = edges[int(histogram.argmax())]
    empty = smooth & (np.abs(stain - usual) < 0.09)
    sigma = min(400 / mpp, max(stain.shape) / 4)
    step = max(1, int(sigma // 8))  # a field this smooth needs few pixels
    weight = ndimage.gaussian_filter(empty[::step, ::step].astype(np.float32), sigma / step)
    total = ndimage.gaussian_filter(np.where(empty, stain, 0).astype(np.float32)[::step, ::step], sigma / step)
    prior = 0.02  # far from any glass, the usual value
    field = (total + prior * usual) / (weight + prior)
    zoom = np.array(stain.shape) / field.shape
    return ndimage.zoom(field, zoom, order=1, grid_mode=True, mode="nearest")[: stain.shape[0], : stain.shape[1]]


def _closing(mask: np.ndarray, radius: int) -> np.ndarray:
    from skimage.morphology import disk

    padded = np.pad(mask, radius, mode="edge")
    closed = ndimage.binary_closing(padded, disk(radius))
    return closed[radius:-radius, radius:-radius]
