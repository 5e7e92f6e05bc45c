"""Crops of a slide that hold whole shapes, and the pixels that each shape covers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.scratch import on_disk
from pixnet._core.slide.grid import ModelGrid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader

ALIGN = 64
"""Crops start at multiples of this many model pixels, as the windows of prediction do."""

CONTEXT = 16
"""Least number of model pixels between a shape and the edge of its crop."""

SMALLEST = 512
LARGEST = 2048


@dataclass(frozen=True)
class Targets:
    """The shapes of one element of a section, and what was measured in them.

    Attributes
    ----------
    name
        Name of the element, the same in every section that has it.
    shapes
        The shapes, in output pixels of the section's grid.
    counts
        Raw counts, ``(n, genes)`` CSR, with a column for each gene of the model.
    umi
        Total of each shape, ``(n,)``: all UMI, or those of the panel.
    panel
        Indices of the genes that were measured; None: all.
    within_panel
        Whether totals are those of the panel's genes, so that expression is a share of these.
    """

    name: str
    shapes: ShapeArrays
    counts: sparse.csr_array
    umi: np.ndarray
    panel: np.ndarray | None = None
    within_panel: bool = False

    def take(self, rows: np.ndarray) -> Targets:
        """Return some of the shapes."""
        return replace(self, shapes=self.shapes.take(rows), counts=self.counts[rows], umi=self.umi[rows])

    @property
    def cp10k(self) -> np.ndarray:
        """Measured CP10k, ``(n, genes)`` float32; 0 for genes that were not measured."""
        return to_cp10k(self.counts, self.umi)


def to_cp10k(counts: sparse.csr_array, umi: np.ndarray) -> np.ndarray:
    """Return counts per 10,000 of a total, dense float32."""
    return 1e4 * counts.toarray().astype(np.float32) / umi[:, None].astype(np.float32)


@dataclass(frozen=True)
class Section:
    """A slide with what was measured on it, in plain arrays."""

    name: str
    reader: SlideReader
    mask: TissueMask
    targets: list[Targets]

    @property
    def grid(self) -> ModelGrid:
        """The grid on which the model sees the slide."""
        return self.reader.grid

    @property
    def pixel_um2(self) -> float:
        """Area of a map pixel in µm²."""
        return (self.grid.mpp * self.grid.stride) ** 2


@dataclass(frozen=True)
class Placed:
    """A crop by its origin (first row and column, in model pixels) and the shapes in it: rows of each element."""

    origin: tuple[int, int]
    rows: dict[str, np.ndarray]


@dataclass(frozen=True)
class Covered(Placed):
    """A crop with the pixels that its shapes cover.

    Attributes
    ----------
    pixels
        Positions of the pixels that any shape covers, in the crop's output grid (row-major).
    weights
        Coverage ``(shapes, pixels)`` of these, for each element.
    """

    pixels: np.ndarray
    weights: dict[str, sparse.csr_array]


def crop_size(sections: Sequence[Section]) -> int:
    """Return the size in model pixels that holds every shape with its context, or refuse shapes that are too large."""
    extent = 0.0
    for section in sections:
        for targets in section.targets:
            if len(targets.shapes):
                x0, y0, x1, y1 = targets.shapes.bounds.T
                largest = float(max((x1 - x0).max(), (y1 - y0).max())) * section.grid.stride
                if largest > LARGEST - 2 * CONTEXT - ALIGN:
                    raise ValueError(
                        f"shapes {targets.name!r} of section {section.name!r} are up to {largest * section.grid.mpp:.0f} µm "
                        f"across, more than the {(LARGEST - 2 * CONTEXT - ALIGN) * section.grid.mpp:.0f} µm that can be seen "
                        "at once in training; train on smaller shapes, or at a coarser pixel size (mpp=)"
                    )
                extent = max(extent, largest)
    size = int(np.ceil((extent + 2 * CONTEXT + ALIGN) / ALIGN)) * ALIGN
    return max(SMALLEST, size)


def place_crops(section: Section, size: int) -> list[Placed]:
    """Cover the shapes of a section with crops, each shape whole in exactly one of them.

    A sweep in bands: the topmost shape left opens a band, the leftmost in it a crop, which takes every shape that lies
    inside its interior.
    """
    stride = section.grid.stride
    boxes = [t.shapes.bounds * stride for t in section.targets]
    element = np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])
    row = np.concatenate([np.arange(len(b)) for b in boxes])
    x0, y0, x1, y1 = np.concatenate(boxes).T
    crops = []
    for top, members in _sweep(y0, y1, np.arange(len(row)), size):
        for left, inside in _sweep(x0[members], x1[members], members, size):
            chosen = {t.name: np.sort(row[inside[element[inside] == i]]) for i, t in enumerate(section.targets)}
            crops.append(Placed((top, left), {name: rows for name, rows in chosen.items() if rows.size}))
    return crops


def _sweep(low: np.ndarray, high: np.ndarray, members: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Cut an axis into aligned intervals of ``size``, each with the members whole in its interior and in no earlier one."""
    order = np.argsort(low, kind="stable")
    low, high, members = low[order], high[order], members[order]
    left = np.ones(len(members), dtype=bool)
    found = []
    while left.any():
        first = low[np.argmax(left)]
        origin = int(np.floor((first - CONTEXT) / ALIGN)) * ALIGN
        inside = left & (low >= origin + CONTEXT) & (high <= origin + size - CONTEXT)
        found.append((origin, members[inside]))
        left &= ~inside
    return found


def cover(crop: Placed, section: Section, size: int) -> Covered:
    """Compute the tissue that each shape of a crop covers; shapes of which less than half is tissue are left out."""
    stride = section.grid.stride
    n = size // stride
    y0, x0 = crop.origin[0] // stride, crop.origin[1] // stride
    tissue = section.mask.window(y0, x0, n, n).ravel()
    covered = np.zeros(n * n, dtype=bool)
    rows, weights = {}, {}
    for targets in section.targets:
        if targets.name not in crop.rows:
            continue
        shapes = targets.shapes.take(crop.rows[targets.name])
        found = sparse.csr_array(coverage(shapes, (y0, x0, n, n)))
        found = sparse.csr_array(found.multiply(tissue[None, :]), dtype=np.float32)
        found.eliminate_zeros()
        on_tissue = np.asarray(found.sum(axis=1)).ravel()
        keep = np.flatnonzero((on_tissue >= 0.5 * shapes.area) & (on_tissue > 0))
        if keep.size:
            rows[targets.name], weights[targets.name] = crop.rows[targets.name][keep], found[keep]
            covered[weights[targets.name].indices] = True
    pixels = np.flatnonzero(covered).astype(np.int32)
    return Covered(crop.origin, rows, pixels, {name: w[:, pixels] for name, w in weights.items()})


def kept_on_disk(crops: Sequence[Covered]) -> list[Covered]:
    """Return the same crops with pixels and weights on disk: those of a slide take tens of megabytes."""
    arrays = []
    for crop in crops:
        arrays.append(crop.pixels)
        for weights in crop.weights.values():
            arrays += [weights.data, weights.indices]
    found = iter(on_disk(arrays))
    return [
        replace(crop, pixels=next(found), weights={name: _refilled(w, found) for name, w in crop.weights.items()})
        for crop in crops
    ]


def _refilled(weights: sparse.csr_array, arrays: Iterator[np.ndarray]) -> sparse.csr_array:
    """Return weights whose values and indices are the next of some arrays."""
    out = sparse.csr_array(weights.shape, dtype=weights.dtype)
    # Set one by one: the constructor copies parts of a larger array.
    out.data, out.indices, out.indptr = next(arrays), next(arrays), weights.indptr
    return out
