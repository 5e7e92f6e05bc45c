"""The objective of training: sums of the map over shapes, and their losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pixnet._core.train.batches import Batch, SectionBatchSampler, collate
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import autocast, crop_halo, encode_crops, standardised
from pixnet._core.train.options import TrainingOptions
from pixnet.models._losses import LOSSES, ExpressionLoss, shape_loss
from pixnet.models._pixnet import PixNet

EVALUATED_CROPS = 8
"""Crops in a batch of evaluation; it affects memory only."""


class ShapeSums(NamedTuple):
    """Sums of the map over the shapes of an element, ``(shapes, genes + 1)``, and what was measured in them."""

    sums: Tensor
    covered: Tensor
    cp10k: Tensor
    depth: Tensor
    umi: Tensor


def shape_sums(
    model: PixNet, batch: Batch, features: dict[int, Tensor], member: int | None = None
) -> dict[str, ShapeSums]:
    """Sum the map of a model, or of one of its members, over the shapes of each element.

    What follows the decoders runs only on the pixels that shapes cover: the rest of the map is not looked at.
    """
    members = list(model.members) if member is None else [model.members[member]]
    densities = []
    for m in members:
        with autocast(batch.pixel.device):
            decoded = m.decoder(features).flatten(2).transpose(1, 2)[batch.crop_of_pixel, batch.pixel]
            logits = m.logits(decoded.T[None, :, None])
        densities.append(model.density(logits)[0, :, 0].T)
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
            batch = collate(dataset, indices, device)
            if self.options.tune_encoder:
                halo = crop_halo(model)
                raw = encode_crops(model, dataset.images(indices, halo).to(device), halo)
            else:
                raw = [f[indices].to(device, memory_format=torch.channels_last) for f in dataset.features[0]]
            for name, shapes in shape_sums(model, batch, standardised(model, raw)).items():
                found.setdefault((batch.section, name), []).append(shapes)
        losses = [
            self._of_element(model, dataset, section, name, ShapeSums(*map(torch.cat, zip(*found[section, name]))))
            for section, name in sorted(found, key=lambda key: key[0])
        ]
        return {key: float(value) for key, value in _mean(losses).items()}

    def _of_element(
        self, model: PixNet, dataset: CropDataset, section: int, name: str, shapes: ShapeSums
    ) -> dict[str, Tensor]:
        return shape_loss(
            model.log_expression(shapes.sums, shapes.covered, dataset.sections[section].pixel_um2),
            shapes.sums[:, -1] / shapes.covered.clamp(min=1e-6),
            shapes.cp10k,
            shapes.depth,
            self.loss,
            umi=shapes.umi,
            dispersion=dataset.dispersion[name].to(shapes.sums.device) if self.options.loss == "nb+pcc" else None,
        )


def _mean(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in losses]).mean() for key in losses[0]}
