"""Nuclei on H&E, tile by tile: found by their haematoxylin, grown to cells, outlined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from pixnet._core.slide.reader import SlideReader
from pixnet._core.slide.stain import Samples, optical_density

Method = Callable[[NDArray[np.uint8]], NDArray[np.integer]]
"""Takes RGB ``(y, x, 3)`` and returns the number of the nucleus (or cell) of each pixel, 0 where there is none."""

HALO_UM = 64.0
"""Tiles see this much around them: more than a nucleus and all filters together."""
MARGIN_UM = 3.0
"""A method may see a cell's centre this far apart in two tiles."""


@dataclass(frozen=True)
class Watershed:
    """Nuclei where haematoxylin absorbs more than around, cut apart between their dark centres.

    Every step looks only a few µm around a pixel, so that the result does not depend on the tiles.

    Attributes
    ----------
    threshold
        Optical density (red light) that tells nuclei from the rest of this slide, smoothed.
    mpp
        Pixel size (µm/px).
    """

    threshold: float
    mpp: float

    # All found on sections of her2st and on H&E of other laboratories, by their overlays. Lengths in µm.
    SMOOTH, SURROUNDINGS, CENTRE, APART = 0.6, 10.0, 1.9, 2.5
    PALEST = 0.12  # also on a slide without nuclei
    FLOOR = 0.65  # of the threshold: no nucleus is paler, wherever it is
    DEPTH, DEPTH_WEIGHT = 3.0, 0.35
    AREA_UM2 = (12.0, 400.0)
    HOLE_UM2 = 20.0

    @classmethod
    def fitted(cls, samples: Samples, mpp: float) -> Watershed:
        """Find the threshold of a slide from samples of its tissue (`stain.sample`)."""
        from skimage.filters import threshold_otsu

        parts = [_smooth(optical_density(pixels)[0], cls.SMOOTH / mpp)[tissue] for pixels, tissue in samples]
        values = np.concatenate([part for part in parts if part.size] or [np.zeros(1, np.float32)])
        return cls(max(float(threshold_otsu(values)), cls.PALEST) if np.ptp(values) > 0 else cls.PALEST, mpp)

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Return the nuclei of a tile, as `Method` does."""
        from skimage.morphology import disk, remove_small_holes
        from skimage.segmentation import watershed

        red, green, blue = optical_density(rgb.transpose(2, 0, 1))
        haematoxylin = _smooth(red, self.SMOOTH / self.mpp)  # eosin hardly absorbs red
        around = ndimage.gaussian_filter(red, self.SURROUNDINGS / self.mpp, truncate=3)
        nuclei = haematoxylin > np.maximum(self.FLOOR * self.threshold, (self.threshold + around) / 2)
        nuclei = remove_small_holes(nuclei, max_size=int(self.HOLE_UM2 / self.mpp**2))
        nuclei = ndimage.binary_opening(nuclei, structure=np.ones((3, 3)))
        if not nuclei.any():
            return np.zeros(rgb.shape[:2], np.int32)
        # A centre is dark in its middle (blob filter), or far from the border where nuclei are too dark to tell.
        size = self.CENTRE / self.mpp
        blobs = -ndimage.gaussian_laplace(red + green / 2, size) * size**2 / self.threshold
        depth = np.minimum(ndimage.distance_transform_edt(nuclei) * self.mpp, self.DEPTH).astype(np.float32)
        score = blobs + self.DEPTH_WEIGHT * _smooth(depth, 1 / self.mpp)
        highest = ndimage.maximum_filter(score, footprint=disk(round(self.APART / self.mpp)))
        seeds, n = ndimage.label((score == highest) & nuclei, structure=np.ones((3, 3)))
        labels = watershed(-score, seeds, mask=nuclei)
        numbers = np.arange(n + 1)
        area = np.bincount(labels.ravel(), minlength=n + 1) * self.mpp**2
        darkness = ndimage.mean(haematoxylin, labels, numbers)
        contrast = ndimage.mean(haematoxylin - around, labels, numbers)
        # Pigment, rust and red blood cells absorb blue light more than red.
        reddish = ndimage.mean(blue - 1.1 * red, labels, numbers) > 0
        faint = (contrast < 0.12 * self.threshold) & (darkness < 1.6 * self.threshold)
        wrong = (area < self.AREA_UM2[0]) | (area > self.AREA_UM2[1]) | faint | reddish
        labels[wrong[labels]] = 0
        return labels


def _smooth(values: NDArray, sigma: float) -> NDArray:
    return ndimage.gaussian_filter(values, sigma)


@dataclass(frozen=True)
class Found:
    """Cells of a tile, or of a slide.

    Attributes
    ----------
    polygons
        In level-0 pixels of the slide.
    centres
        Centres of what the method found, ``(n, 2)``, ``(y, x)`` in the pixels that it saw.
    """

    polygons: NDArray[np.object_]
    centres: NDArray[np.float64]


def segment_tile(reader: SlideReader, method: Method, tile: int, expand_um: float, y0: int, x0: int) -> Found:
    """Return the cells whose centre is in a tile, or within the margin around it.

    Parameters
    ----------
    reader
        Reads the slide at the pixel size that the method wants.
    method
        Finds nuclei or cells.
    tile
        Edge of the tile, in those pixels.
    expand_um
        How far cells reach over what the method finds (µm).
    y0, x0
        Origin of the tile.
    """
    from skimage.segmentation import expand_labels

    mpp = reader.grid.mpp
    halo = round(HALO_UM / mpp)
    window = reader.read(y0 - halo, x0 - halo, tile + 2 * halo, tile + 2 * halo)
    rgb = np.ascontiguousarray(window.transpose(1, 2, 0))
    labels = _checked(method(rgb), rgb.shape[:2])
    cells = expand_labels(labels, expand_um / mpp) if expand_um else labels
    boxes = ndimage.find_objects(cells)
    numbers = np.array([i for i, box in enumerate(boxes, 1) if box is not None], dtype=np.int64)
    if not numbers.size:
        return Found(np.empty(0, object), np.empty((0, 2)))
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, numbers)) - halo + 0.5
    margin = MARGIN_UM / mpp
    mine = ((centres >= -margin) & (centres < tile + margin)).all(axis=1)
    polygons = [_outline(cells, number, boxes[number - 1]) for number in numbers[mine]]
    shapes = np.array([shapely.Polygon(p) if len(p) > 3 else None for p in polygons], dtype=object)
    kept = ~shapely.is_missing(shapes)
    px = np.array(reader.grid.px)[::-1]
    shift = np.array([x0 - halo, y0 - halo])
    # Corners of a staircase are left out, up to a third of a pixel.
    shapes = shapely.simplify(shapes[kept], 0.35)
    shapes = shapely.transform(shapes, lambda xy: (xy + shift) * px)
    return Found(shapes, centres[mine][kept] + [y0, x0])


def _checked(labels: Any, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Refuse what is not a number for each pixel."""
    labels = np.asarray(labels)
    if labels.shape != shape or labels.dtype.kind not in "iu":
        raise TypeError(
            f"method returned {labels.dtype} {labels.shape} for a tile of {shape[0]} x {shape[1]} px; it should return integers "
            "(y, x) of the same size, the number of the nucleus of each pixel and 0 elsewhere"
        )
    return labels.astype(np.int64)


def _outline(cells: NDArray, number: int, box: tuple[slice, slice]) -> NDArray[np.float64]:
    """Return the outer ring of a cell ``(n, 2)`` in x and y; pixel ``j`` covers ``[j, j + 1)``."""
    from skimage.measure import find_contours

    inside = np.pad(cells[box] == number, 1)
    ring = max(find_contours(inside.astype(np.uint8), 0.5), key=len)
    return ring[:, ::-1] - 0.5 + [box[1].start, box[0].start]


def joined(parts: list[Found]) -> Found:
    """Return the cells of all tiles in order down the slide, each once: two tiles may both have found one between them."""
    polygons = np.concatenate([part.polygons for part in parts]) if parts else np.empty(0, object)
    centres = np.concatenate([part.centres for part in parts]) if parts else np.empty((0, 2))
    order = np.lexsort((centres[:, 1], centres[:, 0]))
    tile = np.repeat(np.arange(len(parts)), [len(part.polygons) for part in parts])[order]
    polygons, centres = polygons[order], centres[order]
    a, b = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    rivals = (a < b) & (tile[a] != tile[b])
    a, b = a[rivals], b[rivals]
    area = shapely.area(polygons)
    same = shapely.area(shapely.intersection(polygons[a], polygons[b])) > 0.5 * np.minimum(area[a], area[b])
    kept = np.ones(len(polygons), dtype=bool)
    for first, second in zip(a[same], b[same]):  # in order, so that a cell that is left out leaves no other out
        if kept[first]:
            kept[second] = False
    return Found(polygons[kept], centres[kept])
