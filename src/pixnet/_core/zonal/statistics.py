"""Statistics of the pixels of shapes. Each is one class, and this file is the only one that knows it.

A tile's pixels are handed to a statistic channel by channel (`Statistic.update`). What comes back describes the pixels
of each shape in that tile. For a shape within one tile this is all there is, and `Statistic.finish` makes a number of
it; for others the tiles' parts are collected first (`Statistic.start`, `merge` and `take`), in the order of the tiles.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet._core.zonal.pixels import PixelLists, ZonePixels


class Statistic(ABC):
    """A statistic of the pixels of shapes.

    Attributes
    ----------
    name
        Its name, as users write it.
    syntax
        How messages list it; empty: by its name.
    extensive
        Whether it grows with the area: a sum over pixels is to be multiplied by a pixel's area, a mean is not.
    linear
        Whether that of a sum of channels is the sum of theirs.
    bytes_per_pixel
        Memory that it takes for each pixel of a shape until the last tile of the shape is done, for each channel.
    """

    name: str
    syntax = ""
    extensive = False
    linear = False
    bytes_per_pixel = 0

    @classmethod
    def from_name(cls, name: str) -> Statistic | None:
        """Return the statistic of this name, or None if it is not of this class."""
        return cls() if name == cls.name else None

    @abstractmethod
    def update(self, pixels: ZonePixels) -> Any:
        """Return what describes the pixels of each shape in one tile and channel."""

    @abstractmethod
    def start(self, n_shapes: int, n_channels: int) -> Any:
        """Return an empty collection of what `update` returns, for shapes in several tiles."""

    @abstractmethod
    def merge(self, state: Any, rows: NDArray[np.int64], parts: Sequence[Any]) -> None:
        """Add a tile's part of the shapes ``rows``, one for each channel, to a collection."""

    @abstractmethod
    def take(self, state: Any, rows: NDArray[np.int64], channel: int) -> Any:
        """Return what was collected for some shapes, in the form of `update`; it is not asked for again."""

    @abstractmethod
    def finish(self, part: Any) -> NDArray[np.float64]:
        """Return the statistic of each shape, ``(n,)``; NaN where it has no pixel."""

    def unit(self, unit: str, area: str) -> str:
        """Return the unit of the statistic of values with a unit, where areas are in ``area``."""
        return unit


class _FixedSize(Statistic):
    """A statistic that describes any number of pixels by a few numbers: arrays ``(n,)``, one for each."""

    initial: tuple[float, ...]

    def start(self, n_shapes: int, n_channels: int) -> NDArray[np.float64]:
        initial = np.array(self.initial)[:, None, None]
        return np.broadcast_to(initial, (len(initial), n_shapes, n_channels)).copy()

    def merge(self, state: NDArray, rows: NDArray[np.int64], parts: Sequence[tuple[NDArray, ...]]) -> None:
        state[:, rows] = self.join(state[:, rows], np.moveaxis(np.array(parts), 0, -1))

    def take(self, state: NDArray, rows: NDArray[np.int64], channel: int) -> NDArray[np.float64]:
        return state[:, rows, channel]

    def join(self, a: NDArray, b: NDArray) -> NDArray[np.float64]:
        """Describe the pixels of both together."""
        return a + b


class Mean(_FixedSize):
    """Mean of the pixels, weighted by their area inside the shape."""

    name = "mean"
    linear = True
    initial = (0.0, 0.0)

    def update(self, pixels: ZonePixels) -> tuple[NDArray[np.float64], ...]:
        return pixels.zones.area, pixels.total

    def finish(self, part: Sequence[NDArray]) -> NDArray[np.float64]:
        area, total = part
        return total / area


class Sum(Mean):
    """Sum of the pixels, weighted by their area inside the shape."""

    name = "sum"
    extensive = True

    def finish(self, part: Sequence[NDArray]) -> NDArray[np.float64]:
        area, total = part
        return np.where(area > 0, total, np.nan)

    def unit(self, unit: str, area: str) -> str:
        return unit.removesuffix(f" / {area}") if unit.endswith(f" / {area}") else f"{unit} x {area}"


class Std(_FixedSize):
    """Standard deviation of the pixels, weighted by their area inside the shape."""

    name = "std"
    initial = (0.0, 0.0, 0.0)

    def update(self, pixels: ZonePixels) -> tuple[NDArray[np.float64], ...]:
        # About the mean, in a second pass: the difference of large squares would lose all digits.
        coverage, area = pixels.zones.coverage, pixels.zones.area
        distance = np.repeat(pixels.total / area, np.diff(coverage.indptr))
        distance -= pixels.values
        distance *= distance
        distance *= coverage.data
        squares = pixels.zones.reduce(np.add, distance, empty=0.0)
        return area, pixels.total, squares

    def join(self, a: NDArray, b: NDArray) -> NDArray[np.float64]:
        # Chan's rule: squares about two means become squares about their common mean.
        between = (b[1] / b[0] - a[1] / a[0]) ** 2 * a[0] * b[0] / (a[0] + b[0])
        joined = a + b
        joined[2] += np.where((a[0] > 0) & (b[0] > 0), between, 0.0)
        return joined

    def finish(self, part: Sequence[NDArray]) -> NDArray[np.float64]:
        area, _, squares = part
        return np.sqrt(squares / area)


class Min(_FixedSize):
    """Smallest value of the pixels of which any part lies inside the shape."""

    name = "min"
    initial = (np.nan,)
    choose: np.ufunc = np.fmin  # of a number and NaN, the number

    def update(self, pixels: ZonePixels) -> tuple[NDArray[np.float64]]:
        return (pixels.zones.reduce(self.choose, pixels.values, empty=np.nan),)

    def join(self, a: NDArray, b: NDArray) -> NDArray[np.float64]:
        return self.choose(a, b)

    def finish(self, part: Sequence[NDArray]) -> NDArray[np.float64]:
        return part[0]


class Max(Min):
    """Largest value of the pixels of which any part lies inside the shape."""

    name = "max"
    choose = np.fmax


class Quantile(Statistic):
    """Value below which a share of a shape's area lies; where a range of values does it, the middle of that range.

    Without weights it is numpy's ``quantile(..., method="averaged_inverted_cdf")``, and for a share of 0.5 its
    ``median``. It is exact: pixels of shapes in several tiles are kept until their last tile.

    Parameters
    ----------
    name
        ``"median"``, or ``"q"`` and the share in percent, such as ``"q90"``.
    share
        The share, above 0 and below 1.
    """

    name = "median"
    syntax = "'median', 'q90' (any percentage)"
    bytes_per_pixel = 4

    def __init__(self, name: str, share: float) -> None:
        self.name, self.share = name, share

    @classmethod
    def from_name(cls, name: str) -> Quantile | None:
        match = re.fullmatch(r"q(\d+(\.\d+)?)", "q50" if name == "median" else name)
        share = float(match[1]) / 100 if match else 0.0
        return cls(name, share) if 0 < share < 1 else None

    def update(self, pixels: ZonePixels) -> PixelLists:
        return pixels.lists

    def start(self, n_shapes: int, n_channels: int) -> list[dict[int, list[tuple[NDArray, NDArray]]]]:
        return [defaultdict(list) for _ in range(n_channels)]

    def merge(self, state: Any, rows: NDArray[np.int64], parts: Sequence[PixelLists]) -> None:
        for shapes, part in zip(state, parts):
            for row, start, stop in zip(rows.tolist(), part.offsets[:-1].tolist(), part.offsets[1:].tolist()):
                shapes[row].append((part.values[start:stop], part.areas[start:stop]))

    def take(self, state: Any, rows: NDArray[np.int64], channel: int) -> PixelLists:
        shapes = [state[channel].pop(row) for row in rows.tolist()]
        values, areas = (np.concatenate([piece[k] for pieces in shapes for piece in pieces]) for k in range(2))
        sizes = [sum(len(piece[0]) for piece in pieces) for pieces in shapes]
        return PixelLists(values, areas, np.concatenate([[0], np.cumsum(sizes)]))

    def finish(self, part: PixelLists) -> NDArray[np.float64]:
        return part.quantile(self.share)


_CLASSES: tuple[type[Statistic], ...] = (Mean, Sum, Std, Min, Max, Quantile)

VALID_NAMES = ", ".join(cls.syntax or repr(cls.name) for cls in _CLASSES)
"""Names of all statistics, for messages."""


def find_statistic(name: str) -> Statistic | None:
    """Return the statistic of a name, or None if there is none."""
    return next((found for cls in _CLASSES if (found := cls.from_name(name)) is not None), None)
