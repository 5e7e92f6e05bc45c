"""Find the tissue in a picture of a slide."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# Width (µm) of the window in which texture is measured: it spans nuclei and fibres, and still fits thin strands.
TEXTURE_UM = 14.0
# Tissue has at least one of these pairs: texture (local standard deviation of optical density), and mean density above
# the glass. Measured: glass and smears of eosin stay below 0.009 of texture, pale and even brain is at 0.012 and more.
SIGNS = ((0.025, 0.02), (0.011, 0.05), (0.0, 0.16))
# Islands smaller than this (µm²), or than a share of a small picture, are debris or fiducial marks; holes smaller than
# this (µm²) are lumina and fat.
ISLAND_UM2, ISLAND_SHARE = 30_000.0, 0.02
HOLE_UM2 = 60_000.0


def compute_mask(level_array: np.ndarray, mpp_level: float) -> np.ndarray:
    """Find tissue in the pixels of a slide.

    Parameters
    ----------
    level_array
        RGB, ``uint8 (3, y, x)``, at a few µm/px.
    mpp_level
        Pixel size of ``level_array`` (µm/px).

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
    island = min(ISLAND_UM2 / pixel, ISLAND_SHARE * mask.size)
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
