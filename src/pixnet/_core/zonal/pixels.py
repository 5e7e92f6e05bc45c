"""The pixels that shapes cover in one tile, as the statistics see them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class Zones:
    """The pixels that each of n shapes covers in a tile.

    Attributes
    ----------
    coverage
        ``(n, px)``: the share of each pixel inside each shape.
    """

    coverage: csr_array

    @cached_property
    def area(self) -> NDArray[np.float64]:
        """Area of each shape, ``(n,)``, in pixels."""
        return self.reduce(np.add, self.coverage.data, empty=0.0)

    def reduce(self, function: np.ufunc, values: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
        """Reduce values of all pixels of one shape after the other, ``(nnz,)``, to one for each shape, ``(n,)``."""
        reduced = np.full(self.coverage.shape[0], empty)
        filled = np.flatnonzero(np.diff(self.coverage.indptr))
        if filled.size:
            reduced[filled] = function.reduceat(values, self.coverage.indptr[filled])
        return reduced

    def without(self, missing: NDArray[np.bool_]) -> Zones:
        """Return the zones without some pixels of the tile, ``(px,)``."""
        kept = ~missing[self.coverage.indices]
        offsets = np.zeros(len(kept) + 1, dtype=self.coverage.indptr.dtype)
        np.cumsum(kept, out=offsets[1:])
        arrays = self.coverage.data[kept], self.coverage.indices[kept], offsets[self.coverage.indptr]
        return Zones(csr_array(arrays, shape=self.coverage.shape))


@dataclass(frozen=True, eq=False)
class ZonePixels:
    """One channel of a tile in the zones.

    Attributes
    ----------
    zones
        The zones.
    plane
        ``(px,)`` float64: the values of the channel in the tile.
    """

    zones: Zones
    plane: NDArray[np.float64]

    @cached_property
    def total(self) -> NDArray[np.float64]:
        """Sum of area times value, ``(n,)``."""
        return self.zones.coverage @ self.plane

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """Values of all pixels of one shape after the other, ``(nnz,)``."""
        return self.plane[self.zones.coverage.indices]

    @cached_property
    def lists(self) -> PixelLists:
        """The values and areas of the pixels of each shape."""
        return PixelLists(self.values.astype(np.float32), self.zones.coverage.data, self.zones.coverage.indptr)


@dataclass(frozen=True, eq=False)
class PixelLists:
    """Values and areas of the pixels of each of n shapes.

    Attributes
    ----------
    values, areas
        ``(nnz,)`` float32 and float64: pixels of one shape after the other.
    offsets
        ``(n + 1,)``: shape ``i`` has pixels ``offsets[i]`` to ``offsets[i + 1]``.
    """

    values: NDArray[np.float32]
    areas: NDArray[np.float64]
    offsets: NDArray[np.integer]

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Values in ascending order within each shape, and the share of its area up to each, plus 1 for each shape before."""
        order = np.argsort(self.values)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        # A sparse matrix with a column for each rank; its rows are sorted by a compiled loop.
        matrix = csr_array((self.areas, rank, self.offsets), shape=(len(self.offsets) - 1, len(order)), copy=True)
        matrix.has_sorted_indices = False
        matrix.sort_indices()
        zones = Zones(matrix)
        sizes = np.diff(matrix.indptr)
        steps = matrix.data / np.repeat(zones.area, sizes)
        filled = sizes > 0
        # The sum starts anew at each shape, so that rounding does not add up over them.
        steps[matrix.indptr[:-1][filled][1:]] -= 1.0
        shares = np.cumsum(steps) + np.repeat(np.cumsum(filled) - 1, sizes)
        return self.values[order[matrix.indices]], shares

    def quantile(self, share: float) -> NDArray[np.float64]:
        """Return the value below which a share of the area of each shape lies, ``(n,)``; NaN for one without pixels."""
        values, shares = self._sorted
        result = np.full(len(self.offsets) - 1, np.nan)
        filled = np.flatnonzero(np.diff(self.offsets))
        first, last = self.offsets[filled], self.offsets[filled + 1] - 1
        # Where the share falls between two pixels but for rounding, both count.
        below, above = (
            values[np.clip(np.searchsorted(shares, np.arange(len(filled)) + share + shift), first, last)].astype(float)
            for shift in (-_ROUNDING, _ROUNDING)
        )
        result[filled] = np.where(np.isnan(values[last]), np.nan, (below + above) / 2)
        return result


_ROUNDING = 1e-9  # of shares of a shape's area: sums of 1e6 areas are right to 1e-10
