"""Where to look while training: crops of a slide that hold whole shapes, and what of their pixels each shape covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import sparse

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.slide.grid import ModelGrid
from pixnet._core.slide.reader import SlideReader

ALIGN = 64
"""Crops start at multiples of this many model pixels, as the windows of prediction do."""

CONTEXT = 16
"""Model pixels between a shape and the edge of its crop, at least."""

SMALLEST = 512
LARGEST = 2048


class Mask(Protocol):
    """Tells which output pixels are tissue."""

    def window(self, y0: int, x0: int, height: int, width: int) -> np.ndarray: ...


@dataclass
class Targets:
    """The shapes of one element of one section, and what was measured in them.

    Attributes
    ----------
    name
        The element's name, the same in every section that has it.
    geometries
        In output pixels of the section's grid.
    cp10k
        Measured ``(n, genes)`` float32.
    depth
        All UMI of each shape, ``(n,)``.
    """

    name: str
    geometries: ShapeArrays
    cp10k: np.ndarray
    depth: np.ndarray


@dataclass
class Section:
    """A slide with what was measured on it, in plain arrays."""

    name: str
    reader: SlideReader
    mask: Mask
    targets: list[Targets]

    @property
    def grid(self) -> ModelGrid:
        """The grid on which the model sees the slide."""
        return self.reader.grid


@dataclass
class Crop:
    """One crop of a section and the shapes that lie whole in it.

    Attributes
    ----------
    section
        Position of the section in the list that was given.
    origin
        First row and column, in model pixels.
    weights
        For each element's name: coverage ``(shapes, pixels)`` of the crop's tissue pixels.
    rows
        For each element's name: which shapes these are.
    pixels
        Positions of the pixels that any shape covers, in the crop's output grid (row-major).
    """

    section: int
    origin: tuple[int, int]
    weights: dict[str, sparse.csr_array] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def crop_size(sections: Sequence[Section]) -> int:
    """Return the size in model pixels that holds every shape with its context.

    Raises
    ------
    ValueError
        If a shape is too large to be seen at once.
    """
    extent = 0.0
    for section in sections:
        for targets in section.targets:
            if len(targets.geometries):
                x0, y0, x1, y1 = targets.geometries.bounds.T
                largest = float(max((x1 - x0).max(), (y1 - y0).max())) * section.grid.stride
                if largest > LARGEST - 2 * CONTEXT - ALIGN:
                    raise ValueError(
                        f"shapes {targets.name!r} of section {section.name!r} are up to {largest * section.grid.mpp:.0f} um "
                        f"across, more than the {(LARGEST - 2 * CONTEXT - ALIGN) * section.grid.mpp:.0f} um that can be seen "
                        "at once in training; train on smaller shapes, or at a coarser um/px (mpp=)"
                    )
                extent = max(extent, largest)
    size = int(np.ceil((extent + 2 * CONTEXT + ALIGN) / ALIGN)) * ALIGN
    return max(SMALLEST, size)


def place_crops(section: Section, index: int, size: int) -> list[Crop]:
    """Cover the shapes of a section with crops, each shape whole in exactly one of them.

    A sweep in bands: the topmost shape left opens a band, the leftmost in it a crop, which takes every shape that lies
    inside its interior.
    """
    stride = section.grid.stride
    boxes = [t.geometries.bounds * stride for t in section.targets]
    owner = np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])
    row = np.concatenate([np.arange(len(b)) for b in boxes])
    x0, y0, x1, y1 = np.concatenate(boxes).T
    crops = []
    for top, members in _sweep(y0, y1, np.arange(len(row)), size):
        for left, inside in _sweep(x0[members], x1[members], members, size):
            crop = Crop(index, (top, left))
            for i, targets in enumerate(section.targets):
                chosen = np.sort(row[inside[owner[inside] == i]])
                if chosen.size:
                    crop.rows[targets.name] = chosen
            crops.append(crop)
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


def weigh(crop: Crop, section: Section, size: int) -> None:
    """Compute what each shape covers of the crop's tissue; shapes on too little tissue leave the crop."""
    stride = section.grid.stride
    n = size // stride
    y0, x0 = crop.origin[0] // stride, crop.origin[1] // stride
    tissue = section.mask.window(y0, x0, n, n).ravel()
    covered = np.zeros(n * n, dtype=bool)
    for targets in section.targets:
        if targets.name not in crop.rows:
            continue
        rows = crop.rows[targets.name]
        shapes = targets.geometries.take(rows)
        weights = sparse.csr_array(coverage(shapes, (y0, x0, n, n)))
        weights = sparse.csr_array(weights.multiply(tissue[None, :]))
        weights.eliminate_zeros()
        on_tissue = np.asarray(weights.sum(axis=1)).ravel()
        keep = (on_tissue >= 0.5 * shapes.area) & (on_tissue > 0)
        crop.rows[targets.name] = rows[keep]
        crop.weights[targets.name] = weights[np.flatnonzero(keep)]
        covered[crop.weights[targets.name].indices] = True
    crop.pixels = np.flatnonzero(covered)
    for name, weights in crop.weights.items():
        crop.weights[name] = weights[:, crop.pixels]
    for name in [name for name, rows in crop.rows.items() if not rows.size]:
        del crop.rows[name], crop.weights[name]
