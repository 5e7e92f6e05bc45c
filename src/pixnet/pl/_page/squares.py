"""A map reduced to squares, each summed as `pixnet.tl.aggregate` sums a shape, and packed in bytes for a page."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet._core.coverage import ShapeArrays
from pixnet._core.zonal import Mean, zonal_statistics
from pixnet._sdata.gene_map import GeneMap, ProgramMap, ProgramSelection, Selection
from pixnet.pl._frame import make_frame, read_pixels

MOST_SQUARES = 400_000
"""Squares that a page recolours within a tenth of a second."""
FEWEST_SQUARES = 40_000
"""Squares below which a map shows too little; where the genes of a gene map would leave fewer, some are left out."""
USUAL_BYTES = 0.55
"""Bytes of a packed value, about."""


@dataclass(frozen=True)
class Grid:
    """Squares on a map, row by row.

    Attributes
    ----------
    left, top
        Corner of the first square, in pixels of the map.
    side
        Side of a square, in pixels of the map.
    rows, cols
        Number of squares.
    """

    left: float
    top: float
    side: float
    rows: int
    cols: int

    @property
    def shapes(self) -> ShapeArrays:
        """The squares."""
        row, col = (index.ravel() for index in np.indices((self.rows, self.cols)))
        x, y = self.left + col * self.side, self.top + row * self.side
        corners = np.column_stack([x, y, x + self.side, y + self.side])
        return ShapeArrays.from_rectangles(corners, np.arange(len(x)), len(x))


@dataclass(frozen=True)
class Squares:
    """What a map holds in the squares that have a prediction.

    Attributes
    ----------
    grid
        All squares.
    known
        ``(rows * cols,)`` bool: the squares with a prediction, n in number.
    names
        Programs, or genes.
    codes
        ``(channels, n)`` uint8: CP10k of each, as ``top * (code / 255) ** 2``.
    tops
        ``(channels,)``: the largest value of each.
    total
        ``(n,)`` float32: density of all transcripts / 10,000.
    packed
        The codes, compressed.
    """

    grid: Grid
    known: NDArray[np.bool_]
    names: list[str]
    codes: NDArray[np.uint8]
    tops: NDArray[np.float32]
    total: NDArray[np.float32]
    packed: bytes

    def values(self, channel: int) -> NDArray[np.float32]:
        """Return CP10k of a channel, as the page has it."""
        return self.tops[channel] * (self.codes[channel].astype(np.float32) / 255) ** 2


def coded(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the codes ``(channels, n)`` of values from 0 up, and the largest of each channel.

    Steps are finer for low values: most places have a little of a program, and few have much.
    """
    tops = np.nanmax(values, axis=1, initial=0).astype(np.float32)
    scaled = np.sqrt(np.clip(values, 0, None) / np.where(tops > 0, tops, 1)[:, None])
    return np.rint(255 * np.nan_to_num(scaled)).astype(np.uint8), tops


def coded_finely(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Return high and low bytes of codes of 16 bits in equal steps, and the largest value of each row."""
    tops = values.max(axis=1, initial=0).astype(np.float32)
    codes = np.rint(65535 * (values / np.where(tops > 0, tops, 1)[:, None]).clip(0, 1)).astype(np.uint16)
    return (codes >> 8).astype(np.uint8), (codes & 255).astype(np.uint8), tops


def compressed(codes: NDArray[np.uint8]) -> bytes:
    """Return codes as differences along each row, deflated: neighbours are alike."""
    return zlib.compress(np.diff(codes, axis=-1, prepend=np.uint8(0)).tobytes(), 6)


def squares_of(sdata: SpatialData, opened: GeneMap, genes: Sequence[str] | None, most_bytes: int) -> Squares:
    """Sum a map over squares as small as its packed codes allow.

    Parameters
    ----------
    sdata, opened
        The object, and its map.
    genes
        Genes of a map that has a channel for each; None for a map of programs.
    most_bytes
        Size of the packed codes at most.
    """
    selection: Selection = opened.all_programs if isinstance(opened, ProgramMap) else opened.select(genes)
    channels = len(opened.programs) if isinstance(opened, ProgramMap) else len(selection.genes)
    box, n_pixels = predicted(sdata, opened)
    wanted = min(most_bytes / channels / USUAL_BYTES, MOST_SQUARES)
    for _ in range(6):
        side = max(1.0, math.sqrt(n_pixels / wanted))
        found = _summed(opened, selection, _grid(box, side))
        n = int(found.known.sum())
        fits = len(found.packed) <= most_bytes and n <= 1.1 * MOST_SQUARES
        finest = side == 1.0 or n >= 0.8 * MOST_SQUARES or len(found.packed) >= 0.75 * most_bytes
        if fits and finest:
            break
        wanted = min(n * 0.9 * most_bytes / len(found.packed), MOST_SQUARES)
    return found


def predicted(sdata: SpatialData, opened: GeneMap) -> tuple[tuple[float, float, float, float], float]:
    """Return the bounds of what a map predicts, in its pixels, and the number of these pixels (both about).

    Raises
    ------
    ValueError
        If no pixel has a value.
    """
    frame = make_frame(sdata, opened.key)
    pixels = read_pixels(frame, opened.key, 800, [opened.validity])
    known = np.isfinite(pixels.values[0])
    if not known.any():
        raise ValueError(f"map {opened.key!r} has no prediction: every pixel is NaN; there is nothing to report")
    to_map = np.diag([1 / frame.unit_per_pixel] * 2 + [1.0]) @ pixels.affine
    y0, y1 = np.flatnonzero(known.any(axis=1))[[0, -1]]
    x0, x1 = np.flatnonzero(known.any(axis=0))[[0, -1]]
    low = to_map @ [x0 - 1, y0 - 1, 1]
    high = to_map @ [x1 + 2, y1 + 2, 1]
    height, width = opened.data.sizes["y"], opened.data.sizes["x"]
    box = (max(low[0], 0.0), max(low[1], 0.0), min(high[0], width), min(high[1], height))
    return box, known.sum() * abs(np.linalg.det(to_map[:2, :2]))


def _grid(box: tuple[float, float, float, float], side: float) -> Grid:
    left, top = (math.floor(v / side) * side for v in box[:2])
    return Grid(left, top, side, math.ceil((box[3] - top) / side), math.ceil((box[2] - left) / side))


def _summed(opened: GeneMap, selection: Selection, grid: Grid) -> Squares:
    """Sum a map over squares, and pack what is found."""
    sums = zonal_statistics(
        opened.data.data,
        grid.shapes,
        channels=selection.channels,
        validity=len(selection.channels) - 1,
        statistics=selection.needs,
        description=f"report {opened.key}",
    )
    known = sums.area > 0
    found = {name: values[known] for name, values in sums.values.items()}
    del sums
    total = selection.total(found[Mean.name]).astype(np.float32) / np.float32(1e4)
    if isinstance(selection, ProgramSelection):
        values = selection.programs(found[Mean.name])
    else:
        values = selection.cp10k(found, opened.pixel_um2)
    names = (
        [opened.programs[i] for i in range(len(opened.programs))] if isinstance(opened, ProgramMap) else selection.genes
    )
    codes, tops = coded(np.ascontiguousarray(values.T))
    return Squares(grid, known, names, codes, tops, total, compressed(codes))
