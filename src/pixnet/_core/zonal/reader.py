"""Reading an image tile by tile, whatever holds its pixels."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import dask.array as da
import numpy as np
import zarr
from numpy.typing import NDArray

from pixnet._core.stored import stored_array

try:
    from zarr.buffer.cpu import NDBuffer
except ImportError:  # before zarr 3.1
    from zarr.core.buffer.cpu import NDBuffer

Window = tuple[int, int, int, int]  # y0, x0, h, w
Edges = NDArray[np.int64]  # borders of chunks or tiles along one axis, the first 0, the last the axis' length

TILE_PX = 512
"""Side of a tile, unless a single chunk is larger."""

BLOCK_BYTES = 64 << 20
"""What the channels of a tile that are read together may take, unless a single chunk is larger."""


class ImageReader:
    """An image ``(c, y, x)`` to be read in tiles.

    Parameters
    ----------
    image
        A numpy array, a zarr array or a dask array. A dask array that is nothing but the contents of a zarr array is
        read from there; any other dask array counts as lazy: each of its blocks is computed once, with all channels
        that are asked for.
    channels
        Indices of the channels to read.
    tile_px, block_bytes
        See `TILE_PX` and `BLOCK_BYTES`.

    Attributes
    ----------
    edges
        Borders of the tiles along y and x. Tiles are made of whole chunks.
    """

    def __init__(
        self, image: Any, channels: Sequence[int], *, tile_px: int = TILE_PX, block_bytes: int = BLOCK_BYTES
    ) -> None:
        stored = stored_array(image)
        self.source = image if stored is None else stored
        self.channels = np.asarray(channels, dtype=np.int64)
        self.block_bytes = block_bytes
        self._itemsize = np.dtype(self.source.dtype).itemsize
        c, y, x = _chunk_edges(self.source, tile_px)
        self._chunk_of_channel = np.searchsorted(c, self.channels, side="right")
        # A lazy tile is computed with all its channels, a stored one is read by chunks of them.
        depth = min(len(self.channels), int(np.diff(c).max(initial=1))) if self.reads else len(self.channels)
        side = min(tile_px, max(1, math.isqrt(block_bytes // (self._itemsize * max(depth, 1)))))
        self.edges = _join(y, side), _join(x, side)
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_own"}
        return kept if self.reads else kept | {"source": None}  # its pixels are sent tile by tile

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=threading.local())

    @property
    def reads(self) -> bool:
        """Whether a task, in this process or another, reads the pixels for itself."""
        return isinstance(self.source, zarr.Array) and not isinstance(self.source.store, zarr.storage.MemoryStore)

    def nbytes(self, n_px: int) -> int:
        """Return the size of some pixels with the channels that are read."""
        return n_px * len(self.channels) * self._itemsize

    def pixels(self, window: Window) -> Any:
        """Return the pixels of a window to hand to a task: an array, maybe a lazy one; None if the task reads them."""
        rows, columns = slice(window[0], window[0] + window[2]), slice(window[1], window[1] + window[3])
        return None if self.reads else cast(Any, self.source)[:, rows, columns][_as_slice(self.channels)]

    def blocks(self, window: Window, first: int | None = None) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
        """Read a window, some channels at a time.

        Parameters
        ----------
        window
            The pixels.
        first
            Position in ``channels`` of a channel that must be in the first block.

        Yields
        ------
        tuple
            Positions in ``channels``, and the pixels ``(c, h, w)``, which are good until this thread reads again.
        """
        size = window[2] * window[3] * self._itemsize
        blocks: list[list[int]] = []
        for chunk in np.unique(self._chunk_of_channel):
            members = np.flatnonzero(self._chunk_of_channel == chunk).tolist()
            if blocks and (len(blocks[-1]) + len(members)) * size <= self.block_bytes:
                blocks[-1].extend(members)
            else:
                blocks.append(members)
        if first is not None:
            blocks.sort(key=lambda block: first not in block)
        for block in blocks:
            yield np.array(block), self._read(self.channels[block], window)

    def _read(self, channels: NDArray[np.int64], window: Window) -> NDArray:
        """Read some channels of a window, ``(c, h, w)``."""
        low, high = int(channels.min()), int(channels.max()) + 1
        rows, columns = slice(window[0], window[0] + window[2]), slice(window[1], window[1] + window[3])
        data = self._memory((high - low, window[2], window[3]))
        self.source.get_basic_selection((slice(low, high), rows, columns), out=NDBuffer(cast(Any, data)))
        return data[_as_slice(channels - low)]

    def _memory(self, shape: tuple[int, int, int]) -> Any:
        """Return an array of this thread to read into: a new one each time costs a fifth of the time of reading."""
        size = math.prod(shape) * self._itemsize
        if getattr(self._own, "bytes", None) is None or self._own.bytes.nbytes < size:
            self._own.bytes = np.empty(size, dtype=np.uint8)
        return self._own.bytes[:size].view(self.source.dtype).reshape(shape)


def _as_slice(index: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Return a run of indices as a slice, which copies nothing; others as they are."""
    return slice(int(index[0]), int(index[-1]) + 1) if (np.diff(index) == 1).all() else index


def _chunk_edges(source: Any, tile_px: int) -> tuple[Edges, ...]:
    """Return the borders of the chunks along c, y and x."""
    if isinstance(source, da.Array):
        return tuple(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) for sizes in source.chunks)
    # Of a shard, the chunks inside it, which can be read one by one. An array in memory is as if in chunks of one tile.
    steps = source.chunks if isinstance(source, zarr.Array) else (source.shape[0], tile_px, tile_px)
    return tuple(np.append(np.arange(0, size, step), size).astype(np.int64) for size, step in zip(source.shape, steps))


def _join(edges: Edges, side: int) -> Edges:
    """Join neighbouring chunks as long as they stay within a length."""
    kept = [int(edges[0])]
    for edge, following in zip(edges[1:-1], edges[2:]):
        if following - kept[-1] > side:
            kept.append(int(edge))
    return np.array([*kept, int(edges[-1])], dtype=np.int64)
