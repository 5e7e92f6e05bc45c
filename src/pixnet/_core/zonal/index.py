"""Which shapes each tile of an image concerns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixnet._core.coverage import ShapeArrays
from pixnet._core.coverage.fractions import boxes_in
from pixnet._core.zonal.reader import Edges, Window

_LIST_PX = 100  # the objects of a list in Python


class Tile(NamedTuple):
    """A part of an image, and what is asked of it.

    Attributes
    ----------
    window
        ``y0, x0, h, w``.
    rows
        Positions of the shapes that reach into it; first those that lie in this tile alone, ``n_inner`` of them.
    n_inner
        Number of shapes that lie in this tile alone.
    """

    window: Window
    rows: NDArray[np.int64]
    n_inner: int


class TileIndex:
    """The tiles that any shape's bounding box reaches into, in order, each with the positions of those shapes.

    Parameters
    ----------
    shapes
        The shapes, in pixels of the image.
    edges
        Borders of the tiles along y and x.

    Attributes
    ----------
    counts
        ``(n,)``: how many tiles each shape reaches into.
    """

    def __init__(self, shapes: ShapeArrays, edges: tuple[Edges, Edges]) -> None:
        self._y, self._x = y, x = edges
        x0, y0, x1, y1 = shapes.bounds.T
        with np.errstate(invalid="ignore"):
            inside = (x1 > x[0]) & (y1 > y[0]) & (x0 < x[-1]) & (y0 < y[-1])
        shape = np.flatnonzero(inside)
        first_x = np.maximum(np.searchsorted(x, x0[shape], side="right") - 1, 0)
        first_y = np.maximum(np.searchsorted(y, y0[shape], side="right") - 1, 0)
        n_x = np.minimum(np.searchsorted(x, x1[shape], side="left"), len(x) - 1) - first_x
        n_y = np.minimum(np.searchsorted(y, y1[shape], side="left"), len(y) - 1) - first_y
        n = n_x * n_y
        self.counts = np.zeros(len(shapes), dtype=np.int64)
        self.counts[shape] = n
        nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        across = np.repeat(n_x, n)
        tile = (np.repeat(first_y, n) + nth // across) * (len(x) - 1) + np.repeat(first_x, n) + nth % across
        order = np.argsort(tile.astype(np.min_scalar_type((len(x) - 1) * (len(y) - 1))), kind="stable")  # radix sort
        self._members = np.repeat(shape, n)[order]
        self._tiles, self._first = np.unique(tile[order], return_index=True)

    def __len__(self) -> int:
        return len(self._tiles)

    def __iter__(self) -> Iterator[Tile]:
        ends = np.append(self._first[1:], len(self._members))
        for tile, first, end in zip(self._tiles, self._first, ends):
            row, column = divmod(int(tile), len(self._x) - 1)
            y0, x0 = int(self._y[row]), int(self._x[column])
            window = (y0, x0, int(self._y[row + 1]) - y0, int(self._x[column + 1]) - x0)
            members = self._members[first:end]
            inner = self.counts[members] == 1
            yield Tile(window, np.concatenate([members[inner], members[~inner]]), int(inner.sum()))

    @property
    def n_px(self) -> int:
        """Number of pixels of the tiles."""
        rows, columns = np.divmod(self._tiles, len(self._x) - 1)
        return int((np.diff(self._y)[rows] * np.diff(self._x)[columns]).sum())

    def most_held(self, shapes: ShapeArrays) -> float:
        """Return how many pixels are held at a time if each tile keeps those of the shapes that reach beyond it.

        A tile's pixels are let go after the last of the tiles that these shapes reach into. A shape's pixels are taken
        to be spread evenly over its tiles, and the list of them in each tile to take as much as `_LIST_PX` pixels.
        """
        if not len(self):
            return 0.0
        boxes = boxes_in(shapes, (0, 0, int(self._y[-1]), int(self._x[-1])))
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        pixels = np.minimum(width * height, shapes.area + 2 * (width + height))  # inside, and on the outline
        counts = self.counts[self._members]
        tile = np.repeat(np.arange(len(self)), np.diff(np.append(self._first, len(self._members))))
        last = np.zeros(len(shapes), dtype=np.int64)
        np.maximum.at(last, self._members, tile)
        held = np.bincount(tile, np.where(counts > 1, pixels[self._members] / counts + _LIST_PX, 0.0))
        let_go = np.maximum.reduceat(np.where(counts > 1, last[self._members], 0), self._first)
        freed = np.bincount(let_go, held, minlength=len(self))
        return float((np.cumsum(held) - np.cumsum(freed) + freed).max())
