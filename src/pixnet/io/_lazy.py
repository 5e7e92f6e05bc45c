"""Pixels of files that are too large to decode at once: array-likes that read a region at a time."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize

from pixnet._core.slide.pyramid import CHUNK

_openslide_lock = threading.Lock()


class FileLevel:
    """One level of a slide file as ``uint8 (3, y, x)``; regions are read when sliced.

    It pickles by path: worker processes open the file themselves.
    """

    dtype = np.dtype(np.uint8)
    ndim = 3

    def __init__(self, path: Path, level: int, shape: tuple[int, int]) -> None:
        self.path = str(path)
        self.level = level
        self.shape = (3, *shape)
        # A file that was replaced must not be read through the old handle, nor be found in a cache of dask.
        self.stamp = path.stat().st_mtime_ns

    def region(self, y: slice, x: slice) -> np.ndarray:
        """Read ``uint8 (y, x, 3)``."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> np.ndarray:
        key = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis not in key:
            key.append(Ellipsis)
        at = key.index(Ellipsis)
        c, y, x = key[:at] + [slice(None)] * (4 - len(key)) + key[at + 1 :]
        y, x = (slice(*part.indices(size)[:2]) for part, size in zip((y, x), self.shape[1:]))
        if y.stop <= y.start or x.stop <= x.start:
            return np.empty((3, max(0, y.stop - y.start), max(0, x.stop - x.start)), dtype=np.uint8)[c]
        try:
            return np.ascontiguousarray(self.region(y, x).transpose(2, 0, 1))[c]
        except OSError:
            raise
        except Exception as error:
            raise OSError(
                f"{self.path} cannot be read at rows {y.start} to {y.stop}, columns {x.start} to {x.stop} of level "
                f"{self.level}: {type(error).__name__}: {error}. The file is damaged, or compressed in a way that its reader does not know"
            ) from error

    def lazy(self, tile: tuple[int, int]) -> da.Array:
        """Wrap the level as a dask array; a chunk is whole tiles of the file and about 1024 px across."""
        chunks = tuple(max(1, round(CHUNK / size)) * size if size < CHUNK else size for size in tile)
        name = f"{type(self).__name__.lower()}-{tokenize(self.path, self.stamp, self.level)}"
        return da.from_array(self, chunks=(3, *chunks), name=name, fancy=False, inline_array=True)


def flatten_alpha(pixels: np.ndarray) -> np.ndarray:
    """Lay RGBA ``(y, x, 4)`` on white; return RGB as it is."""
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    if (alpha == 255).all():
        return pixels[..., :3]
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


class TiffLevel(FileLevel):
    """A level of a TIFF, through tifffile."""

    def __init__(self, path: Path, series: int, level: int, axes: str, sizes: tuple[int, ...]) -> None:
        super().__init__(path, level, (sizes[axes.index("Y")], sizes[axes.index("X")]))
        self.series = series
        self.axes = axes
        self.sizes = sizes

    def region(self, y: slice, x: slice) -> np.ndarray:
        """Read ``uint8 (y, x, 3)``."""
        array = _open_tiff(self.path, self.stamp, self.series, self.level, os.getpid())
        where = {"Y": y, "X": x, "S": slice(None), "C": slice(None)}
        pixels = np.asarray(array[tuple(where.get(axis, 0) for axis in self.axes)])
        kept = [axis for axis in self.axes if axis in where]
        return flatten_alpha(pixels.transpose(kept.index("Y"), kept.index("X"), 3 - kept.index("Y") - kept.index("X")))


@lru_cache(maxsize=32)
def _open_tiff(path: str, stamp: int, series: int, level: int, process: int) -> Any:
    """Open a level of a TIFF, once per process."""
    import tifffile
    import zarr

    # Tiles that were left out of the file are empty glass.
    store = tifffile.imread(path, aszarr=True, series=series, level=level, fillvalue=255)
    return zarr.open(store, mode="r")


class OpenSlideLevel(FileLevel):
    """A level of a scanner's file, through OpenSlide."""

    def __init__(self, path: Path, level: int, shape: tuple[int, int], downsample: float) -> None:
        super().__init__(path, level, shape)
        self.downsample = downsample

    def region(self, y: slice, x: slice) -> np.ndarray:
        """Read ``uint8 (y, x, 3)``."""
        slide = _open_openslide(self.path, self.stamp, os.getpid())
        origin = (round(x.start * self.downsample), round(y.start * self.downsample))
        picture = slide.read_region(origin, self.level, (x.stop - x.start, y.stop - y.start))
        return flatten_alpha(np.asarray(picture))


@lru_cache(maxsize=8)
def _open_openslide(path: str, stamp: int, process: int) -> Any:
    """Open a scanner's file, once per process."""
    import openslide

    with _openslide_lock:
        return openslide.OpenSlide(path)
