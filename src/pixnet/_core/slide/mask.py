"""The output pixels of a model that are tissue."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from scipy import sparse


class TissueMask:
    """A tissue mask of any resolution, asked per output pixel: tissue when at least half of the pixel is.

    Parameters
    ----------
    mask
        ``(y, x)``, nonzero on tissue: numpy or dask; read into memory (a bit per pixel would do, a byte is kept).
    to_mask
        Matrix ``(3, 3)`` that takes ``(x, y, 1)`` from output pixels to mask pixels; any affine.
    masked
        Whether the mask tells tissue from glass. False: it is one pixel that covers the whole slide.
    """

    def __init__(self, mask: Any, to_mask: np.ndarray, masked: bool = True) -> None:
        mask = np.asarray(mask)
        self.mask = mask if mask.dtype == bool else mask != 0
        self.to_mask = np.asarray(to_mask, dtype=float)
        self.masked = masked

    @classmethod
    def everywhere(cls, shape: tuple[float, float]) -> TissueMask:
        """Return the mask of a slide that is all tissue, of ``shape`` output pixels (y, x), whole numbers or not."""
        return cls(np.ones((1, 1), bool), np.diag([1 / shape[1], 1 / shape[0], 1.0]), masked=False)

    def coarser(self, ratio: float) -> TissueMask:
        """Return the same mask, asked per pixel ``ratio`` times larger."""
        return TissueMask(self.mask, self.to_mask @ np.diag([ratio, ratio, 1.0]), self.masked)

    def any(self) -> bool:
        """Whether there is any tissue, on the slide or beside it."""
        return bool(self.mask.any())

    def near(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Whether a window of output pixels may hold tissue: quick, and never False where there is some."""
        corners = np.array([[x, y, 1] for y in (y0, y0 + height) for x in (x0, x0 + width)])
        x, y, _ = self.to_mask @ corners.T
        rows = slice(max(int(np.floor(y.min())) - 1, 0), max(int(np.ceil(y.max())) + 1, 0))
        columns = slice(max(int(np.floor(x.min())) - 1, 0), max(int(np.ceil(x.max())) + 1, 0))
        return bool(self.mask[rows, columns].any())

    def fingerprint(self) -> str:
        """Return a hash of the mask and of its place."""
        return hashlib.sha256(np.packbits(self.mask).tobytes() + self.to_mask.tobytes()).hexdigest()

    def window(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return tissue ``(height, width)`` bool of a window of output pixels; nothing is tissue outside the mask."""
        if not self.masked:
            return self._on_slide(y0, x0, height, width)
        linear = self.to_mask[:2, :2]
        # Sample points per pixel and axis: a multiple of the mask's pixels in it, so that aligned masks are counted
        # exactly.
        whole = max(1, math.ceil(np.abs(linear).sum(axis=0).max() - 1e-6))
        k = whole * max(1, math.ceil(4 / whole))
        out = np.empty((height, width), dtype=bool)
        rows = max(1, int(4e6 // max(1, width * k * k)))  # bounds what is held at once
        for start in range(0, height, rows):
            part = y0 + start, x0, min(rows, height - start), width
            counts = self._upright(*part, k) if not linear[0, 1] and not linear[1, 0] else self._turned(*part, k)
            out[start : start + rows] = counts >= 0.5 * k * k
        return out

    def _on_slide(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return the pixels of a window of which at least half lies on the slide."""
        inside = []
        for axis, start, size in ((1, y0, height), (0, x0, width)):
            scale, shift = self.to_mask[axis, axis], self.to_mask[axis, 2]
            first, last, pixels = -shift / scale, (1 - shift) / scale, np.arange(start, start + size)
            inside.append(np.clip(np.minimum(last, pixels + 1) - np.maximum(first, pixels), 0, 1))
        return inside[0][:, None] * inside[1][None, :] >= 0.5 - 1e-9

    def _upright(self, y0: int, x0: int, height: int, width: int, k: int) -> np.ndarray:
        """Return how many of ``k`` x ``k`` points in each pixel are tissue, where the mask is not rotated: rows times columns."""
        points, seen = [], []
        for axis, start, size in ((1, y0, height), (0, x0, width)):
            at = start + (np.arange(size * k) + 0.5) / k
            found = np.floor(self.to_mask[axis, axis] * at + self.to_mask[axis, 2] + 1e-9).astype(int)
            inside = np.flatnonzero((found >= 0) & (found < self.mask.shape[1 - axis]))
            first, last = (found[inside].min(), found[inside].max() + 1) if len(inside) else (0, 0)
            entries = np.ones(len(inside), np.float32), (inside // k, found[inside] - first)
            points.append(sparse.csr_array(entries, shape=(size, last - first)))
            seen.append(slice(first, last))
        return (points[1] @ (points[0] @ self.mask[*seen].astype(np.float32)).T).T

    def _turned(self, y0: int, x0: int, height: int, width: int, k: int) -> np.ndarray:
        """Return how many of ``k`` x ``k`` points in each pixel are tissue, for any affine."""
        ys = y0 + (np.arange(height * k) + 0.5) / k
        xs = x0 + (np.arange(width * k) + 0.5) / k
        (a, b, c), (d, e, f) = self.to_mask[0], self.to_mask[1]
        rows, cols = self.mask.shape
        j = np.floor(a * xs[None, :] + b * ys[:, None] + c + 1e-9).astype(int)
        i = np.floor(d * xs[None, :] + e * ys[:, None] + f + 1e-9).astype(int)
        inside = (i >= 0) & (i < rows) & (j >= 0) & (j < cols)
        found = np.zeros(inside.shape, dtype=bool)
        found[inside] = self.mask[i[inside], j[inside]]
        return found.reshape(height, k, width, k).sum(axis=(1, 3))
