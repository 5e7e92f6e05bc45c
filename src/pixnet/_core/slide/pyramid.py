"""The levels of a pyramid: means of blocks of pixels of the level before."""

from __future__ import annotations

from itertools import product
from typing import Any

import dask.array as da
import numpy as np

CHUNK = 1024
"""Chunks of a slide's levels have this many pixels a side."""


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
    channels, height, width = values.shape
    shape = (channels, height // factor_y, width // factor_x)
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.uint16)
    for y, x in product(range(factor_y), range(factor_x)):
        part = values[:, y::factor_y, x::factor_x][:, : shape[1], : shape[2]]
        there = ~np.isnan(part)
        np.add(total, part, out=total, where=there)
        count += there
    with np.errstate(invalid="ignore"):
        return total / count
