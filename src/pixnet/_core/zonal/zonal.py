"""Statistics of an image over shapes, in one pass over its pixels, tile by tile.

A tile is read once, whatever the number of shapes elements. Its shapes' coverage is made once and used for every
channel. Shapes that lie in one tile are done with it; of those that reach over several, the tiles' parts are collected
in the order of the tiles, so that neither threads nor workers change a bit of the result. Memory: shapes x channels in
float32, and a few tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pixnet._core.coverage import ShapeArrays, Weights
from pixnet._core.malloc import memory_kept
from pixnet._core.parallel import run
from pixnet._core.zonal.index import Tile, TileIndex
from pixnet._core.zonal.reader import BLOCK_BYTES, TILE_PX, ImageReader
from pixnet._core.zonal.statistics import Statistic
from pixnet._core.zonal.tile import BATCH_PX, Request, TileResult, tile_statistics
from pixnet._settings import settings

KEEP_BYTES = 512 << 20
"""Size of the pixels from which on freed memory is kept between tiles. With less to read, giving the memory back (up to 0.1
s) would cost more than is saved."""

HELD_BYTES = 2 << 30
"""Memory for the pixels that statistics keep of shapes in several tiles, until their last tile is done."""


class ZonalStatistics(NamedTuple):
    """What an image holds in each of n shapes, for c channels.

    Attributes
    ----------
    area
        ``(n,)``: the area in which any channel has a value, in pixels.
    values
        ``(n, c)`` float32 for each statistic, by name; NaN where no pixel has a value.
    """

    area: NDArray[np.float64]
    values: dict[str, NDArray[np.float32]]


def zonal_statistics(
    image: Any,
    shapes: ShapeArrays,
    *,
    channels: Sequence[int],
    validity: int | None = None,
    statistics: Sequence[Statistic],
    weights: Weights = "area",
    description: str | None = None,
    tile_px: int = TILE_PX,
    block_bytes: int = BLOCK_BYTES,
    batch_px: int = BATCH_PX,
    held_bytes: int = HELD_BYTES,
) -> ZonalStatistics:
    """Compute statistics of an image over shapes, reading each pixel at most once.

    Parameters
    ----------
    image
        ``(c, y, x)``: a numpy array, a zarr array or a dask array, lazy or not. Lazy blocks are computed once each.
    shapes
        The shapes, in pixels of the image.
    channels
        Indices of the channels asked for.
    validity
        Position in ``channels`` of the channel whose NaN pixels are missing in all of them. None: every channel has
        missing pixels of its own.
    statistics
        The statistics.
    weights
        ``"area"`` or ``"center"``, see :func:`pixnet._core.coverage.coverage`.
    description
        Text of the progress bar.
    tile_px, block_bytes, batch_px, held_bytes
        Side of a tile, and limits of memory; see `TILE_PX`, `BLOCK_BYTES`, `BATCH_PX` and `HELD_BYTES`.

    Returns
    -------
    ZonalStatistics
        One row for each shape, in order. The result depends neither on chunks nor on the number of threads or
        workers, beyond float64 rounding, and is the same each time, bit for bit, on one machine.

    Raises
    ------
    ValueError
        If the statistics would have to keep more than ``held_bytes``. No pixel has been read then.
    """
    reader = ImageReader(image, channels, tile_px=tile_px, block_bytes=block_bytes)
    request = Request(tuple(statistics), len(reader.channels), validity, weights, batch_px)
    index = TileIndex(shapes, reader.edges)
    _check_memory(request, index, shapes, held_bytes)
    n = len(shapes)
    result = ZonalStatistics(np.zeros(n), {s.name: np.empty((n, request.n_channels), np.float32) for s in statistics})
    for values in result.values.values():
        values[index.counts == 0] = np.nan
    collected = _Collected(request, index.counts)
    off = not settings.progress or len(index) < 4
    with (
        memory_kept() if reader.nbytes(index.n_px) > KEEP_BYTES else nullcontext(),
        tqdm(total=len(index), desc=description, unit="tile", file=sys.stderr, leave=False, disable=off) as progress,
    ):
        for tile, found in _run(reader, request, index, shapes):
            result.area[tile.rows] += found.area
            for values, part in zip(result.values.values(), found.values):
                values[tile.rows[: tile.n_inner]] = part
            collected.add(tile, found, result)
            progress.update()
    return result


def _run(
    reader: ImageReader, request: Request, index: TileIndex, shapes: ShapeArrays
) -> Iterator[tuple[Tile, TileResult]]:
    """Run the tiles and yield them in order."""
    items = ((tile, shapes.take(tile.rows), reader.pixels(tile.window)) for tile in index)
    for (tile, *_), found in run(tile_statistics, [reader, request], items, ordered=True):
        yield tile, found


class _Collected:
    """The parts of shapes that reach over several tiles."""

    def __init__(self, request: Request, counts: NDArray[np.int64]) -> None:
        self._statistics, self._n_channels = request.statistics, request.n_channels
        border = np.flatnonzero(counts > 1)
        self._position = np.full(len(counts), -1, dtype=np.int64)
        self._position[border] = np.arange(border.size)
        self._tiles_left = counts.copy()
        self._states = [s.start(border.size, self._n_channels) for s in self._statistics]

    def add(self, tile: Tile, found: TileResult, result: ZonalStatistics) -> None:
        """Add the parts of one tile, and write the statistics of the shapes that it completes."""
        for span, parts in found.parts.items():
            rows = tile.rows[slice(*span)]
            self._tiles_left[rows] -= 1
            done = rows[self._tiles_left[rows] == 0]
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                for statistic, state, part in zip(self._statistics, self._states, parts):
                    statistic.merge(state, self._position[rows], part)
                    for channel in range(self._n_channels) if done.size else ():
                        complete = statistic.take(state, self._position[done], channel)
                        result.values[statistic.name][done, channel] = statistic.finish(complete)


def _check_memory(request: Request, index: TileIndex, shapes: ShapeArrays, held_bytes: int) -> None:
    """Refuse statistics that would keep too many pixels."""
    keeping = [s for s in request.statistics if s.bytes_per_pixel]
    if not keeping:
        return
    needed = max(s.bytes_per_pixel for s in keeping) * request.n_channels * index.most_held(shapes)
    if needed > held_bytes:
        names = ", ".join(repr(s.name) for s in keeping)
        raise ValueError(
            f"{names} of {request.n_channels} channels would keep about {needed / 1e9:.1f} GB of pixels of shapes that "
            f"reach over several tiles of the image; the limit is {held_bytes / 1e9:.1f} GB. Take fewer channels at a "
            "time (genes=), or smaller shapes"
        )
