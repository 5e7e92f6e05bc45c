"""Which shapes each tile of an image concerns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pixnet._core.coverage.shapes import ShapeArrays
from pixnet._core.zonal.reader import Edges, Window


class TileIndex:
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

    def __init__(self, geometries: ShapeArrays, edges: tuple[Edges, Edges]) -> None:
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
