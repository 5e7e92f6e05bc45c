"""Statistics of an image over shapes, in one pass over its pixels, tile by tile.

A tile is read once, whatever the number of shapes elements. Its shapes' coverage is made once and used for every
channel. Shapes that lie in one tile are done with it; of those that reach over several, partial sums are kept in
float64 and joined in the order of the tiles, so that neither threads nor workers change a bit of the result.
Memory: shapes x channels in float32, and a few tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pixnet._core.coverage.coverage import Spans, Weights, spans
from pixnet._core.coverage.shapes import RECTANGLE, ShapeArrays
from pixnet._core.parallel import cluster_client, run
from pixnet._core.zonal import kernels
from pixnet._core.zonal.index import TileIndex
from pixnet._core.zonal.reader import TILE_BYTES, ImageReader, Window
from pixnet._settings import settings

STATISTICS = ("mean", "sum", "std", "min", "max")

_BATCH_PIXELS = 8 << 20  # coverage is made for so many pixels at a time (shapes may overlap without limit)


@dataclass
class Sums:
    """What an image holds in each of n shapes, for c channels; NaN where no pixel counts.

    Attributes
    ----------
    weight
        ImageReader' worth of area that counted: ``(n, 1)`` where the same pixels are missing in all channels (or none is),
        else ``(n, c)``.
    mean, std, min, max
        ``(n, c)`` float32; None where not asked for.
    """

    weight: NDArray[np.float64]
    mean: NDArray[np.float32]
    std: NDArray[np.float32] | None = None
    min: NDArray[np.float32] | None = None
    max: NDArray[np.float32] | None = None


def zonal_statistics(
    image: Any,
    geometries: ShapeArrays,
    *,
    channels: Sequence[int],
    validity: int | None = None,
    statistics: Sequence[str] = ("mean",),
    weights: Weights = "area",
    description: str | None = None,
) -> Sums:
    """Compute statistics of an image over shapes, reading each pixel at most once.

    Parameters
    ----------
    image
        ``(c, y, x)``: a numpy array, a zarr array or a dask array, lazy or not. Lazy blocks are computed once each.
    geometries
        The shapes, in pixels of the image.
    channels
        Indices of the channels asked for.
    validity
        Position in ``channels`` of the channel whose NaN pixels are missing in all of them. None: every channel is
        looked at for itself.
    statistics
        Of :data:`STATISTICS`; the mean is always given, and the sum is it times the weight. The standard deviation is
        that of the pixels, weighted by coverage; min and max are over all pixels with any coverage.
    weights
        ``"area"`` or ``"center"``, see :func:`pixnet._core.coverage.coverage`.
    description
        Text of the progress bar.

    Returns
    -------
    Sums
        One row for each shape, in order. The result depends neither on chunks nor on the number of threads or
        workers, beyond float64 rounding, and is the same, bit for bit, each time.
    """
    pixels = ImageReader(image, channels)
    job = _Job(len(pixels.channels), validity, "std" in statistics, bool({"min", "max"} & set(statistics)), weights)
    tiles = TileIndex(geometries, pixels.edges)
    result = job.empty_sums(len(geometries))
    border = np.flatnonzero(tiles.counts > 1)
    position = np.full(len(geometries), -1, dtype=np.int64)
    position[border] = np.arange(border.size)
    joined = job.empty_part(border.size)

    def tasks() -> Iterator[_Tile]:
        for window, members in tiles:
            inner = tiles.counts[members] == 1
            yield _Tile(window, geometries, np.concatenate([members[inner], members[~inner]]), int(inner.sum()), job)

    off = not settings.progress or len(tiles) < 4
    with tqdm(total=len(tiles), desc=description, unit="tile", file=sys.stderr, leave=False, disable=off) as progress:
        for tile, (inner, outer) in _run(pixels, tasks()):
            _put(result, tile.members[: tile.n_inner], inner)
            if outer is not None:
                joined.add(position[tile.members[tile.n_inner :]], outer)
            progress.update()
    if border.size:
        _put(result, border, joined.finish())
    return result


def _run(pixels: ImageReader, tasks: Iterator[_Tile]) -> Iterator[tuple[_Tile, tuple[Sums, _Part | None]]]:
    """Run tiles in threads, or on the cluster of the dask.distributed client in scope."""
    items: Iterator[tuple[Any, ...]]
    if cluster_client() is None:
        function, shared, items = _run_tile, [pixels], ((tile,) for tile in tasks)
    elif pixels.on_disk:
        function, shared, items = _run_tile, [pixels], ((tile.alone(),) for tile in tasks)
    else:  # lazy blocks are computed where the cluster likes; pixels in this process's memory are sent
        function, shared, items = _Tile.run_on, [], ((tile.alone(), pixels.part(tile.window)) for tile in tasks)
    for (tile, *_), result in run(function, shared, items, ordered=True):
        yield tile, result


def _run_tile(pixels: ImageReader, tile: _Tile) -> tuple[Sums, _Part | None]:
    return tile.run(pixels)


def _put(result: Sums, rows: NDArray, part: Sums) -> None:
    result.weight = _widened(result.weight, part.weight.shape[1])
    for name, value in vars(part).items():
        if value is not None:
            getattr(result, name)[rows] = value


def _put_columns(result: Sums | _Part, columns: NDArray[np.int64], part: Sums | _Part) -> None:
    low, high = int(columns[0]), int(columns[-1]) + 1
    where = slice(low, high) if (np.diff(columns) == 1).all() else columns
    for name, value in vars(part).items():
        if value is not None and name != "weight":
            getattr(result, name)[:, where] = value


def _widened(weight: NDArray, n_channels: int) -> NDArray:
    """One weight for all channels as one for each, where that is asked for: most images never need it."""
    return np.repeat(weight, n_channels, axis=1) if weight.shape[1] < n_channels else weight


@dataclass(frozen=True)
class _Job:
    """What every tile is asked for."""

    n_channels: int
    validity: int | None
    std: bool
    extremes: bool
    weights: Weights

    def empty_sums(self, n: int) -> Sums:
        wanted = (True, self.std, self.extremes, self.extremes)
        return Sums(
            np.zeros((n, 1)), *(np.full((n, self.n_channels), np.nan, np.float32) if w else None for w in wanted)
        )

    def empty_part(self, n: int, n_channels: int | None = None) -> _Part:
        n_channels = self.n_channels if n_channels is None else n_channels
        shape = (n, n_channels)
        return _Part(
            np.zeros((n, 1)),
            np.zeros(shape),
            np.zeros(shape) if self.std else None,
            np.full(shape, np.inf) if self.extremes else None,
            np.full(shape, -np.inf) if self.extremes else None,
        )


@dataclass
class _Part:
    """Sums over some of the pixels of each shape, in float64."""

    weight: NDArray
    total: NDArray
    squares: NDArray | None = None
    low: NDArray | None = None
    high: NDArray | None = None

    def add(self, rows: NDArray, other: _Part) -> None:
        """Join the sums of further pixels of some of the shapes."""
        self.weight = _widened(self.weight, other.weight.shape[1])
        if self.squares is not None:
            # Chan's rule: squares about two means become squares about their common mean.
            a, b = self.weight[rows], other.weight
            with np.errstate(invalid="ignore", divide="ignore"):
                apart = other.total / b - self.total[rows] / a
                between = np.where((a > 0) & (b > 0), apart**2 * a * b / (a + b), 0.0)
            self.squares[rows] += other.squares + between
        self.weight[rows] += other.weight
        self.total[rows] += other.total
        if self.low is not None:
            self.low[rows] = np.minimum(self.low[rows], other.low)
            self.high[rows] = np.maximum(self.high[rows], other.high)

    def take(self, rows: slice) -> _Part:
        """Return the sums of some of the shapes."""
        return _Part(*(None if value is None else value[rows] for value in vars(self).values()))

    def finish(self) -> Sums:
        """Return the statistics, rounded to float32 once; 0 / 0 makes NaN of what has no pixel that counts."""
        done = Sums(self.weight, *(None,) * 4)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            done.mean = np.divide(self.total, self.weight, out=np.empty(self.total.shape, np.float32), casting="unsafe")
            if self.squares is not None:
                done.std = np.sqrt(self.squares / self.weight).astype(np.float32)
            if self.low is not None:
                nothing = ~(self.weight > 0) | (self.low > self.high)
                done.min, done.max = self.low.astype(np.float32), self.high.astype(np.float32)
                done.min[nothing] = done.max[nothing] = np.nan
        return done


@dataclass
class _Tile:
    """The work on one tile."""

    window: Window
    geometries: ShapeArrays
    members: NDArray[np.int64]  # positions of the shapes, first of those that lie in this tile alone
    n_inner: int
    job: _Job
    own: bool = field(default=False)  # whether `geometries` holds the members alone

    def alone(self) -> _Tile:
        """Return the same work with no more than its own shapes, to be sent away."""
        return replace(self, geometries=self.geometries.take(self.members), own=True)

    def run(self, pixels: ImageReader) -> tuple[Sums, _Part | None]:
        """Return the statistics of the shapes that lie in this tile alone, and the sums of the others."""
        blocks = pixels.blocks(self.window, first=self.job.validity)
        return self._reduce((block, pixels.read(block, self.window)) for block in blocks)

    def run_on(self, data: NDArray) -> tuple[Sums, _Part | None]:
        """As :meth:`run`, on pixels that are there."""
        return self._reduce([(np.arange(self.job.n_channels), data)])

    def _reduce(self, blocks: Any) -> tuple[Sums, _Part | None]:
        job, n = self.job, len(self.members)
        batches = self._batches()
        inner = job.empty_sums(self.n_inner)
        outer = job.empty_part(n - self.n_inner) if self.n_inner < n else None
        shared, common, weight = None, None, None
        for block, data in blocks:
            if common is None:
                if job.validity is not None:  # what is missing is told by one channel, which comes first, for all
                    gone = np.isnan(data[int(np.flatnonzero(block == job.validity)[0])])
                    shared = gone if gone.any() else None
                common = weight = self._weight(np.empty((n, 1)), shared, batches)
            step = max(1, TILE_BYTES // (4 * self.window[2] * self.window[3]))
            for start in range(0, len(block), step):
                columns = block[start : start + step]
                part = job.empty_part(n, len(columns))
                part.weight = common
                self._fill(part, _as_float(data[start : start + step]), shared, batches)
                if part.weight is not common:
                    if weight is common:
                        weight = np.repeat(common, job.n_channels, axis=1)
                    weight[:, columns] = part.weight
                _put_columns(inner, columns, part.take(slice(0, self.n_inner)).finish())
                if outer is not None:
                    _put_columns(outer, columns, part.take(slice(self.n_inner, None)))
            del data
        inner.weight = weight[: self.n_inner]
        if outer is not None:
            outer.weight = weight[self.n_inner :]
        return inner, outer

    def _weight(self, weight: NDArray, missing: NDArray | None, batches: list[_Batch]) -> NDArray:
        for batch in batches:
            batch.add_weight(weight, missing)
            if len(batches) > 1:
                batch.release()
        return weight

    def _fill(self, part: _Part, planes: NDArray, shared: NDArray | None, batches: list[_Batch]) -> None:
        """Fill in the sums of some channels, of which ``shared`` are the missing pixels, or each has its own."""
        self._fill_without(part, planes, shared, batches)
        # Whether pixels are missing shows in the sums, which spares a look at each.
        if self.job.validity is None and np.isnan(part.total).any():
            missing = np.isnan(planes)
            part.weight = self._weight(np.empty(part.total.shape), missing, batches)
            self._fill_without(part, planes, missing, batches)

    def _fill_without(self, part: _Part, planes: NDArray, missing: NDArray | None, batches: list[_Batch]) -> None:
        """Fill in the sums of some channels without the missing pixels."""
        filled = planes if missing is None else np.where(missing, planes.dtype.type(0), planes)
        if missing is not None and (self.job.std or self.job.extremes):
            planes = np.where(missing, planes.dtype.type(np.nan), planes)
        for batch in batches:
            batch.add(part, planes, filled)
            if len(batches) > 1:
                batch.release()

    def _batches(self) -> list[_Batch]:
        """Split the shapes into runs whose coverage fits in memory together."""
        index = np.arange(len(self.members)) if self.own else self.members
        y0, x0, h, w = self.window
        bounds = self.geometries.bounds[index]
        width = np.minimum(bounds[:, 2], x0 + w) - np.maximum(bounds[:, 0], x0) + 2
        height = np.minimum(bounds[:, 3], y0 + h) - np.maximum(bounds[:, 1], y0) + 2
        group = (np.cumsum(width * height) // _BATCH_PIXELS).astype(np.int64)
        starts = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(index))
        return [_Batch(self, index, int(a), int(b)) for a, b in zip(starts[:-1], starts[1:])]


class _Batch:
    """Some of a tile's shapes: rectangles along the axes are summed as blocks, the others by their coverage."""

    def __init__(self, tile: _Tile, index: NDArray[np.int64], start: int, stop: int) -> None:
        self._geometries, self._window, self._job = tile.geometries, tile.window, tile.job
        index = index[start:stop]
        block = tile.geometries.kinds[index] == RECTANGLE
        if self._job.weights != "area" or self._job.std or self._job.extremes:
            block[:] = False  # these need the coverage itself
        position = np.arange(start, stop)
        self._block_rows, self._rows, self._index = position[block], position[~block], index[~block]
        y0, x0, _, _ = tile.window
        self._bounds = tile.geometries.bounds[index[block]] - np.array([x0, y0, x0, y0], dtype=np.float64)
        self._spans: Spans | None = None

    def release(self) -> None:
        """Let go of the coverage; it is made again if it is needed."""
        self._spans = None

    def add_weight(self, weight: NDArray, missing: NDArray | None) -> None:
        """Fill in how many pixels' worth of each shape count."""
        _, _, h, w = self._window
        if missing is not None:
            counts = np.ascontiguousarray(~missing.reshape(-1, h, w), dtype=np.float32)
            self._sum(counts, weight)
            return
        low = np.maximum(self._bounds[:, :2], 0.0)
        high = np.minimum(self._bounds[:, 2:], [w, h])
        weight[self._block_rows] = np.maximum(high - low, 0.0).prod(axis=1, keepdims=True)
        if self._rows.size:
            found = self._coverage()
            offsets = found.weight_offsets[found.offsets]
            running = np.zeros(len(self._rows))
            filled = np.flatnonzero(offsets[1:] > offsets[:-1])
            if filled.size:
                running[filled] = np.add.reduceat(found.weights, offsets[filled])
            weight[self._rows] = running[:, None]

    def add(self, part: _Part, planes: NDArray, filled: NDArray) -> None:
        """Fill in the rows of these shapes; ``filled`` are the planes with 0 for what is missing."""
        self._sum(filled, part.total)
        if not self._rows.size:
            return
        flat = planes.reshape(len(planes), -1)
        if self._job.extremes:
            found = self._coverage()
            kernels.span_extremes(
                flat, found.offsets, found.start, found.weight_offsets, self._rows, part.low, part.high
            )
        if self._job.std:
            with np.errstate(invalid="ignore", divide="ignore"):
                means = np.where(part.weight > 0, part.total / part.weight, 0.0)
            kernels.span_squares(flat, *self._coverage(), means, self._rows, part.squares)

    def _coverage(self) -> Spans:
        if self._spans is None:
            self._spans = spans(self._geometries, self._window, self._job.weights, self._index)
        return self._spans

    def _sum(self, planes: NDArray, out: NDArray) -> None:
        """Sum coverage times value."""
        if self._block_rows.size:
            kernels.rectangle_sums(planes, self._bounds, self._block_rows, out)
        if self._rows.size:
            kernels.span_sums(planes.reshape(len(planes), -1), *self._coverage(), self._rows, out)


def _as_float(data: NDArray) -> NDArray:
    """Return contiguous float32, or float64 where float32 does not hold the values."""
    narrow = data.dtype == np.float32 or (data.dtype.itemsize < 4 and data.dtype.kind in "iufb")
    return np.ascontiguousarray(data, dtype=np.float32 if narrow else np.float64)
