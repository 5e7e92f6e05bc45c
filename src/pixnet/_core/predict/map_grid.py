"""Where the tiles of a map lie: output pixels, the windows of the model behind them, and exact area means of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pixnet._core.slide.grid import ModelGrid

FINEST = 1 - 1e-6
CHUNK = 256
"""Chunks of a stored map have at most this many pixels a side."""


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class MapGrid:
    """The tiles of a map over a model's grid.

    Attributes
    ----------
    grid
        The slide in model pixels.
    window, halo
        The model's windows, anchored at the slide's origin, and what they see beyond their edges, in model pixels.
    ratio
        Model output pixels per map pixel, at least 1.
    tile
        Map pixels per tile, along both axes.
    """

    grid: ModelGrid
    window: int
    halo: int
    ratio: float
    tile: int

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the map ``(y, x)``."""
        stride = self.grid.stride
        return tuple(math.ceil(n / (stride * self.ratio) - 1e-6) for n in self.grid.shape)

    @property
    def px(self) -> tuple[float, float]:
        """Level-0 pixels per map pixel, ``(y, x)``."""
        return self.grid.out_px[0] * self.ratio, self.grid.out_px[1] * self.ratio

    @property
    def mpp(self) -> float:
        """Size of a map pixel in um."""
        return self.grid.mpp * self.grid.stride * self.ratio

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles ``(y, x)``."""
        return tuple(math.ceil(n / self.tile) for n in self.shape)

    @property
    def chunk(self) -> int:
        """Pixels a side of the chunks that a map of this layout is stored in; every tile is made of whole ones."""
        return next(n for n in range(min(CHUNK, self.tile), 0, -1) if self.tile % n == 0)

    @property
    def core(self) -> int:
        """Model output pixels a side of a window, without its halo."""
        return self.window // self.grid.stride

    def box(self, i: int, j: int) -> Box:
        """Return the map pixels of tile ``(i, j)``."""
        y, x = i * self.tile, j * self.tile
        return Box(y, x, min(self.tile, self.shape[0] - y), min(self.tile, self.shape[1] - x))

    def fine(self, box: Box) -> Box:
        """Return the model output pixels behind a box of map pixels."""
        bounds = []
        for start, n, size in ((box.y, box.height, 0), (box.x, box.width, 1)):
            first = math.floor(start * self.ratio + 1e-6)
            last = math.ceil((start + n) * self.ratio - 1e-6)
            bounds.append((first, min(last, self.grid.out_shape[size])))
        (y0, y1), (x0, x1) = bounds
        return Box(y0, x0, y1 - y0, x1 - x0)

    def windows(self, fine: Box) -> Iterator[tuple[int, int]]:
        """Return the windows that a box of model output pixels touches, row by row."""
        for i in range(fine.y // self.core, -(-(fine.y + fine.height) // self.core)):
            for j in range(fine.x // self.core, -(-(fine.x + fine.width) // self.core)):
                yield i, j

    def shares(self, axis: int, start: int, n: int, first: int, size: int) -> np.ndarray:
        """Return how much of each model output pixel lies in each map pixel, along one axis: ``(n, size)`` float32.

        Parameters
        ----------
        axis
            0 for y, 1 for x.
        start, n
            Range of map pixels.
        first, size
            Range of model output pixels.
        """
        cell = np.arange(start, start + n)[:, None] * self.ratio
        pixel = np.arange(first, first + size)[None, :]
        # The last pixel may reach over the edge of the slide: only its part inside counts.
        end = np.minimum(pixel + 1, self.grid.shape[axis] / self.grid.stride)
        overlap = np.minimum(cell + self.ratio, end) - np.maximum(cell, pixel)
        return np.where(overlap > 1e-9, overlap, 0).astype(np.float32)


def choose_map_grid(
    grid: ModelGrid, window: int, halo: int, out_mpp: float | None, tile_size: int | None, wide: bool = False
) -> MapGrid:
    """Return the layout of a map.

    Parameters
    ----------
    grid
        The slide in model pixels.
    window, halo
        Of the model.
    out_mpp
        um per map pixel; None: the model's own.
    tile_size
        Model pixels a side of a tile; rounded up to whole windows. None: about 256 model output pixels.
    wide
        Take four times larger tiles by default, so that a GPU gets several windows at once.

    Raises
    ------
    ValueError
        If ``out_mpp`` is finer than the model's output.
    """
    finest = grid.mpp * grid.stride
    ratio = 1.0 if out_mpp is None else out_mpp / finest
    if ratio < 1 - 1e-3:
        raise ValueError(
            f"out_mpp is {out_mpp:g}; the model answers at {finest:.4g} um/px on this slide and cannot be finer: "
            f"leave out_mpp at None, or train with a smaller stride or mpp"
        )
    if abs(ratio - round(ratio)) < 1e-6 * ratio or ratio < 1:
        ratio = float(max(round(ratio), 1))
    core = window // grid.stride
    aligned = core % ratio == 0
    if tile_size is None:
        # Where map pixels straddle windows, those at a tile's edges run twice: larger tiles make that rare.
        pixels = CHUNK * (2 if wide else 1) if aligned and ratio == 1 else 8 * core
        tile_size = min(pixels * grid.stride, max(grid.shape))
    windows = max(1, math.ceil(tile_size / window))
    tile = windows * core / ratio
    return MapGrid(grid, window, halo, ratio, int(tile) if aligned else _rounded(tile))


def _rounded(n: float) -> int:
    """Round down to a number with a divisor that suits chunks."""
    n = max(1, int(n))
    for unit in (256, 128, 64, 32):
        if n >= unit:
            return n - n % unit
    return n
