"""The levels of a pyramid: means of blocks of pixels of the level before."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np

CHUNK = 1024
"""Chunks of a slide's levels have this many pixels a side."""

BAND = 400_000
"""Pixels of which means are made at once, channel by channel: few enough for a cache."""


def halve(array: np.ndarray | da.Array) -> np.ndarray | da.Array:
    """Return means of 2 x 2 pixels of the last two axes, rounded for integers; an odd last row or column is left out.

    Parameters
    ----------
    array
        ``(..., y, x)``; a dask array stays lazy.

    Returns
    -------
    numpy.ndarray or dask.array.Array
        ``(..., y // 2, x // 2)`` of the same dtype.
    """
    if isinstance(array, da.Array):
        size_y, size_x = tuple(size - size % 2 for size in array.shape[-2:])
        even = array[..., :size_y, :size_x]
        # Blocks of even size can be halved one by one.
        if any(size % 2 for axis in (-2, -1) for size in even.chunks[axis]):
            even = even.rechunk({even.ndim - 2: CHUNK, even.ndim - 1: CHUNK})
        chunks = (*even.chunks[:-2], *(tuple(size // 2 for size in even.chunks[axis]) for axis in (-2, -1)))
        return da.map_blocks(halve, even, chunks=chunks, dtype=array.dtype)
    size_y, size_x = array.shape[-2] // 2, array.shape[-1] // 2
    wide = np.float32 if array.dtype.kind == "f" else np.uint32
    out = np.empty((*array.shape[:-2], size_y, size_x), dtype=array.dtype)
    band = 512  # a band of rows at a time keeps the wider intermediate small
    for start in range(0, size_y, band):
        stop = min(start + band, size_y)
        block = array[..., 2 * start : 2 * stop, : 2 * size_x]
        total: Any = block[..., ::2, ::2].astype(wide)
        total += block[..., 1::2, ::2]
        total += block[..., ::2, 1::2]
        total += block[..., 1::2, 1::2]
        out[..., start:stop, :] = total / 4 if wide is np.float32 else (total + 2) >> 2
    return out


def block_means(values: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    """Return means of blocks of pixels over those that have a value; a part of a block at the end is left out.

    Parameters
    ----------
    values
        ``(c, y, x)`` float32, NaN where there is no value.
    factor_y, factor_x
        Size of a block in pixels.
    """
    height, width = (n // f for n, f in zip(values.shape[1:], (factor_y, factor_x)))
    values = values[:, : height * factor_y, : width * factor_x]
    out = np.empty((len(values), height, width), np.float32)
    step = max(BAND // max(values[:1].size, 1), 1)
    for c in range(0, len(values), step):
        out[c : c + step] = _block_means(values[c : c + step], factor_y, factor_x)
    return out


def _block_means(values: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    total = _block_sums(values, factor_y, factor_x, np.float32)
    if not np.isnan(total).any():
        return total / np.float32(factor_y * factor_x)
    nan = np.isnan(values)
    total = _block_sums(np.where(nan, np.float32(0), values), factor_y, factor_x, np.float32)
    count = factor_y * factor_x - _block_sums(nan, factor_y, factor_x, np.uint16)
    with np.errstate(invalid="ignore"):
        return total / count


def _block_sums(values: np.ndarray, factor_y: int, factor_x: int, dtype: Any) -> np.ndarray:
    """Return sums of blocks: first of whole rows, which is quick."""
    rows = values[:, ::factor_y].astype(dtype)
    for y in range(1, factor_y):
        rows += values[:, y::factor_y]
    total = rows[..., ::factor_x].copy()
    for x in range(1, factor_x):
        total += rows[..., x::factor_x]
    return total
