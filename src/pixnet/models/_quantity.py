"""What the channels of a map mean: from logits to values, where training starts, and what sums over shapes say."""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = {
    "density": "CP10k density (__total__ averages 1e4 over the training shapes)",
    "log_sum": "log1p CP10k per um2, summed over a shape (__total__: density, averages 1e4 over the training shapes)",
}
"""Unit of a map, by the quantity that the genes' channels hold. The total's channel is a density in any case."""


def linked(logits: Tensor, area_um2: Tensor | None = None) -> Tensor:
    """Return the map of logits ``(N, genes + 1, ...)``: densities, or with ``area_um2`` logs per area."""
    # Logarithms and exponentials in float32: bfloat16 would keep 3 digits of a value that spans decades.
    logits = logits.float()
    genes, total = logits[:, :-1], logits[:, -1:].clamp(-10, 4).exp() * 1e4
    genes = genes.clamp(max=0).exp() * total if area_um2 is None else genes / area_um2
    return torch.cat([genes, total], dim=1)


def baseline(level: Tensor, quantity: str) -> tuple[Tensor, float]:
    """Return logits of the genes and of the total that give the same map everywhere.

    ``level`` is each gene's mean share of all transcripts (density) or its mean log1p CP10k (log sum), ``(genes,)``.
    """
    return (level.clamp(min=1e-8).log() if quantity == "density" else level), 0.0


def log_expression(sums: Tensor, quantity: str, pixel_um2: float) -> Tensor:
    """Return the log1p CP10k of shapes, ``(shapes, genes)``, from sums of the map over their pixels.

    ``sums`` is ``(shapes, genes + 1)``, the total last; ``pixel_um2`` is the area of a map pixel in µm².
    """
    if quantity == "density":
        return torch.log1p(1e4 * sums[:, :-1] / sums[:, -1:].clamp(min=1e-6))
    return sums[:, :-1] * pixel_um2
