"""From a slide's pyramid to the pixels a model sees: which level to read, how to resize, which windows there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

SNAP = 0.02
"""Factors this close to a whole number are taken as whole: pixels are used as they are, geometry stays exact."""

MAX_ENLARGE = 2.0
"""A slide may be this many times coarser than the model."""

WHITE = 255


@dataclass(frozen=True)
class ModelGrid:
    """A slide as a model sees it: a grid of model pixels over one level of the pyramid, anchored at the origin.

    Attributes
    ----------
    level
        The level that is read.
    factor
        Pixels of that level per model pixel, ``(y, x)``; below 1 the slide is enlarged.
    px
        Level-0 pixels per model pixel, ``(y, x)``.
    shape
        Size in model pixels, ``(y, x)``; the last row and column may reach over the slide's edge.
    stride
        Model pixels per output pixel.
    mpp
        um per model pixel on this slide.
    """

    level: int
    factor: tuple[float, float]
    px: tuple[float, float]
    shape: tuple[int, int]
    stride: int
    mpp: float

    @property
    def enlarged(self) -> bool:
        """Whether the slide is coarser than the model."""
        return min(self.factor) < 1

    @property
    def out_shape(self) -> tuple[int, int]:
        """Size in output pixels, ``(y, x)``."""
        return math.ceil(self.shape[0] / self.stride), math.ceil(self.shape[1] / self.stride)

    @property
    def out_px(self) -> tuple[float, float]:
        """Level-0 pixels per output pixel, ``(y, x)``."""
        return self.px[0] * self.stride, self.px[1] * self.stride

    @property
    def to_out(self) -> np.ndarray:
        """Matrix ``(3, 3)`` that takes ``(x, y, 1)`` from level-0 to output pixels."""
        return np.diag([1 / self.out_px[1], 1 / self.out_px[0], 1.0])


def snap(factor: float) -> float:
    """Return the whole number that a factor is close to, else the factor."""
    whole = round(factor)
    return float(whole) if whole >= 1 and abs(factor / whole - 1) <= SNAP else factor


def choose_grid(
    scales: Sequence[tuple[float, float]],
    shapes: Sequence[tuple[int, int]],
    slide_mpp: float,
    model_mpp: float,
    stride: int,
) -> ModelGrid:
    """Return the grid on which a model of ``model_mpp`` sees a slide.

    The coarsest level that is at least as fine as the model is read and reduced by area; where the slide itself is
    coarser, level 0 is enlarged.

    Parameters
    ----------
    scales
        Level-0 pixels per pixel of each level, ``(y, x)``, finest first.
    shapes
        Size of each level in its pixels, ``(y, x)``.
    slide_mpp, model_mpp
        um per pixel of level 0, and of the model's input.
    stride
        Model pixels per output pixel.

    Raises
    ------
    ValueError
        If the slide is more than 2 times coarser than the model.
    """
    if slide_mpp / model_mpp > MAX_ENLARGE * (1 + SNAP):
        raise ValueError(
            f"the slide has {slide_mpp:g} um/px, more than {MAX_ENLARGE:g} times coarser than the {model_mpp:g} um/px of the "
            "model: detail the model needs is not there. Use a finer image of the slide, or a model trained at a coarser "
            "um/px (pixnet.tl.train(..., mpp=...)); if the slide's um/px is wrong, mend it with pixnet.pp.set_mpp"
        )
    level = 0
    for i, scale in enumerate(scales):
        if max(scale) * slide_mpp <= model_mpp * (1 + SNAP):
            level = i
    fy, fx = (snap(model_mpp / (slide_mpp * s)) for s in scales[level])
    sy, sx = scales[level]
    height, width = shapes[level]
    shape = (math.ceil(height / fy - 1e-6), math.ceil(width / fx - 1e-6))
    return ModelGrid(level, (fy, fx), (fy * sy, fx * sx), shape, stride, fx * sx * slide_mpp)


def resample_weights(start: int, stop: int, factor: float, size: int) -> tuple[int, int, sparse.csr_array]:
    """Return which pixels of an axis the model pixels ``start`` to ``stop`` need, and their weights.

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
        Matrix ``(stop - start, last - first)`` whose rows add up to 1.
    """
    i = np.arange(start, stop)
    if factor >= 1:
        lo, hi = i * factor, np.minimum((i + 1) * factor, size)
        first, last = int(lo[0]), min(math.ceil(hi[-1] - 1e-9), size)
        n = math.ceil(factor) + 1
        cols = np.floor(lo).astype(int)[:, None] + np.arange(n)
        w = np.clip(np.minimum(cols + 1, hi[:, None]) - np.maximum(cols, lo[:, None]), 0, None)
    else:
        centre = (i + 0.5) * factor - 0.5
        base = np.floor(centre).astype(int)
        frac = centre - base
        cols = np.stack([base, base + 1], axis=1)
        w = np.stack([1 - frac, frac], axis=1)
        cols = np.clip(cols, 0, size - 1)
        first, last = int(cols.min()), int(cols.max()) + 1
    w = w / w.sum(axis=1, keepdims=True)
    rows = np.broadcast_to((i - start)[:, None], cols.shape)
    keep = (w > 0) & (cols >= first) & (cols < last)
    matrix = sparse.coo_array(
        (w[keep].astype(np.float32), (rows[keep], cols[keep] - first)), shape=(stop - start, last - first)
    )
    return first, last, matrix.tocsr()


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

    def read(self, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """Return a window ``(3, height, width)`` uint8 in model pixels; white where it lies outside the slide.

        Raises
        ------
        ReadError
            If the image cannot be read there; the message says which of its pixels.
        """
        out = np.full((3, height, width), WHITE, np.uint8)
        rows, cols = self.grid.shape
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
                    "again from its source; an interrupted prediction goes on with resume=True"
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


def window_grid(shape: tuple[int, int], window: int) -> tuple[int, int]:
    """Return how many windows of ``window`` model pixels a grid of ``shape`` has, ``(y, x)``."""
    return math.ceil(shape[0] / window), math.ceil(shape[1] / window)
