"""Batches of crops: which go together, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Sampler

from pixnet._core.train.crops import to_cp10k
from pixnet._core.train.dataset import Crop, CropDataset

TRAINED_PX, VALIDATED_PX = 24, 96
"""Pixels of each shape that a step of training looks at, and that validation looks at, about: more change the mean little."""


class SectionBatchSampler(Sampler[list[int]]):
    """Batches of crops of one section each, the sections taking turns.

    A batch ends once every element in it has ``shapes`` shapes, or once it has ``crops`` crops. With a ``generator``
    the crops are shuffled anew at each pass.
    """

    def __init__(self, dataset: CropDataset, shapes: int, crops: int, generator: torch.Generator | None = None) -> None:
        self.dataset, self.shapes, self.crops, self.generator = dataset, shapes, crops, generator

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.dataset)
        order = range(n) if self.generator is None else torch.randperm(n, generator=self.generator).tolist()
        return iter(self._batches(order))

    def __len__(self) -> int:
        """Return the number of batches of the crops in order; shuffled, it may differ by a few."""
        return len(self._batches(range(len(self.dataset))))

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        by_section: dict[int, list[int]] = {}
        for i in order:
            by_section.setdefault(self.dataset[i].section, []).append(i)
        found = [self._of_section(by_section[section]) for section in sorted(by_section)]
        rounds = max((len(batches) for batches in found), default=0)
        return [batches[r] for r in range(rounds) for batches in found if r < len(batches)]

    def _of_section(self, order: Sequence[int]) -> list[list[int]]:
        out: list[list[int]] = [[]]
        count: dict[str, int] = {}
        for i in order:
            out[-1].append(i)
            for name, targets in self.dataset[i].targets.items():
                count[name] = count.get(name, 0) + len(targets.rows)
            if min(count.values()) >= self.shapes or len(out[-1]) >= self.crops:
                out.append([])
                count = {}
        if not out[-1]:
            out.pop()
        elif len(out) > 1 and min(count.values()) < self.shapes // 3:
            remnant = out.pop()  # too small for a correlation
            out[-1] += remnant
        return out


@dataclass(frozen=True)
class BatchTargets:
    """The shapes of one element in a batch: sparse weights ``(shapes, pixels)``, and what was measured in them."""

    weights: Tensor
    cp10k: Tensor
    depth: Tensor
    umi: Tensor

    def to(self, device: str) -> BatchTargets:
        """Return the same on a device."""
        return BatchTargets(*(t.to(device) for t in (self.weights, self.cp10k, self.depth, self.umi)))

    @property
    def covered(self) -> Tensor:
        """Number of map pixels that each shape covers, ``(shapes,)``."""
        return torch.sparse.sum(self.weights, dim=1).to_dense()


@dataclass(frozen=True)
class Batch:
    """Some crops of one section.

    Attributes
    ----------
    crops
        Positions of the crops in their data set.
    section
        Position of their section.
    crop_of_pixel, pixel
        For each pixel that shapes cover: which of the batch's crops it lies in, and its position there (row-major).
    targets
        The shapes, by element.
    """

    crops: list[int]
    section: int
    crop_of_pixel: Tensor
    pixel: Tensor
    targets: dict[str, BatchTargets]

    def to(self, device: str) -> Batch:
        """Return the same on a device."""
        moved = {name: targets.to(device) for name, targets in self.targets.items()}
        return Batch(self.crops, self.section, self.crop_of_pixel.to(device), self.pixel.to(device), moved)


def collate(
    dataset: CropDataset, indices: list[int], enough: int | None = None, rng: torch.Generator | None = None
) -> Batch:
    """Put crops together, with about ``enough`` pixels of each shape (None: all), which ``rng`` draws."""
    crops = [dataset[i] for i in indices]
    side = dataset.size // dataset.sections[crops[0].section].grid.stride
    pixels, weights = zip(*(_sampled(crop, side, enough, rng) for crop in crops))
    targets = {}
    for name in sorted({name for crop in crops for name in crop.targets}):
        parts = [crop.targets[name] for crop in crops if name in crop.targets]
        blocks = [w.get(name, sparse.csr_array((0, len(p)))) for w, p in zip(weights, pixels)]
        matrix = sparse.coo_array(sparse.block_diag(blocks, format="coo"))
        positions = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        values = torch.from_numpy(matrix.data.astype(np.float32))
        tensor = torch.sparse_coo_tensor(positions, values, matrix.shape, check_invariants=False)
        targets[name] = BatchTargets(
            tensor.coalesce(),
            torch.from_numpy(np.concatenate([to_cp10k(t.counts, t.umi) for t in parts])),
            torch.from_numpy(np.concatenate([t.depth for t in parts]).astype(np.float32)),
            torch.from_numpy(np.concatenate([t.umi for t in parts]).astype(np.float32)),
        )
    crop_of_pixel = torch.from_numpy(np.repeat(np.arange(len(crops)), [len(p) for p in pixels]))
    pixel = torch.from_numpy(np.concatenate(pixels).astype(np.int64))
    return Batch(indices, crops[0].section, crop_of_pixel, pixel, targets)


def _sampled(
    crop: Crop, side: int, enough: int | None, rng: torch.Generator | None
) -> tuple[np.ndarray, dict[str, sparse.csr_array]]:
    """Return a crop's pixels and weights, of its pixels those on a lattice: the smallest shape keeps ``enough``, about.

    A lattice has the mean of a shape more nearly than as many pixels drawn one by one. ``rng`` shifts it; ``side`` is
    that of the crop in pixels.
    """
    weights = {name: targets.weights for name, targets in crop.targets.items()}
    fewest = min(int(np.diff(w.indptr).min()) for w in weights.values())
    n = 1 if enough is None else fewest // enough
    if n < 2:
        return crop.pixels, weights
    # The n-th pixels of each row, shifted from row to row by the golden section: their neighbours lie all around.
    step = next(s for s in range(round(n * 0.618), n + 2) if math.gcd(s, n) == 1)
    shift = 0 if rng is None else int(torch.randint(n, (1,), generator=rng))
    kept = np.flatnonzero((crop.pixels % side + step * (crop.pixels // side)) % n == shift)
    return crop.pixels[kept], {name: w[:, kept] for name, w in weights.items()}
