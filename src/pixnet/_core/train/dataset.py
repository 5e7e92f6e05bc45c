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

from pixnet._core.predict.map_grid import Box
from pixnet._core.train.augment import Version
from pixnet._core.train.crops import Covered, Section, Targets, cover, kept_on_disk, place_crops
from pixnet._core.train.feature_maps import FeatureMaps
from pixnet._core.train.slide_features import SlideFeatures
from pixnet.models._heads import MeasuredShapes

FILLED_SHAPES = 4000
"""Shapes at most that a head starts from where tables are of panels: what they lack is filled in, and takes memory."""


@dataclass(frozen=True)
class CropTargets:
    """The shapes of one element that lie in a crop, and what was measured in them.

    Attributes
    ----------
    rows
        Positions of the shapes among those of their section.
    weights
        Coverage ``(shapes, pixels)`` of the crop's pixels.
    depth
        UMI per covered area over its mean in the section, times 1e4, ``(shapes,)``.
    measured
        What was measured in all shapes of the section.
    """

    rows: np.ndarray
    weights: sparse.csr_array
    depth: np.ndarray
    measured: Targets

    @property
    def counts(self) -> sparse.csr_array:
        """Raw counts, ``(shapes, genes)``."""
        return self.measured.counts[self.rows]

    @property
    def umi(self) -> np.ndarray:
        """Total of each shape, ``(shapes,)``."""
        return self.measured.umi[self.rows]


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
    features, versions
        Features of the sections, on disk, and their versions; empty until they are computed.
    """

    sections: Sequence[Section]
    size: int
    crops: Sequence[Crop]
    left_out: dict[str, int] = field(default_factory=dict)
    features: Sequence[SlideFeatures] = ()
    versions: Sequence[Version] = ()

    @classmethod
    def of(cls, sections: Sequence[Section], size: int) -> CropDataset:
        """Cut sections into crops of a size."""
        crops: list[Crop] = []
        left_out: dict[str, int] = {}
        for index, section in enumerate(sections):
            covered = [cover(crop, section, size) for crop in place_crops(section, size)]
            depth = {t.name: _depth(t.name, t.umi, covered) for t in section.targets}
            left_out |= {f"{section.name}/{name}": n for name, d in depth.items() if (n := int((d == 0).sum()))}
            crops += [_crop(section, index, crop, depth) for crop in kept_on_disk(covered) if crop.rows]
        return cls(list(sections), size, crops, left_out)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Crop:
        return self.crops[index]

    def join(self, other: CropDataset) -> CropDataset:
        """Return the crops of both, with their features."""
        moved = [replace(crop, section=crop.section + len(self.sections)) for crop in other.crops]
        return replace(
            self,
            sections=[*self.sections, *other.sections],
            crops=[*self.crops, *moved],
            left_out=self.left_out | other.left_out,
            features=[*self.features, *other.features],
        )

    def of_elements(self, names: Collection[str]) -> CropDataset:
        """Return the crops that have shapes of some elements, with these alone."""
        kept = [i for i, crop in enumerate(self.crops) if any(name in crop.targets for name in names)]
        crops = [
            replace(self.crops[i], targets={n: t for n, t in self.crops[i].targets.items() if n in names}) for i in kept
        ]
        return replace(self, crops=crops)

    def box(self, index: int) -> Box:
        """Return where a crop lies on its slide, in model pixels."""
        return Box(*self.crops[index].origin, self.size, self.size)

    def maps(self, index: int, version: int = 0) -> FeatureMaps:
        """Return the features of the slide that a crop lies on, in one of the versions."""
        return self.features[self.crops[index].section].maps[self.versions[version]]

    def crop_features(self, index: int, levels: Sequence[int], version: int = 0) -> list[Tensor]:
        """Return the features of a crop, ``(C, h, w)`` float32, for some levels."""
        maps = self.maps(index, version)
        return [
            torch.from_numpy(maps.read(level, self.box(index)).astype(np.float32)).permute(2, 0, 1) for level in levels
        ]

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

    # what was measured, for the start of training and the loss --------------------------------------------------------

    def measured(self, seed: int) -> MeasuredShapes:
        """Return what was measured in the shapes of the first element; a head starts from it.

        Of genes that a panel lacks, shapes have the mean share that the others have.
        """
        targets = [(crop, name, t) for crop in self.crops for name, t in list(crop.targets.items())[:1]]
        areas = [_area(t.weights) * self.sections[crop.section].pixel_um2 for crop, _, t in targets]
        counts = sparse.csr_array(sparse.vstack([t.counts for *_, t in targets]), dtype=np.float64)
        shares = sparse.csr_array(sparse.diags_array(1 / np.concatenate([t.umi for *_, t in targets])) @ counts)
        panels = [self.panel(crop.section, name) for crop, name, _ in targets]
        if any(panel is not None for panel in panels):
            shares = _with_means(shares, panels, [len(t.rows) for *_, t in targets], seed)
        return MeasuredShapes(shares, float(np.concatenate(areas).mean()), seed)

    def panel(self, section: int, name: str) -> np.ndarray | None:
        """Return the genes that were measured in an element of a section; None: all."""
        return next(t.panel for t in self.sections[section].targets if t.name == name)

    def compared_within(self, section: int, name: str) -> np.ndarray | None:
        """Return the genes whose sum is the total of an element of a section; None: the total is that of all transcripts."""
        targets = next(t for t in self.sections[section].targets if t.name == name)
        if not targets.within_panel:
            return None
        return np.arange(targets.counts.shape[1]) if targets.panel is None else targets.panel

    @cached_property
    def _by_element(self) -> dict[str, list[tuple[int, sparse.csr_array, np.ndarray]]]:
        """Section, counts and totals of the shapes of each element."""
        parts: dict[tuple[int, str], list[CropTargets]] = {}
        for crop in self.crops:
            for name, targets in crop.targets.items():
                parts.setdefault((crop.section, name), []).append(targets)
        out: dict[str, list[tuple[int, sparse.csr_array, np.ndarray]]] = {}
        for (section, name), found in parts.items():
            counts = sparse.csr_array(sparse.vstack([t.counts for t in found]), dtype=np.float64)
            out.setdefault(name, []).append((section, counts, np.concatenate([t.umi for t in found])))
        return out

    def dispersion(self) -> dict[str, Tensor]:
        """Return each gene's dispersion in the shapes of each element, by moments: ``var = mean + dispersion * mean**2``.

        The mean of a shape is its UMI times the gene's share of its section, so sections may differ in composition.
        """
        out = {}
        for name, parts in self._by_element.items():
            excess = square = np.zeros(1)
            for _, counts, umi in parts:
                share = np.asarray(counts.sum(axis=0)).ravel() / max(umi.sum(), 1)
                # sum of (count - mean)**2 - mean over the shapes, without a dense matrix
                own = np.asarray((counts * counts).sum(axis=0)).ravel() - 2 * share * (counts.T @ umi)
                squares = share**2 * (umi**2).sum()
                excess, square = excess + own + squares - share * umi.sum(), square + squares
            out[name] = torch.from_numpy(np.clip(excess / np.maximum(square, 1e-9), 1e-2, 20)).float()
        return out

    def signal(self) -> dict[str, Tensor]:
        """Return each gene's share of the variance of CP10k that is not counting noise, 0 to 1, for each element."""
        out = {}
        for name, parts in self._by_element.items():
            variance = noise = np.zeros(1)
            for _, counts, umi in parts:
                n, scale = len(umi), 1e4 / umi
                x = sparse.csr_array(sparse.diags_array(scale) @ counts)
                mean = np.asarray(x.mean(axis=0)).ravel()
                variance = variance + np.asarray((x * x).sum(axis=0)).ravel() - n * mean**2
                noise = noise + x.T @ scale  # a count's variance is its mean
            out[name] = torch.from_numpy(np.clip(1 - noise / np.maximum(variance, 1e-9), 0, 1)).float()
        return out


def _with_means(
    shares: sparse.csr_array, panels: list[np.ndarray | None], sizes: list[int], seed: int
) -> sparse.csr_array:
    """Fill genes that a panel lacks with their mean share over the shapes that have them; of many shapes, take some."""
    known = np.zeros((len(panels), shares.shape[1]), dtype=bool)
    for row, panel in zip(known, panels):
        row[slice(None) if panel is None else panel] = True
    of_shape = np.repeat(np.arange(len(panels)), sizes)
    seen = np.zeros(shares.shape[1])
    np.add.at(seen, np.nonzero(known)[1], np.repeat(sizes, known.sum(axis=1)))
    mean = np.asarray(shares.sum(axis=0)).ravel() / np.maximum(seen, 1)
    rows = np.random.default_rng(seed).permutation(len(of_shape))[:FILLED_SHAPES]
    return sparse.csr_array(shares[rows] + np.where(known[of_shape[rows]], 0.0, mean))


def _area(weights: sparse.csr_array) -> np.ndarray:
    return np.asarray(weights.sum(axis=1)).ravel()


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
        t.name: CropTargets(rows := crop.rows[t.name], crop.weights[t.name], depth[t.name][rows], t)
        for t in section.targets
        if t.name in crop.rows
    }
    return Crop(index, crop.origin, crop.pixels, targets)
