"""Features of a slide on disk: a memory map for each of the encoder's levels, at the level's own stride."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixnet._core.predict.map_grid import Box


class FeatureMaps:
    """Features of one version of a slide.

    Files are as large as the slide and have holes where nothing was written, so they take no more disk than what is
    there. They are written as files and read as memory maps: a full disk is an error, not the end of the process.

    Parameters
    ----------
    folder
        Where the files go.
    box
        The part of the slide (model pixels) that the maps cover.
    strides, channels
        Stride and number of channels of each level.
    """

    def __init__(self, folder: Path, box: Box, strides: Mapping[int, int], channels: Mapping[int, int]) -> None:
        self.box, self.strides, self.channels = box, dict(strides), dict(channels)
        folder.mkdir(parents=True)
        self._paths = {level: folder / f"level_{level}.f16" for level in strides}
        self._inodes: dict[int, int] = {}
        self._mapped: dict[int, mmap.mmap] = {}
        self._arrays: dict[int, np.ndarray] = {}
        for level, path in self._paths.items():
            shape = (box.height // strides[level], box.width // strides[level], channels[level])
            with open(path, "x+b") as file:
                file.truncate(2 * int(np.prod(shape)))
                self._inodes[level] = path.stat().st_ino
                self._mapped[level] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._arrays[level] = np.frombuffer(self._mapped[level], np.float16).reshape(shape)

    def write(self, level: int, part: Box, values: np.ndarray) -> None:
        """Write the features ``(y, x, C)`` of a part of the slide that lies in the box."""
        rows, columns = part.within(self.box).divided(self.strides[level]).slices
        pixel = 2 * self.channels[level]
        width = self._arrays[level].shape[1]
        with open(self._paths[level], "r+b") as file:
            for y, row in zip(range(rows.start, rows.stop), np.ascontiguousarray(values, np.float16)):
                file.seek((y * width + columns.start) * pixel)
                file.write(row.data)

    def read(self, level: int, part: Box) -> np.ndarray:
        """Return the features ``(y, x, C)`` of a part of the slide; beyond the box the outermost are repeated."""
        array = self._arrays[level]
        rows, columns = part.within(self.box).divided(self.strides[level]).slices
        if rows.start >= 0 and columns.start >= 0 and rows.stop <= array.shape[0] and columns.stop <= array.shape[1]:
            return array[rows, columns]
        y, x = (np.arange(s.start, s.stop).clip(0, n - 1) for s, n in zip((rows, columns), array.shape))
        return array[y[:, None], x]

    def array(self, level: int) -> np.ndarray:
        """Return the features of a level, ``(y, x, C)``, from the corner of the box on; they are on disk."""
        return self._arrays[level]

    def forget(self) -> None:
        """Let go of the memory of what was read; it is read again from disk, or the system's cache of it."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._mapped.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def intact(self) -> bool:
        """Whether the files are still there, and the same."""
        try:
            return all(path.stat().st_ino == self._inodes[level] for level, path in self._paths.items())
        except OSError:
            return False

    def remove(self) -> None:
        """Delete the files; arrays that are in use stay readable."""
        for path in self._paths.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
