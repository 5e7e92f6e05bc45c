"""Reading an image tile by tile, whatever holds its pixels, and telling which shapes a tile concerns."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray

try:
    from zarr.buffer.cpu import NDBuffer
except ImportError:  # before zarr 3.1
    from zarr.core.buffer.cpu import NDBuffer

Window = tuple[int, int, int, int]  # y0, x0, h, w
Edges = NDArray[np.int64]  # borders of chunks or tiles along one axis, the first 0, the last the axis' length

TILE_BYTES = 64 << 20
"""What the pixels of a tile may take at a time, unless a single chunk is larger."""

_TILE_SIDE = 512  # smaller chunks are read several at once


class ImageReader:
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
