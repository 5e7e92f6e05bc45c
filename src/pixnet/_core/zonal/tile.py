"""The statistics of one tile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pixnet._core.coverage import ShapeArrays, Weights, coverage
from pixnet._core.coverage.fractions import boxes_in
from pixnet._core.zonal.index import Tile
from pixnet._core.zonal.pixels import ZonePixels, Zones
from pixnet._core.zonal.reader import ImageReader, Window
from pixnet._core.zonal.statistics import Statistic

BATCH_PX = 8 << 20
"""Pixels of shapes of which the coverage is in memory at a time (shapes may overlap without limit)."""


Run = tuple[int, int]  # start and stop among the shapes of a tile


class Request(NamedTuple):
    """What is asked of every tile; see :func:`pixnet._core.zonal.zonal_statistics`."""

    statistics: tuple[Statistic, ...]
    n_channels: int
    validity: int | None
    weights: Weights
    batch_px: int = BATCH_PX


class TileResult(NamedTuple):
    """What a tile's pixels say of its shapes.

    Attributes
    ----------
    area
        ``(n,)``: the area in which any channel has a value, in pixels.
    values
        Of each statistic ``(n_inner, c)`` float32, for the shapes that lie in this tile alone.
    parts
        For each run of the other shapes, what `Statistic.update` returned, for each statistic and channel.
    """

    area: NDArray[np.float64]
    values: list[NDArray[np.float32]]
    parts: dict[Run, list[list[Any]]]


def tile_statistics(
    reader: ImageReader, request: Request, tile: Tile, shapes: ShapeArrays, pixels: NDArray | None
) -> TileResult:
    """Compute the statistics of the shapes in a tile.

    Parameters
    ----------
    reader
        Reads the pixels.
    request
        The statistics.
    tile
        The tile.
    shapes
        Its shapes, in the order of ``tile.rows``.
    pixels
        ``(c, h, w)``; None: the reader reads them.
    """
    n_inner, statistics = tile.n_inner, request.statistics
    batches = _batches(shapes, tile, request.batch_px)
    area = np.zeros(len(shapes))
    values = [np.empty((request.n_channels, n_inner), np.float32) for _ in statistics]
    parts: dict[Run, list[list[Any]]] = {
        run: [[None] * request.n_channels for _ in statistics]
        for batch in batches
        for run in batch
        if run[0] >= n_inner
    }
    n_px = tile.window[2] * tile.window[3]
    plane = np.empty(n_px)  # one for all channels: a new one each time takes longer than the sums
    missing = np.ones(n_px, dtype=bool)  # where no channel has a value, of those seen so far

    @lru_cache(maxsize=1)  # a single batch, the usual case, is made once for all channels
    def zones(batch: tuple[Run, ...]) -> list[tuple[Run, Zones]]:
        found = _zones(shapes, tile.window, batch, request.weights)
        hidden = request.validity is not None and missing.any()
        return [(run, zone.without(missing) if hidden else zone) for run, zone in found]

    blocks = reader.blocks(tile.window, request.validity) if pixels is None else [(np.arange(len(pixels)), pixels)]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for channels, data in blocks:
            for channel, image in zip(channels, data):
                if request.validity in (None, channel) and missing.any():
                    missing &= np.isnan(image).ravel()
            for batch in batches:
                for channel, image in zip(channels, data):
                    plane[:] = image.ravel()
                    for run, zone in zones(batch):
                        found = ZonePixels(zone, plane)
                        # A missing pixel shows in the sums, which spares a look at each.
                        if request.validity is None and np.isnan(found.total.min(initial=0.0)):
                            found = ZonePixels(zone.without(np.isnan(plane)), plane)
                        for k, statistic in enumerate(statistics):
                            part = statistic.update(found)
                            if run in parts:
                                parts[run][k][channel] = part
                            else:
                                values[k][channel, slice(*run)] = statistic.finish(part)
        for batch in batches:
            for run, zone in zones(batch):
                area[slice(*run)] = zone.without(missing).area if missing.any() else zone.area
    return TileResult(area, [rows.T for rows in values], parts)


def _batches(shapes: ShapeArrays, tile: Tile, batch_px: int) -> list[tuple[Run, ...]]:
    """Split a tile's shapes into batches whose coverage fits in memory, and each where the shapes of this tile alone end."""
    boxes = boxes_in(shapes, tile.window)
    batch = np.cumsum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) // batch_px
    edges = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(shapes)]
    return [
        ((start, tile.n_inner), (tile.n_inner, stop)) if start < tile.n_inner < stop else ((start, stop),)
        for start, stop in zip(edges[:-1], edges[1:])
    ]


def _zones(shapes: ShapeArrays, window: Window, batch: tuple[Run, ...], weights: Weights) -> list[tuple[Run, Zones]]:
    """Compute the coverage of a batch of shapes."""
    first, last = batch[0][0], batch[-1][1]
    whole = coverage(shapes if last - first == len(shapes) else shapes.take(np.arange(first, last)), window, weights)
    return [(run, Zones(whole if len(batch) == 1 else _rows(whole, run[0] - first, run[1] - first))) for run in batch]


def _rows(matrix: csr_array, start: int, stop: int) -> csr_array:
    """Return some rows as a view; scipy copies them."""
    first, last = matrix.indptr[[start, stop]]
    arrays = matrix.data[first:last], matrix.indices[first:last], matrix.indptr[start : stop + 1] - first
    return csr_array(arrays, shape=(stop - start, matrix.shape[1]))
