"""The data set of training: crops with what was measured in their shapes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Dataset

from pixnet._core.train.crops import Covered, Section, cover, place_crops

Features = Sequence[Sequence[Tensor]]
"""Features of crops, ``(crops, C, h, w)``, for each variant and each of the encoder's levels in use."""


@dataclass(frozen=True)
class CropTargets:
    """The shapes of one element that lie in a crop, and what was measured in them.

    Attributes
    ----------
    rows
        Positions of the shapes among those of their section.
    weights
        Coverage ``(shapes, pixels)`` of the crop's pixels.
    cp10k
        Measured CP10k, ``(shapes, genes)``.
    depth
        UMI per covered area over its mean in the section, times 1e4, ``(shapes,)``.
    umi
        All UMI of each shape, ``(shapes,)``.
    """

    rows: np.ndarray
    weights: sparse.csr_array
    cp10k: Tensor
    depth: Tensor
    umi: Tensor


@dataclass(frozen=True)
class Crop:
    """A crop of a section.

    Attributes
    ----------
    section
        Position of the section among those of the data set.
    origin
        First row and column, in model pixels.
    pixels
        Positions of the pixels that any shape covers, in the crop's output grid (row-major).
    targets
        The shapes that lie whole in the crop, by element.
    """

    section: int
    origin: tuple[int, int]
    pixels: np.ndarray
    targets: dict[str, CropTargets]


@dataclass(frozen=True, eq=False)
class CropDataset(Dataset[Crop]):
    """Crops of some sections, with the features of an encoder once they are computed.

    Attributes
    ----------
    sections
        The sections.
    size
        Size of the crops in model pixels.
    crops
        The crops; each has a shape at least.
    left_out
        Number of shapes that cannot be used, by section and element.
    features
        Features of the crops; empty until they are computed.
    """

    sections: Sequence[Section]
    size: int
    crops: Sequence[Crop]
    left_out: dict[str, int] = field(default_factory=dict)
    features: Features = ()

    @classmethod
    def of(cls, sections: Sequence[Section], size: int) -> CropDataset:
        """Cut sections into crops of a size."""
        crops: list[Crop] = []
        left_out: dict[str, int] = {}
        for index, section in enumerate(sections):
            covered = [cover(crop, section, size) for crop in place_crops(section, size)]
            depth = {t.name: _depth(t.name, t.umi, covered) for t in section.targets}
            left_out |= {f"{section.name}/{name}": n for name, d in depth.items() if (n := int((d == 0).sum()))}
            crops += [_crop(section, index, crop, depth) for crop in covered if crop.rows]
        return cls(list(sections), size, crops, left_out)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Crop:
        return self.crops[index]

    def join(self, other: CropDataset) -> CropDataset:
        """Return the crops of both, with their features."""
        moved = [replace(crop, section=crop.section + len(self.sections)) for crop in other.crops]
        features = [[torch.cat(level) for level in zip(*variants)] for variants in zip(self.features, other.features)]
        sections, left_out = [*self.sections, *other.sections], self.left_out | other.left_out
        return CropDataset(sections, self.size, [*self.crops, *moved], left_out, features)

    def of_elements(self, names: Collection[str]) -> CropDataset:
        """Return the crops that have shapes of some elements, with these alone."""
        kept = [i for i, crop in enumerate(self.crops) if any(name in crop.targets for name in names)]
        crops = [
            replace(self.crops[i], targets={n: t for n, t in self.crops[i].targets.items() if n in names}) for i in kept
        ]
        return replace(self, crops=crops, features=[[level[kept] for level in variant] for variant in self.features])

    def image(self, index: int, halo: int) -> Tensor:
        """Return the image of a crop with a halo, ``(3, h, w)`` uint8."""
        crop, n = self.crops[index], self.size + 2 * halo
        reader = self.sections[crop.section].reader
        return torch.from_numpy(reader.read(crop.origin[0] - halo, crop.origin[1] - halo, n, n))

    def images(self, indices: Sequence[int], halo: int) -> Tensor:
        """Return the images of some crops, ``(n, 3, h, w)`` uint8."""
        images = torch.stack([self.image(i, halo) for i in indices])
        for section in {self.crops[i].section for i in indices}:
            self.sections[section].reader.check()
        return images

    @property
    def n_shapes(self) -> dict[str, int]:
        """Number of shapes, by element."""
        out: dict[str, int] = {}
        for crop in self.crops:
            for name, targets in crop.targets.items():
                out[name] = out.get(name, 0) + len(targets.rows)
        return out

    # statistics of what was measured, for the start of training and the loss ------------------------------------------

    def mean_share(self) -> Tensor:
        """Return each gene's mean share of all transcripts over the shapes of the first element."""
        return torch.cat([_first(crop).cp10k for crop in self.crops]).mean(dim=0) / 1e4

    def mean_log(self) -> tuple[Tensor, float]:
        """Return each gene's mean log1p CP10k over the shapes of the first element, and the µm² that these cover."""
        logs = [torch.log1p(_first(crop).cp10k) for crop in self.crops]
        areas = [_area(_first(crop).weights) * self.sections[crop.section].pixel_um2 for crop in self.crops]
        return torch.cat(logs).mean(dim=0), float(np.concatenate(areas).mean())

    @cached_property
    def dispersion(self) -> dict[str, Tensor]:
        """Each gene's dispersion in the shapes of each element, by moments: ``var = mean + dispersion * mean**2``.

        The mean of a shape is its UMI times the gene's share of its section, so sections may differ in composition.
        """
        measured: dict[tuple[int, str], list[CropTargets]] = {}
        for crop in self.crops:
            for name, targets in crop.targets.items():
                measured.setdefault((crop.section, name), []).append(targets)
        moments: dict[str, list[Tensor]] = {}
        for (_, name), parts in measured.items():
            umi = torch.cat([t.umi for t in parts])[:, None].double()
            counts = torch.cat([t.cp10k for t in parts]).double() * umi / 1e4
            mean = umi * (counts.sum(dim=0) / umi.sum().clamp(min=1))
            excess = ((counts - mean).square() - mean).sum(dim=0)
            moments.setdefault(name, []).append(torch.stack([excess, mean.square().sum(dim=0)]))
        totals = {name: torch.stack(parts).sum(dim=0) for name, parts in moments.items()}
        return {n: (excess / square.clamp(min=1e-9)).clamp(1e-2, 20).float() for n, (excess, square) in totals.items()}


def _area(weights: sparse.csr_array) -> np.ndarray:
    return np.asarray(weights.sum(axis=1)).ravel()


def _first(crop: Crop) -> CropTargets:
    return next(iter(crop.targets.values()))


def _depth(name: str, umi: np.ndarray, crops: Sequence[Covered]) -> np.ndarray:
    """Return UMI per covered area over its mean in the section, times 1e4; 0 for shapes that no crop has."""
    area, depth = np.zeros(len(umi)), np.zeros(len(umi))
    for crop in crops:
        if name in crop.rows:
            area[crop.rows[name]] = _area(crop.weights[name])
    used = area > 0
    if used.any():
        depth[used] = umi[used] / area[used]
        depth *= 1e4 / depth[used].mean()
    return depth


def _crop(section: Section, index: int, crop: Covered, depth: dict[str, np.ndarray]) -> Crop:
    targets = {
        t.name: CropTargets(
            rows := crop.rows[t.name],
            crop.weights[t.name],
            torch.from_numpy(t.cp10k[rows]),
            torch.from_numpy(depth[t.name][rows].astype(np.float32)),
            torch.from_numpy(t.umi[rows].astype(np.float32)),
        )
        for t in section.targets
        if t.name in crop.rows
    }
    return Crop(index, crop.origin, crop.pixels, targets)
