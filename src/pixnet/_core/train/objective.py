"""The objective of training: sums of the map over shapes, and their losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pixnet._core.train.batches import VALIDATED_PX, Batch, SectionBatchSampler, collate
from pixnet._core.train.covered import Features, batch_features
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import autocast
from pixnet._core.train.options import TrainingOptions
from pixnet.models._losses import LOSSES, ExpressionLoss, shape_loss
from pixnet.models._pixnet import PixNet

LEAST_WEIGHT = 0.02
"""Weight of a gene whose variance is all counting noise, where one without any has 1."""

EVALUATED_CROPS = 2
"""Crops in a batch of evaluation; it affects memory only."""


class ShapeSums(NamedTuple):
    """Sums of the map over the shapes of an element, ``(shapes, channels)``, and what was measured in them."""

    sums: Tensor
    covered: Tensor
    cp10k: Tensor
    depth: Tensor
    umi: Tensor


def shape_sums(model: PixNet, batch: Batch, features: Features, member: int | None = None) -> dict[str, ShapeSums]:
    """Sum the map of a model, or of one of its members, over the shapes of each element, from `standardised`."""
    members = list(model.members) if member is None else [model.members[member]]
    densities = []
    for m in members:
        with autocast(batch.pixel.device):
            logits = m.at(features, batch.crop_of_pixel, batch.pixel)
        densities.append(model.head(logits))
    density = densities[0] if len(densities) == 1 else torch.stack(densities).mean(dim=0)
    return {
        name: ShapeSums(torch.sparse.mm(t.weights, density), t.covered, t.cp10k, t.depth, t.umi)
        for name, t in batch.targets.items()
    }


class Objective:
    """The losses of a model over shapes.

    ``loss`` is a loss of expression in place of the one that the options name.
    """

    def __init__(self, options: TrainingOptions, loss: ExpressionLoss | None = None) -> None:
        self.options, self.loss = options, loss or LOSSES[options.loss]
        self._weights: dict[str, Tensor] = {}
        self._dispersion: dict[str, Tensor] = {}

    def prepare(self, dataset: CropDataset, default_weights: str) -> None:
        """Take from the training shapes what the losses need to know of each gene; ``default_weights`` is the head's choice."""
        if (self.options.gene_weights or default_weights) == "signal":
            self._weights = {name: found.clamp(min=LEAST_WEIGHT) for name, found in dataset.signal().items()}
        if self.options.loss == "nb+pcc":
            self._dispersion = dataset.dispersion()

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the number that is minimised."""
        return losses["expression"] + self.options.total_weight * losses["total"]

    def losses(
        self, model: PixNet, dataset: CropDataset, section: int, found: dict[str, ShapeSums]
    ) -> dict[str, Tensor]:
        """Return the losses of shapes of one section, averaged over the elements."""
        return _mean([self._of_element(model, dataset, section, name, shapes) for name, shapes in found.items()])

    @torch.no_grad()
    def evaluate(self, model: PixNet, dataset: CropDataset, device: str) -> dict[str, float]:
        """Return the losses over all shapes of each section at once, averaged over sections and elements."""
        model.eval()
        found: dict[tuple[int, str], list[ShapeSums]] = {}
        for indices in SectionBatchSampler(dataset, 10**9, min(self.options.batch_crops, EVALUATED_CROPS)):
            batch = collate(dataset, indices, VALIDATED_PX).to(device)
            features = batch_features(model, dataset, batch, self.options.tune_encoder)
            for name, shapes in shape_sums(model, batch, features).items():
                found.setdefault((batch.section, name), []).append(shapes)
        losses = [
            self._of_element(model, dataset, section, name, ShapeSums(*map(torch.cat, zip(*found[section, name]))))
            for section, name in sorted(found, key=lambda key: key[0])
        ]
        return {key: float(value) for key, value in _mean(losses).items()}

    def _of_element(
        self, model: PixNet, dataset: CropDataset, section: int, name: str, shapes: ShapeSums
    ) -> dict[str, Tensor]:
        head, pixel_um2, device = model.head, dataset.sections[section].pixel_um2, shapes.sums.device
        panel = dataset.panel(section, name)
        genes = None if panel is None else torch.from_numpy(panel).to(device)
        covered = shapes.covered.clamp(min=1e-6)
        within = dataset.compared_within(section, name)
        if within is not None:
            of_panel = torch.from_numpy(within).to(device)
            predicted = head.log_expression(shapes.sums, pixel_um2, of_panel)
            density = head.total(shapes.sums, of_panel) / covered
            # How much of all transcripts a panel has is not measured: only differences in depth are.
            offset = (shapes.depth.log() - density.clamp(min=1e-6).log()).mean()
            density = density * offset.exp()
        else:
            predicted = head.log_expression(shapes.sums, pixel_um2)
            predicted = predicted if genes is None else predicted[:, genes]
            density = head.total(shapes.sums) / covered

        def of_genes(known: dict[str, Tensor]) -> Tensor | None:
            if name not in known:
                return None
            values = known[name].to(device)
            return values if genes is None else values[genes]

        return shape_loss(
            predicted,
            density,
            shapes.cp10k if genes is None else shapes.cp10k[:, genes],
            shapes.depth,
            self.loss,
            weights=of_genes(self._weights),
            umi=shapes.umi,
            dispersion=of_genes(self._dispersion),
        )


def _mean(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in losses]).mean() for key in losses[0]}
