"""What training works on: crops with their measurements, cut into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from pixnet._core.train.crops import Crop, Section, place_crops, weigh


@dataclass
class Measured:
    """What was measured in the shapes of one element of one section that can be trained on.

    Attributes
    ----------
    cp10k
        ``(shapes, genes)``.
    depth
        UMI per covered area over its mean, times 1e4, ``(shapes,)``; 0 where a shape trains nothing.
    umi
        All UMI of each shape, ``(shapes,)``.
    """

    cp10k: Tensor
    depth: Tensor
    umi: Tensor


class CropDataset:
    """Crops of some sections with everything that training needs of them.

    Parameters
    ----------
    sections
        The sections.
    size
        Size of the crops in model pixels.
    """

    def __init__(self, sections: Sequence[Section], size: int) -> None:
        self.sections = list(sections)
        self.size = size
        self.crops: list[Crop] = []
        self.measured: list[dict[str, Measured]] = []
        self.left_out: dict[str, int] = {}
        for index, section in enumerate(self.sections):
            crops = place_crops(section, index, size)
            for crop in crops:
                weigh(crop, section, size)
            self.crops += [crop for crop in crops if crop.rows]
            self.measured.append(self._measure(section, crops))
        self.features: list[list[Tensor]] = []

    def _measure(self, section: Section, crops: Sequence[Crop]) -> dict[str, Measured]:
        """Normalise depth per tissue area by its mean over the section's shapes of that element."""
        out = {}
        for targets in section.targets:
            area = np.zeros(len(targets.depth))
            for crop in crops:
                if targets.name in crop.rows:
                    area[crop.rows[targets.name]] = np.asarray(crop.weights[targets.name].sum(axis=1)).ravel()
            used = area > 0
            if (~used).any():
                self.left_out[f"{section.name}/{targets.name}"] = int((~used).sum())
            depth = np.zeros_like(area)
            if used.any():
                depth[used] = targets.depth[used] / area[used]
                depth *= 1e4 / depth[used].mean()
            out[targets.name] = Measured(
                torch.from_numpy(targets.cp10k),
                torch.from_numpy(depth.astype(np.float32)),
                torch.from_numpy(targets.depth.astype(np.float32)),
            )
        return out

    @classmethod
    def joined(cls, a: CropDataset, b: CropDataset) -> CropDataset:
        """Return the crops of both, with their features."""
        out = cls.__new__(cls)
        out.sections, out.size = [*a.sections, *b.sections], a.size
        out.measured = [*a.measured, *b.measured]
        out.crops = [*a.crops, *(replace(c, section=c.section + len(a.sections)) for c in b.crops)]
        out.left_out = a.left_out | b.left_out
        out.features = [[torch.cat(level) for level in zip(*variants)] for variants in zip(a.features, b.features)]
        return out

    @property
    def n_shapes(self) -> dict[str, int]:
        """Number of shapes that can be used, by element."""
        out: dict[str, int] = {}
        for crop in self.crops:
            for name, rows in crop.rows.items():
                out[name] = out.get(name, 0) + len(rows)
        return out

    def pixels(self, crop: Crop, halo: int) -> Tensor:
        """Return a crop's pixels with a halo, ``(3, h, w)`` uint8."""
        n = self.size + 2 * halo
        reader = self.sections[crop.section].reader
        return torch.from_numpy(reader.read(crop.origin[0] - halo, crop.origin[1] - halo, n, n))

    def pixel_um2(self, section: int) -> float:
        """Return the area in um^2 of a map pixel on the slide of a section."""
        grid = self.sections[section].grid
        return (grid.mpp * grid.stride) ** 2

    def mean_share(self) -> Tensor:
        """Return each gene's mean share of all transcripts over the shapes of the first element."""
        rows = []
        for crop in self.crops:
            name = next(iter(crop.rows))
            rows.append(self.measured[crop.section][name].cp10k[crop.rows[name]])
        return torch.cat(rows).mean(dim=0) / 1e4

    def mean_log(self) -> tuple[Tensor, float]:
        """Return each gene's mean log1p CP10k over the shapes of the first element, and the um^2 that these cover."""
        rows, areas = [], []
        for crop in self.crops:
            name = next(iter(crop.rows))
            rows.append(torch.log1p(self.measured[crop.section][name].cp10k[crop.rows[name]]))
            areas.append(np.asarray(crop.weights[name].sum(axis=1)).ravel() * self.pixel_um2(crop.section))
        return torch.cat(rows).mean(dim=0), float(np.concatenate(areas).mean())

    @cached_property
    def dispersion(self) -> dict[str, Tensor]:
        """Each gene's dispersion in the shapes of each element, by moments: ``var = mean + dispersion * mean**2``.

        The mean of a shape is its UMI times the gene's share of its section, so sections may differ in composition.
        """
        found: dict[str, list[Tensor]] = {}
        for measured in self.measured:
            for name, m in measured.items():
                used = m.depth > 0
                umi, cp10k = m.umi[used, None].double(), m.cp10k[used].double()
                counts = cp10k * umi / 1e4
                mean = umi * (counts.sum(dim=0) / umi.sum().clamp(min=1))
                moments = torch.stack([((counts - mean).square() - mean).sum(dim=0), mean.square().sum(dim=0)])
                found.setdefault(name, []).append(moments)
        totals = {name: torch.stack(parts).sum(dim=0) for name, parts in found.items()}
        return {n: (excess / square.clamp(min=1e-9)).clamp(1e-2, 20).float() for n, (excess, square) in totals.items()}


# batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Some crops: which, the pixels their shapes cover, and for each element the weights and the measurement."""

    crops: list[int]
    crop_of_pixel: Tensor
    pixel: Tensor
    weights: dict[str, Tensor]
    cp10k: dict[str, Tensor]
    depth: dict[str, Tensor]
    umi: dict[str, Tensor]

    def covered(self, name: str) -> Tensor:
        """Return how many pixels each shape of an element covers, ``(shapes,)``."""
        return torch.sparse.sum(self.weights[name], dim=1).to_dense()


def batches_of(material: CropDataset, order: Sequence[int], shapes: int, most: int) -> list[list[int]]:
    """Cut an order of crops into batches that have enough shapes of each element, or as many crops as allowed.

    A batch is of one section: correlations over its shapes then are those within a section, as evaluation takes them,
    and no network gains by telling sections of different depth apart. Sections follow one another in turn.
    """
    found: list[list[list[int]]] = []
    for section in range(len(material.sections)):
        own = [i for i in order if material.crops[i].section == section]
        if own:
            found.append(_of_one_section(material, own, shapes, most))
    rounds = max((len(batches) for batches in found), default=0)
    return [batches[r] for r in range(rounds) for batches in found if r < len(batches)]


def _of_one_section(material: CropDataset, order: Sequence[int], shapes: int, most: int) -> list[list[int]]:
    out: list[list[int]] = [[]]
    count: dict[str, int] = {}
    for i in order:
        out[-1].append(i)
        for name, rows in material.crops[i].rows.items():
            count[name] = count.get(name, 0) + len(rows)
        if min(count.values()) >= shapes or len(out[-1]) >= most:
            out.append([])
            count = {}
    if not out[-1]:
        out.pop()
    elif len(out) > 1 and min(count.values()) < shapes // 3:
        remnant = out.pop()  # too small for a correlation
        out[-1] += remnant
    return out


ENOUGH_PX = 200
"""Pixels of a shape that a training step looks at, about: the mean over more of them is the same but for little noise."""


def thinned(crop: Crop, rng: torch.Generator) -> Crop:
    """Return the crop with a random part of its pixels, so many that its smallest shape keeps `ENOUGH_PX` or all it has."""
    fewest = min(int(np.diff(w.indptr).min()) for w in crop.weights.values())
    if fewest <= ENOUGH_PX:
        return crop
    kept = np.flatnonzero(torch.rand(len(crop.pixels), generator=rng).numpy() < ENOUGH_PX / fewest)
    weights = {name: w[:, kept] for name, w in crop.weights.items()}
    return replace(crop, pixels=crop.pixels[kept], weights=weights)


def collate(material: CropDataset, chosen: list[int], device: str, thin: torch.Generator | None = None) -> Batch:
    """Put the chosen crops together, on a device; with ``thin``, of large shapes only some of the pixels, drawn from it."""
    crops = [material.crops[i] for i in chosen]
    if thin is not None:
        crops = [thinned(crop, thin) for crop in crops]
    sizes = [len(c.pixels) for c in crops]
    names = sorted({name for c in crops for name in c.rows})
    weights, cp10k, depth, umi = {}, {}, {}, {}
    for name in names:
        blocks, targets, depths, umis = [], [], [], []
        for crop in crops:
            if name in crop.rows:
                blocks.append(crop.weights[name])
                measured = material.measured[crop.section][name]
                targets.append(measured.cp10k[crop.rows[name]])
                depths.append(measured.depth[crop.rows[name]])
                umis.append(measured.umi[crop.rows[name]])
            else:
                blocks.append(sparse.csr_array((0, len(crop.pixels))))
        matrix = sparse.coo_array(sparse.block_diag(blocks, format="coo"))
        indices = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        values = torch.from_numpy(matrix.data.astype(np.float32))
        weights[name] = (
            torch.sparse_coo_tensor(indices, values, matrix.shape, check_invariants=False).coalesce().to(device)
        )
        cp10k[name], depth[name] = torch.cat(targets).to(device), torch.cat(depths).to(device)
        umi[name] = torch.cat(umis).to(device)
    crop_of_pixel = torch.from_numpy(np.repeat(np.arange(len(crops)), sizes))
    pixel = torch.from_numpy(np.concatenate([c.pixels for c in crops]))
    return Batch(chosen, crop_of_pixel.to(device), pixel.to(device), weights, cp10k, depth, umi)
