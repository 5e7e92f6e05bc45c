"""Reading an image tile by tile, whatever holds its pixels, and telling which shapes a tile concerns."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray

from pixnet._core.packing import Geometries

try:
    from zarr.buffer.cpu import NDBuffer
except ImportError:  # before zarr 3.1
    from zarr.core.buffer.cpu import NDBuffer

Window = tuple[int, int, int, int]  # y0, x0, h, w
Edges = NDArray[np.int64]  # borders of chunks or tiles along one axis, the first 0, the last the axis' length

TILE_BYTES = 64 << 20
"""What the pixels of a tile may take at a time, unless a single chunk is larger."""

_TILE_SIDE = 512  # smaller chunks are read several at once


class Pixels:
    """An image ``(c, y, x)`` to be read in tiles.

    Parameters
    ----------
    image
        A numpy array, a zarr array or a dask array. A dask array that is nothing but the contents of a zarr array is
        read from there, and a numpy array in place; any other dask array counts as lazy: each of its blocks is
        computed once, with all channels that are asked for.
    channels
        Indices of the channels to read.
    """

    def __init__(self, image: Any, channels: Sequence[int]) -> None:
        self.source = _stored(image)
        self.channels = np.asarray(channels, dtype=np.int64)
        c, y, x = _chunk_edges(self.source)
        self._chunk_of_channel = np.searchsorted(c, self.channels, side="right")
        deep = len(self.channels) if self.lazy else min(len(self.channels), int(np.diff(c).max(initial=1)))
        itemsize = np.dtype(self.source.dtype).itemsize * max(deep, 1)
        side = min(_TILE_SIDE, max(1, int(np.sqrt(TILE_BYTES / itemsize))))
        self.edges = _join(y, side), _join(x, side)
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=threading.local())

    @property
    def lazy(self) -> bool:
        """Whether pixels are computed by dask."""
        return isinstance(self.source, da.Array)

    @property
    def on_disk(self) -> bool:
        """Whether another process can read the pixels for itself."""
        return isinstance(self.source, zarr.Array) and not isinstance(self.source.store, zarr.storage.MemoryStore)

    def blocks(self, window: Window, first: int | None = None) -> list[NDArray[np.int64]]:
        """Return which of the channels (positions in ``channels``) to read together, the block with ``first`` first."""
        positions = np.arange(len(self.channels))
        if self.lazy:
            return [positions]
        size = window[2] * window[3] * np.dtype(self.source.dtype).itemsize
        blocks: list[list[int]] = []
        for chunk in np.unique(self._chunk_of_channel):
            members = positions[self._chunk_of_channel == chunk].tolist()
            if blocks and (len(blocks[-1]) + len(members)) * size <= TILE_BYTES:
                blocks[-1].extend(members)
            else:
                blocks.append(members)
        if first is not None:
            blocks.sort(key=lambda block: first not in block)
        return [np.array(block) for block in blocks]

    def read(self, block: NDArray[np.int64], window: Window) -> NDArray:
        """Read some channels of a window, ``(c, h, w)``.

        What is returned may be the image's own memory, or is good until this thread reads again.
        """
        channels = self.channels[block]
        low, high = int(channels.min()), int(channels.max()) + 1
        is_range = high - low == len(channels) and bool((np.diff(channels) == 1).all())
        rows, columns = slice(window[0], window[0] + window[2]), slice(window[1], window[1] + window[3])
        if self.lazy:
            part = self.source[:, rows, columns][slice(low, high) if is_range else channels]
            return np.asarray(part.compute(scheduler="synchronous"))
        if isinstance(self.source, zarr.Array):
            data = self._memory((high - low, window[2], window[3]))
            self.source.get_basic_selection((slice(low, high), rows, columns), out=NDBuffer(data))
        else:
            data = np.asarray(self.source[low:high, rows, columns])
        return data if is_range else data[channels - low]

    def _memory(self, shape: tuple[int, int, int]) -> NDArray:
        """Return an array of this thread to read into: a new one each time costs a fifth of the time of reading."""
        dtype = np.dtype(self.source.dtype)
        size = math.prod(shape) * dtype.itemsize
        if getattr(self._own, "bytes", None) is None or self._own.bytes.nbytes < size:
            self._own.bytes = np.empty(size, dtype=np.uint8)
        return self._own.bytes[:size].view(dtype).reshape(shape)

    def part(self, window: Window) -> Any:
        """Return a window of the channels as the source's own kind of array, without computing it."""
        rows, columns = slice(window[0], window[0] + window[2]), slice(window[1], window[1] + window[3])
        return self.source[:, rows, columns][self.channels]


class Tiles:
    """The tiles that any shape's bounding box reaches into, in order, each with the positions of those shapes.

    Parameters
    ----------
    geometries
        The shapes, in pixels of the image.
    edges
        Borders of the tiles along y and x.

    Attributes
    ----------
    counts
        How many tiles each shape reaches into.
    """

    def __init__(self, geometries: Geometries, edges: tuple[Edges, Edges]) -> None:
        self._y, self._x = y, x = edges
        x0, y0, x1, y1 = geometries.bounds.T
        with np.errstate(invalid="ignore"):
            inside = (x1 > x[0]) & (y1 > y[0]) & (x0 < x[-1]) & (y0 < y[-1])
        shape = np.flatnonzero(inside)
        first_x = np.maximum(np.searchsorted(x, x0[shape], side="right") - 1, 0)
        first_y = np.maximum(np.searchsorted(y, y0[shape], side="right") - 1, 0)
        n_x = np.minimum(np.searchsorted(x, x1[shape], side="left"), len(x) - 1) - first_x
        n_y = np.minimum(np.searchsorted(y, y1[shape], side="left"), len(y) - 1) - first_y
        n = n_x * n_y
        self.counts = np.zeros(len(geometries), dtype=np.int64)
        self.counts[shape] = n
        nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        across = np.repeat(n_x, n)
        tile = (np.repeat(first_y, n) + nth // across) * (len(x) - 1) + np.repeat(first_x, n) + nth % across
        order = np.argsort(tile.astype(np.min_scalar_type((len(x) - 1) * (len(y) - 1))), kind="stable")  # radix sort
        self._members = np.repeat(shape, n)[order]
        self._tiles, self._first = np.unique(tile[order], return_index=True)

    def __len__(self) -> int:
        return len(self._tiles)

    def __iter__(self) -> Iterator[tuple[Window, NDArray[np.int64]]]:
        ends = np.append(self._first[1:], len(self._members))
        for tile, first, end in zip(self._tiles, self._first, ends):
            row, column = divmod(int(tile), len(self._x) - 1)
            y0, x0 = int(self._y[row]), int(self._x[column])
            window = (y0, x0, int(self._y[row + 1]) - y0, int(self._x[column + 1]) - x0)
            yield window, self._members[first:end]


def _stored(image: Any) -> Any:
    """Return the zarr array beneath a dask array that is nothing but its contents, else the image."""
    if isinstance(image, da.Array):
        layers = dict(image.dask.layers)
        original = layers.pop(f"original-{image.name}", None)
        # dask.array.from_zarr makes these two layers; anything done to the array since would have added another.
        if original is not None and set(layers) == {image.name}:
            array = dict(original).get(f"original-{image.name}")
            if isinstance(array, zarr.Array) and array.shape == image.shape and array.dtype == image.dtype:
                return array
    return image


def _chunk_edges(source: Any) -> tuple[Edges, Edges, Edges]:
    """Borders of the chunks along c, y and x."""
    if isinstance(source, da.Array):
        return tuple(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) for sizes in source.chunks)
    if isinstance(source, zarr.Array):
        steps = source.chunks  # of a shard, the chunks inside it, which can be read one by one
    else:
        steps = (max(1, TILE_BYTES // (_TILE_SIDE**2 * source.dtype.itemsize)), _TILE_SIDE, _TILE_SIDE)
    return tuple(np.append(np.arange(0, size, step), size).astype(np.int64) for size, step in zip(source.shape, steps))


def _join(edges: Edges, side: int) -> Edges:
    """Join neighbouring chunks as long as they stay within a length."""
    kept = [int(edges[0])]
    for edge, following in zip(edges[1:-1], edges[2:]):
        if following - kept[-1] > side:
            kept.append(int(edge))
    return np.array([*kept, int(edges[-1])], dtype=np.int64)
