"""Read a slide in model pixels: the level to read, reduced by area or enlarged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import sparse

from pixnet._core.slide.grid import ModelGrid
from pixnet._core.slide.resample import area_weights, linear_weights
from pixnet._core.stored import check_stored

WHITE = 255


def resample_weights(start: int, stop: int, factor: float, size: int) -> tuple[int, int, sparse.csr_array]:
    """Return the source pixels of an axis that model pixels need, and their weights.

    Reducing takes exact area means, enlarging interpolates linearly between pixel centres. Both depend on the position
    on the slide alone, never on the window that is read.

    Parameters
    ----------
    start, stop
        Range in model pixels, inside the slide.
    factor
        Source pixels per model pixel.
    size
        Length of the axis in source pixels.

    Returns
    -------
    first, last
        Range of source pixels.
    weights
        Matrix ``(stop - start, last - first)`` float32 whose rows add up to 1.
    """
    if factor >= 1:
        first, last = math.floor(start * factor), min(math.ceil(stop * factor - 1e-9), size)
        weights = area_weights(start, stop, first, last, factor, size)
    else:
        first = max(math.floor((start + 0.5) * factor - 0.5), 0)
        last = min(math.floor((stop - 0.5) * factor - 0.5) + 2, size)
        weights = linear_weights(start, stop, first, last, factor)
    weights.data /= np.repeat(weights.sum(axis=1), np.diff(weights.indptr))
    return first, last, weights.astype(np.float32)


def fetch(array: Any, y: slice, x: slice) -> np.ndarray:
    """Read part of an array ``(c, y, x)`` (numpy, zarr, dask or xarray), in this thread."""
    part = array[:, y, x]
    part = getattr(part, "data", part) if not isinstance(part, np.ndarray) else part
    if hasattr(part, "compute"):
        part = part.compute(scheduler="synchronous")
    return np.asarray(part)


class ReadError(RuntimeError):
    """A part of a slide that could not be read."""


class SlideReader:
    """Reads a slide in model pixels.

    Parameters
    ----------
    array
        Pixels of the level that the grid reads, ``(3, y, x)`` uint8: numpy, zarr or dask.
    grid
        The grid.
    name
        Name of the slide, for messages.
    """

    def __init__(self, array: Any, grid: ModelGrid, name: str = "image") -> None:
        self.array = array
        self.grid = grid
        self.name = name

    def check(self) -> None:
        """Refuse the slide if what was read came from a store that is gone or was replaced; call it after reading."""
        check_stored(self.array, f"image {self.name!r}")

    def read(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return a window ``(3, height, width)`` uint8 in model pixels; white where it lies outside the slide.

        Raises
        ------
        ReadError
            If the image cannot be read there; the message says which of its pixels.
        """
        out = np.full((3, height, width), WHITE, np.uint8)
        (rows, cols), margin = self.grid.shape, self.grid.margin
        y0, x0, rows, cols = y0 - margin[0], x0 - margin[1], rows - margin[0], cols - margin[1]
        top, bottom = max(y0, 0), min(y0 + height, rows)
        left, right = max(x0, 0), min(x0 + width, cols)
        if top < bottom and left < right:
            try:
                out[:, top - y0 : bottom - y0, left - x0 : right - x0] = self._inside(top, bottom, left, right)
            except Exception as error:  # whatever a storage format raises
                (py, px), name = self.grid.px, self.name
                raise ReadError(
                    f"pixels y {top * py:.0f} to {bottom * py:.0f}, x {left * px:.0f} to {right * px:.0f} of image {name!r} "
                    f"could not be read ({type(error).__name__}: {error}). If the file is damaged there, write the image "
                    "again from its source; an interrupted prediction continues with resume=True"
                ) from error
        return out

    def _inside(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        fy, fx = self.grid.factor
        if fy == 1 and fx == 1:
            return fetch(self.array, slice(top, bottom), slice(left, right))
        size_y, size_x = self.array.shape[-2:]
        y_first, y_last, wy = resample_weights(top, bottom, fy, size_y)
        x_first, x_last, wx = resample_weights(left, right, fx, size_x)
        pixels = fetch(self.array, slice(y_first, y_last), slice(x_first, x_last)).astype(np.float32)
        c, h, w = pixels.shape
        pixels = (wy @ pixels.transpose(1, 0, 2).reshape(h, c * w)).reshape(-1, c, w)
        pixels = (wx @ pixels.transpose(2, 0, 1).reshape(w, -1)).reshape(right - left, bottom - top, c)
        return np.rint(pixels.transpose(2, 1, 0)).astype(np.uint8)
