"""A tissue mask, limited to a region of the slide."""

from __future__ import annotations

import numpy as np

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.slide.mask import TissueMask

BAND = 2_000_000
"""Pixels whose coverage is computed at once."""


class RegionMask(TissueMask):
    """The tissue of all map pixels that a region touches.

    Parameters
    ----------
    mask
        Tissue, asked per model output pixel.
    region
        The shapes of the region, in pixels of the map.
    ratio
        Model output pixels per map pixel: those behind a map pixel are all in, or none.
    """

    def __init__(self, mask: TissueMask, region: ShapeArrays, ratio: float) -> None:
        super().__init__(mask.mask, mask.to_mask, mask.masked)
        self.region, self.ratio = region, ratio

    def coarser(self, ratio: float) -> RegionMask:
        """Return the same mask, asked per pixel ``ratio`` times larger."""
        return RegionMask(super().coarser(ratio), self.region, self.ratio / ratio)

    def near(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Whether a window of pixels may hold tissue of the region: quick, and never False where there is some."""
        y, ny = self._map_range(y0, height)
        x, nx = self._map_range(x0, width)
        left, top, right, bottom = self.region.bounds.T
        near = (left < x + nx) & (right > x) & (top < y + ny) & (bottom > y)
        return bool(near.any()) and super().near(y0, x0, height, width)

    def window(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return tissue of the region ``(height, width)`` bool of a window of pixels."""
        tissue = super().window(y0, x0, height, width)
        if not tissue.any():
            return tissue
        y, ny = self._map_range(y0, height)
        x, nx = self._map_range(x0, width)
        touched = self._touched(y, x, ny, nx)
        if self.ratio == 1:
            return tissue & touched
        # A pixel between two map pixels is needed by both.
        found = np.zeros_like(tissue)
        for rows in self._behind(y0, height):
            for columns in self._behind(x0, width):
                found |= touched[np.ix_(rows - y, columns - x)]
        return tissue & found

    def _touched(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return the map pixels of a window of which some part lies in the region."""
        touched = np.zeros((height, width), bool)
        band = max(BAND // max(width, 1), 1)
        for start in range(0, height, band):
            part = touched[start : start + band]
            part.ravel()[coverage(self.region, (y0 + start, x0, *part.shape)).indices] = True
        return touched

    def _map_range(self, start: int, size: int) -> tuple[int, int]:
        """Return the first map pixel that a range of pixels touches, and how many there are."""
        first, last = (ends[[0, -1]] for ends in self._behind(start, size))
        return int(first[0]), int(last[1] - first[0] + 1)

    def _behind(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last map pixel that each pixel of a range touches."""
        pixels = np.arange(start, start + max(size, 1))
        first = np.floor((pixels + 1e-6) / self.ratio).astype(int)
        return first, np.maximum(np.ceil((pixels + 1) / self.ratio - 1e-6).astype(int) - 1, first)
