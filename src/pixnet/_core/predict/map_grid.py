"""The tiles of a map, and the model's output pixels and windows behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pixnet._core.slide.grid import ModelGrid

CHUNK = 256
"""Chunks of a stored map have at most this many pixels a side."""


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    y: int
    x: int
    height: int
    width: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """``(y, x, height, width)``."""
        return self.y, self.x, self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def within(self, other: Box) -> Box:
        """Return the same rectangle, counted from the corner of another."""
        return Box(self.y - other.y, self.x - other.x, self.height, self.width)

    def grown(self, n: int) -> Box:
        """Return it with ``n`` pixels more at each edge."""
        return Box(self.y - n, self.x - n, self.height + 2 * n, self.width + 2 * n)

    def clipped(self, other: Box) -> Box:
        """Return the part of it that lies in another."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - y
        return Box(y, x, height, min(self.x + self.width, other.x + other.width) - x)

    def scaled(self, factor: int) -> Box:
        """Return it in pixels ``factor`` times finer."""
        return Box(self.y * factor, self.x * factor, self.height * factor, self.width * factor)

    def divided(self, factor: int) -> Box:
        """Return the pixels ``factor`` times coarser that it touches."""
        y, x = self.y // factor, self.x // factor
        return Box(y, x, -(-(self.y + self.height) // factor) - y, -(-(self.x + self.width) // factor) - x)

    def aligned(self, step: int) -> Box:
        """Return it with its edges moved outwards to multiples of ``step``."""
        return self.divided(step).scaled(step)


@dataclass(frozen=True)
class MapGrid:
    """The tiles of a map over a model's grid.

    Attributes
    ----------
    model_grid
        The slide in model pixels.
    window, halo
        Side of the model's windows, which start at the slide's origin, and the margin that they see beyond their edges,
        in model pixels.
    ratio
        Model output pixels per map pixel, at least 1.
    tile
        Map pixels per tile, along both axes.
    unit, reach
        Of a model whose encoder runs in stages: side of the squares, anchored at the slide's origin, whose features are
        computed together, in model pixels, and the encoder's reach by stage. Tiles are parts of a unit, or whole units.
        Without stages: 0 and None.
    """

    model_grid: ModelGrid
    window: int
    halo: int
    ratio: float
    tile: int
    unit: int = 0
    reach: Mapping[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the map ``(y, x)``."""
        height, width = (math.ceil(n / (self.model_grid.stride * self.ratio) - 1e-6) for n in self.model_grid.shape)
        return height, width

    @property
    def slide_px(self) -> tuple[float, float]:
        """Level-0 pixels of the slide per map pixel, ``(y, x)``."""
        return self.model_grid.out_px[0] * self.ratio, self.model_grid.out_px[1] * self.ratio

    @property
    def mpp(self) -> float:
        """Pixel size of the map (µm/px)."""
        return self.model_grid.mpp * self.model_grid.stride * self.ratio

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles ``(y, x)``."""
        return math.ceil(self.shape[0] / self.tile), math.ceil(self.shape[1] / self.tile)

    @property
    def tile_size(self) -> int:
        """Side of a tile in model pixels, a multiple of the window."""
        return self.window * max(1, round(self.tile * self.ratio / self.out_window))

    @property
    def chunk(self) -> int:
        """Side of the chunks that the map is stored in; every tile is made of whole ones."""
        return next(n for n in range(min(CHUNK, self.tile), 0, -1) if self.tile % n == 0)

    @property
    def out_window(self) -> int:
        """Side of a window in model output pixels, without its halo."""
        return self.window // self.model_grid.stride

    def box(self, i: int, j: int) -> Box:
        """Return the map pixels of tile ``(i, j)``."""
        y, x = i * self.tile, j * self.tile
        return Box(y, x, min(self.tile, self.shape[0] - y), min(self.tile, self.shape[1] - x))

    def out_box(self, box: Box) -> Box:
        """Return the model output pixels behind a box of map pixels."""
        bounds = []
        for start, n, size in zip((box.y, box.x), (box.height, box.width), self.model_grid.out_shape):
            first = math.floor(start * self.ratio + 1e-6)
            bounds.append((first, min(math.ceil((start + n) * self.ratio - 1e-6), size)))
        (y0, y1), (x0, x1) = bounds
        return Box(y0, x0, y1 - y0, x1 - x0)

    def map_box(self, out: Box) -> Box:
        """Return the map pixels that a box of model output pixels touches."""
        bounds = []
        for start, n in ((out.y, out.height), (out.x, out.width)):
            bounds.append((int((start + 1e-6) / self.ratio), math.ceil((start + n) / self.ratio - 1e-6)))
        (y0, y1), (x0, x1) = bounds
        return Box(y0, x0, y1 - y0, x1 - x0)

    def unit_box(self, i: int, j: int) -> Box:
        """Return the model output pixels of a unit."""
        side = self.unit // self.model_grid.stride
        height, width = self.model_grid.out_shape
        return Box(i * side, j * side, side, side).clipped(Box(0, 0, height, width))

    def units(self, out: Box) -> Iterator[tuple[tuple[int, int], Box]]:
        """Return the units that a box of model output pixels touches, row by row, and the part that each has in it."""
        touched = out.divided(self.unit // self.model_grid.stride)
        for i in range(touched.y, touched.y + touched.height):
            for j in range(touched.x, touched.x + touched.width):
                yield (i, j), out.clipped(self.unit_box(i, j))

    def windows(self, out: Box) -> Iterator[tuple[int, int, Box]]:
        """Return the windows that a box of model output pixels touches, row by row, and the part that each has in it."""
        side = self.out_window
        for i in range(out.y // side, -(-(out.y + out.height) // side)):
            for j in range(out.x // side, -(-(out.x + out.width) // side)):
                y0, x0 = max(i * side, out.y), max(j * side, out.x)
                y1, x1 = min((i + 1) * side, out.y + out.height), min((j + 1) * side, out.x + out.width)
                yield i, j, Box(y0, x0, y1 - y0, x1 - x0)


def choose_map_grid(
    grid: ModelGrid,
    window: int,
    halo: int,
    out_mpp: float | None,
    tile_size: int | None,
    wide: bool = False,
    reach: Mapping[int, int] | None = None,
) -> MapGrid:
    """Return the tiles of a map.

    Parameters
    ----------
    grid
        The slide in model pixels.
    window, halo
        Of the model, in its pixels.
    out_mpp
        Pixel size of the map (µm/px); None: the model's own.
    tile_size
        Side of a tile in model pixels; rounded up to whole windows. None: about 256 model output pixels.
    wide
        Take four times larger tiles by default, so that a GPU gets several windows at once.
    reach
        Of the model's encoder, where it runs in stages.

    Raises
    ------
    ValueError
        If ``out_mpp`` is finer than the model's output.
    """
    finest = grid.mpp * grid.stride
    ratio = 1.0 if out_mpp is None else out_mpp / finest
    if ratio < 1 - 1e-3:
        raise ValueError(
            f"out_mpp is {out_mpp:g}; the model's output has {finest:.4g} µm/px on this slide, and a map cannot be finer: "
            "leave out_mpp at None, or train with a smaller stride or mpp"
        )
    if abs(ratio - round(ratio)) < 1e-6 * ratio or ratio < 1:
        ratio = float(max(round(ratio), 1))
    out_window = window // grid.stride
    aligned = out_window % ratio == 0
    if tile_size is None:
        # Where map pixels straddle windows, those at a tile's edges run twice: larger tiles make that rare.
        pixels = CHUNK * (2 if wide else 1) if aligned and ratio == 1 else 8 * out_window
        tile_size = min(pixels * grid.stride, max(grid.shape))
        if reach is not None and not aligned:
            tile_size = 4 * window
    windows = max(1, math.ceil(tile_size / window))
    unit = 0
    if reach is not None:
        unit = _unit(window, reach, max(grid.shape))
        shared = _shared_unit(unit, grid.stride, ratio)
        if not aligned and shared is not None:  # tiles of whole units
            tile = max(1, tile_size // shared) * shared / (grid.stride * ratio)
            return MapGrid(grid, window, halo, ratio, int(tile), shared, reach)
        whole = unit // window
        windows = windows if windows < whole else -(-windows // whole) * whole
    tile = windows * out_window / ratio
    return MapGrid(grid, window, halo, ratio, int(tile) if aligned else _rounded(tile), unit, reach)


def _unit(window: int, reach: Mapping[int, int], extent: int) -> int:
    """Return the side of a unit: about 4 windows, or 4 times as far as the encoder reaches, sharing out a slide evenly."""
    about, windows = max(4, math.ceil(4 * sum(reach.values()) / window)), math.ceil(extent / window)
    return math.ceil(windows / max(1, round(windows / about))) * window


def _shared_unit(unit: int, stride: int, ratio: float) -> int | None:
    """Return the largest side up to that of a unit that is made of whole map pixels; None if there is none."""
    if ratio != int(ratio):
        return None
    step = math.lcm(64, stride * int(ratio))
    return unit // step * step or None


def _rounded(n: float) -> int:
    """Round down to a number with a divisor that suits chunks."""
    n = max(1, int(n))
    for unit in (256, 128, 64, 32):
        if n >= unit:
            return n - n % unit
    return n
