"""What held-out shapes show of a model: whether its amounts are right, and how far each gene can be believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import spatial

from pixnet._core.train.batches import SectionBatchSampler, collate
from pixnet._core.train.covered import batch_features
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.objective import EVALUATED_CROPS, shape_sums
from pixnet._core.train.split import longer_axis
from pixnet._core.uncertainty import mean_correlation
from pixnet._evidence import CEILING, DISPERSION, HIGH, LOW, PEARSON, RATIO, Evidence, evidence_of
from pixnet.models._pixnet import PixNet

Floats = NDArray[np.float64]

MOST_SHAPES, FEWEST_SHAPES = 4000, 500
MOST_VALUES = 2e7
"""Shapes at most that are looked at, and numbers at most that they are for: tables of them, with all genes, are held in
memory (160 MB each)."""

PRIOR_COUNTS = 20.0
"""Counts by which a gene's ratio of amounts is drawn to that of all genes."""

DISPERSION_COUNTS = 100.0
"""Counts by which a gene's dispersion is drawn to that of all genes."""

LARGEST_RATIO = 5.0

BLOCK_SHAPES = 12
"""Shapes of a block in space, roughly: blocks are drawn, not shapes, since neighbours are alike."""

RESAMPLED = 300
LEAST_SHAPES = 20
"""Shapes at least for a correlation with an interval."""

LENGTHS_UM = np.logspace(0.5, 4, 141)
"""Correlation lengths among which that of the error is sought."""


@dataclass(frozen=True)
class HeldOut:
    """Shapes of one section: what a model predicts of them, and what was measured.

    Attributes
    ----------
    predicted, counts
        Predicted CP10k and raw counts, ``(shapes, genes)``; NaN for genes that were not measured.
    channels
        Sum of the map over all shapes, each weighed by its transcripts, ``(channels,)``.
    umi, area_um2, centre_um
        Total, area and centre of each shape.
    """

    predicted: Floats
    counts: Floats
    channels: Floats
    umi: Floats
    area_um2: Floats
    centre_um: Floats

    def take(self, rows: NDArray[np.bool_]) -> HeldOut:
        """Return some of the shapes."""
        per_shape = ("predicted", "counts", "umi", "area_um2", "centre_um")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_shape})

    @property
    def mean(self) -> Floats:
        """Predicted counts."""
        return self.predicted * self.umi[:, None] / 1e4


def most_shapes(n_genes: int) -> int:
    """Return how many held-out shapes are looked at, at most."""
    return int(np.clip(MOST_VALUES // n_genes, FEWEST_SHAPES, MOST_SHAPES))


@torch.no_grad()
def predict_shapes(model: PixNet, dataset: CropDataset, device: str, rng: np.random.Generator) -> list[HeldOut]:
    """Predict the shapes of the first element of each section, or of crops drawn from them."""
    model.eval()
    tuned = any(p.requires_grad for p in model.encoder.parameters())
    drawn: list[int] = []
    n = 0
    for i in rng.permutation(len(dataset)).tolist():
        drawn.append(i)
        n += max(len(t.rows) for t in dataset[i].targets.values())
        if n >= most_shapes(len(model.genes)):
            break
    parts: dict[int, list[HeldOut]] = {}
    for indices in _batches(dataset, sorted(drawn)):
        batch = collate(dataset, indices).to(device)
        features = batch_features(model, dataset, batch, tuned)
        section = dataset.sections[batch.section]
        um = section.grid.mpp * section.grid.stride
        name = section.targets[0].name
        found = shape_sums(model, batch, features).get(name)
        if found is not None:
            panel = dataset.panel(batch.section, name)
            within = dataset.compared_within(batch.section, name)
            genes = None if within is None else torch.from_numpy(within).to(device)
            log = model.head.log_expression(found.sums, section.pixel_um2, genes).double().cpu()
            predicted = np.expm1(np.minimum(log.numpy(), 9.3))
            umi = found.umi.double().cpu().numpy()
            counts = found.cp10k.double().cpu().numpy() * umi[:, None] / 1e4
            if panel is not None:
                everything = np.full(counts.shape, np.nan)
                everything[:, panel] = predicted if genes is not None else predicted[:, panel]
                predicted, counts = everything, np.where(np.isnan(everything), np.nan, counts)
            shapes = next(t for t in section.targets if t.name == name).shapes
            rows = np.concatenate([dataset[i].targets[name].rows for i in indices if name in dataset[i].targets])
            boxes = shapes.bounds[rows]
            centre = np.stack([boxes[:, [0, 2]].mean(axis=1), boxes[:, [1, 3]].mean(axis=1)], axis=1) * um
            share = found.sums.double() / model.head.total(found.sums).double().clamp(min=1e-6)[:, None]
            channels = (share.cpu().numpy() * umi[:, None]).sum(axis=0)
            area = found.covered.double().cpu().numpy() * section.pixel_um2
            parts.setdefault(batch.section, []).append(HeldOut(predicted, counts, channels, umi, area, centre))
    return [_joined(parts[key]) for key in sorted(parts)]


def amounts(shapes: list[HeldOut]) -> tuple[Floats, Floats]:
    """Return summed measured and summed predicted counts of each gene."""
    measured, predicted = zip(*((np.nansum(s.counts, axis=0), np.nansum(s.mean, axis=0)) for s in shapes))
    return np.sum(measured, axis=0), np.sum(predicted, axis=0)


def ratio_of(shapes: list[HeldOut], prior: float = PRIOR_COUNTS) -> Floats:
    """Return measured over predicted amounts of each gene; of rare genes that of all genes together."""
    measured, predicted = amounts(shapes)
    overall = measured.sum() / max(predicted.sum(), 1e-9)
    ratio = (measured + prior * overall) / (predicted + prior)
    return np.clip(ratio, 1 / LARGEST_RATIO, LARGEST_RATIO)


def balance(model: PixNet, ratio: Floats, shapes: list[HeldOut]) -> None:
    """Bring the amounts that a model predicts to those that were measured, by one factor for each gene."""
    usage = np.sum([s.channels for s in shapes], axis=0)
    shift = model.head.balance(torch.from_numpy(ratio), torch.from_numpy(usage))
    for member in model.members:
        member.shift(shift)


def assess(shapes: list[HeldOut], ratio: Floats, seed: int, *, balanced: bool = True) -> Evidence | None:
    """Return what held-out shapes show of each gene; None where there are too few of them.

    ``balanced`` says whether these very shapes were those that amounts were balanced with.
    """
    n = sum(len(s.umi) for s in shapes)
    if n < LEAST_SHAPES:
        return None
    rng = np.random.default_rng(seed)
    r, low, high = _correlation(shapes, rng)
    # What amounts are off by where nothing was measured is part of the error: one half of a section is balanced by the
    # other.
    unseen = [part for s in shapes for part in _balanced_by_the_other_half(s)] if balanced else shapes
    dispersion = _dispersion(unseen)
    columns = {
        PEARSON: r, LOW: low, HIGH: high, RATIO: ratio, CEILING: _ceiling(shapes, rng), DISPERSION: dispersion,
    }  # fmt: skip
    area = float(np.concatenate([s.area_um2 for s in shapes]).mean())
    return evidence_of(n, area, _correlation_length(shapes, dispersion, area), columns)


# correlation ---------------------------------------------------------------------------------------------------------


def _correlation(shapes: list[HeldOut], rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Return Pearson's r within sections and the ends of its 95 % interval, by a bootstrap of blocks in space."""
    moments = np.concatenate([_block_moments(s) for s in shapes])  # (blocks, 3, genes)
    r = _r_of(moments.sum(axis=0))
    drawn = rng.multinomial(len(moments), np.full(len(moments), 1 / len(moments)), size=RESAMPLED)
    again = np.stack([np.nan_to_num(_r_of(np.tensordot(n, moments, axes=1))) for n in drawn])
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    return r, np.where(np.isfinite(r), low, np.nan), np.where(np.isfinite(r), high, np.nan)


def _block_moments(shapes: HeldOut) -> Floats:
    """Return sums of squares and of products of logs, less their means in the section, in each block: ``(blocks, 3, genes)``."""
    p, m = (x - _mean(x) for x in (np.log1p(shapes.predicted), _measured_log(shapes.counts, shapes.umi)))
    block = _blocks(shapes.centre_um)
    out = np.zeros((block.max() + 1, 3, p.shape[1]))
    for i, values in enumerate((p * p, m * m, p * m)):
        np.add.at(out[:, i], block, np.nan_to_num(values))
    return out


def _mean(x: Floats) -> Floats:
    """Return the mean of each column over what is known; 0 where nothing is."""
    return np.nansum(x, axis=0) / np.maximum(np.isfinite(x).sum(axis=0), 1)


def _r_of(moments: Floats) -> Floats:
    own, measured, product = moments
    with np.errstate(invalid="ignore", divide="ignore"):
        r = product / np.sqrt(own * measured)
    return np.where((own > 1e-9) & (measured > 1e-9), np.clip(r, -1, 1), np.nan)


def _blocks(centre: Floats) -> NDArray[np.int64]:
    """Return the number of the block that each shape lies in: columns of as many shapes, cut into as many rows."""
    n = max(1, round(np.sqrt(len(centre) / BLOCK_SHAPES)))
    column = _ranked(centre[:, 0], n)
    block = np.zeros(len(centre), dtype=np.int64)
    for c in range(n):
        inside = np.flatnonzero(column == c)
        block[inside] = c * n + _ranked(centre[inside, 1], n)
    return block


def _ranked(values: Floats, n: int) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable") * n // max(len(values), 1)


def _measured_log(counts: Floats, umi: Floats) -> Floats:
    return np.log1p(1e4 * counts / umi[:, None])


def _ceiling(shapes: list[HeldOut], rng: np.random.Generator) -> Floats:
    """Return the r of a perfect prediction: from the correlation of two thinned halves of the counts (Spearman-Brown)."""
    moments = []
    for s in shapes:
        known = np.nan_to_num(s.counts)
        whole = np.round(known).astype(np.int64)
        half = rng.binomial(whole, 0.5)
        logs = [
            _measured_log(part, np.maximum(s.umi / 2, 1)) for part in (half.astype(float), (whole - half).astype(float))
        ]
        a, b = (x - x.mean(axis=0) for x in logs)
        moments.append(np.stack([(a * a).sum(axis=0), (b * b).sum(axis=0), (a * b).sum(axis=0)]))
    r = np.clip(_r_of(np.sum(moments, axis=0)), 0, 1)
    return np.sqrt(2 * r / (1 + r))


# dispersion ----------------------------------------------------------------------------------------------------------


def _dispersion(shapes: list[HeldOut]) -> Floats:
    """Return each gene's dispersion by moments; that of rare genes is drawn to the mean of all."""
    excess, square, counts = (np.zeros(shapes[0].counts.shape[1]) for _ in range(3))
    for s in shapes:
        mean, residual = np.nan_to_num(s.mean), np.nan_to_num(s.counts - s.mean)
        excess += (residual**2 - mean).sum(axis=0)
        square += (mean**2).sum(axis=0)
        counts += np.nansum(s.counts, axis=0)
    if not counts.any():
        return np.full(len(counts), np.nan)
    own = np.clip(excess / np.maximum(square, 1e-12), 0, 100)
    typical = float(np.average(own, weights=counts))
    return (counts * own + DISPERSION_COUNTS * typical) / (counts + DISPERSION_COUNTS)


def _balanced_by_the_other_half(shapes: HeldOut) -> list[HeldOut]:
    """Return the two halves of a section, each with its amounts balanced by those of the other."""
    _, along = longer_axis(np.concatenate([shapes.centre_um, shapes.centre_um], axis=1))
    near = along <= np.median(along)
    if near.all():
        return [shapes]
    halves = [shapes.take(near), shapes.take(~near)]
    ratios = [ratio_of([half]) for half in reversed(halves)]
    return [replace(half, predicted=half.predicted * ratio) for half, ratio in zip(halves, ratios)]


def _correlation_length(shapes: list[HeldOut], dispersion: Floats, area_um2: float) -> float:
    """Return the distance over which the error is alike, from that of neighbouring shapes.

    The covariance of neighbours over the dispersion of one shape is that of the field at their distance over its mean
    within a shape; the length at which the exponential has this ratio is sought. Where neighbours are unlike, or
    nothing is known, it is the radius of a shape.
    """
    moments, distances = np.zeros(4), []
    for s in shapes:
        if len(s.umi) < LEAST_SHAPES:
            continue
        tree = spatial.cKDTree(s.centre_um)
        nearest = tree.query(s.centre_um, k=2)[0][:, 1]
        step = float(np.median(nearest))
        pairs = tree.query_pairs(1.3 * step, output_type="ndarray")
        pairs = pairs[np.linalg.norm(np.diff(s.centre_um[pairs], axis=1)[:, 0], axis=1) > 0.5 * step]
        if not len(pairs):
            continue
        mean = np.nan_to_num(s.mean)
        level = np.maximum(mean.mean(axis=0), 1e-9)
        weight = np.nan_to_num(dispersion * level / (1 + dispersion * level)) / level**2
        residual = np.nan_to_num(s.counts - s.mean)
        a, b = pairs.T
        moments += [
            float((values.sum(axis=0) * weight).sum())
            for values in (residual[a] * residual[b], mean[a] * mean[b], residual**2 - mean, mean**2)
        ]
        distances.append(step)
    least = float(np.sqrt(area_um2 / np.pi))
    together, pairs_mean, own, own_mean = moments
    if together <= 0 or own <= 0:
        return least
    step, ratio = float(np.mean(distances)), (together / pairs_mean) / (own / own_mean)
    model = np.array([np.exp(-step / u) / float(mean_correlation(area_um2, u)) for u in LENGTHS_UM])
    return max(float(np.interp(ratio, model, LENGTHS_UM)), least)


# helpers -------------------------------------------------------------------------------------------------------------


def _batches(dataset: CropDataset, indices: list[int]) -> Iterator[list[int]]:
    """Yield batches of a few crops of one section each."""
    part = CropDataset(dataset.sections, dataset.size, [dataset[i] for i in indices])
    for batch in SectionBatchSampler(part, 10**9, EVALUATED_CROPS):
        yield [indices[i] for i in batch]


def _joined(parts: list[HeldOut]) -> HeldOut:
    def joined(name: str) -> Any:
        return np.concatenate([getattr(p, name) for p in parts])

    channels = np.sum([p.channels for p in parts], axis=0)
    return HeldOut(
        joined("predicted"), joined("counts"), channels, joined("umi"), joined("area_um2"), joined("centre_um")
    )
