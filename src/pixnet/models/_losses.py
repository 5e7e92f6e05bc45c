"""The loss of training, over shapes: what sums of the map say of them against what was measured."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PCC_WEIGHT = 0.5


class ExpressionLoss(Protocol):
    """A loss of expression: takes predicted log1p CP10k and measured CP10k ``(shapes, genes)``, returns a scalar.

    ``pcc`` is the mean correlation; ``weights`` are those of the genes.
    """

    def __call__(
        self,
        predicted: Tensor,
        cp10k: Tensor,
        pcc: Tensor,
        *,
        weights: Tensor | None,
        umi: Tensor | None,
        dispersion: Tensor | None,
    ) -> Tensor: ...


def correlation(prediction: Tensor, target: Tensor) -> Tensor:
    """Return Pearson's r of each column over the rows, ``(genes,)``, with its gradient; NaN where a column is constant."""
    p = prediction - prediction.mean(dim=0)
    t = target - target.mean(dim=0)
    # Clamped before the root, whose slope at 0 would turn the gradients of all genes into NaN.
    scale = (p.square().sum(dim=0) * t.square().sum(dim=0)).clamp(min=1e-16).sqrt()
    return torch.where(scale > 1e-8, (p * t).sum(dim=0) / scale, torch.nan)


def nb_deviance(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Return half the deviance of a negative binomial with variance ``mean + dispersion * mean**2``, elementwise."""
    mean, size = mean.clamp(min=1e-6), 1 / dispersion
    # Ratios before logs: differences of logs lose their digits where counts are large. The first term of a count of 0 is 0.
    own = counts * (counts.clamp(min=1e-6) / mean).log()
    return own - (counts + size) * torch.log1p((counts - mean) / (mean + size))


def cp10k_of(log1p: Tensor) -> Tensor:
    """Return CP10k of log1p CP10k, whose maps of logs may leave its range (0 to 1e4) while they learn."""
    return torch.expm1(log1p.clamp(max=9.3)).clamp(min=0)


def squared_error_and_pcc(
    predicted: Tensor, cp10k: Tensor, pcc: Tensor, *, weights: Tensor | None = None, **_: Tensor | None
) -> Tensor:
    """Mean squared error on log1p of CP10k, plus ``0.5 (1 - PCC)`` (PixNet as published)."""
    return _mean((predicted - torch.log1p(cp10k)).square(), weights) + PCC_WEIGHT * (1 - pcc)


def negative_binomial_and_pcc(
    predicted: Tensor,
    cp10k: Tensor,
    pcc: Tensor,
    *,
    weights: Tensor | None = None,
    umi: Tensor | None,
    dispersion: Tensor | None,
) -> Tensor:
    """Half the negative binomial deviance of the raw counts, plus ``0.5 (1 - PCC)``: shallow shapes weigh less."""
    if umi is None or dispersion is None:
        raise ValueError("loss 'nb+pcc' needs umi= and dispersion=")
    per = umi[:, None] / 1e4
    return _mean(nb_deviance(cp10k * per, cp10k_of(predicted) * per, dispersion), weights) + PCC_WEIGHT * (1 - pcc)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over shapes and genes ``(shapes, genes)``, genes by their weights."""
    return values.mean() if weights is None else (values.mean(dim=0) * weights).sum() / weights.sum()


LOSSES: dict[str, ExpressionLoss] = {"mse+pcc": squared_error_and_pcc, "nb+pcc": negative_binomial_and_pcc}


def shape_loss(
    predicted: Tensor,
    density: Tensor,
    cp10k: Tensor,
    depth: Tensor,
    loss: ExpressionLoss = squared_error_and_pcc,
    *,
    weights: Tensor | None = None,
    umi: Tensor | None = None,
    dispersion: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare what a map says of shapes with the measurement.

    Parameters
    ----------
    predicted, cp10k
        Predicted log1p CP10k and measured CP10k, ``(shapes, genes)``.
    density, depth
        Mean density of all transcripts that the map has in each shape, and measured UMI per area over the section's
        mean, times 1e4, ``(shapes,)``.
    loss
        The loss of expression.
    weights
        Weight of each gene, ``(genes,)``; None: all the same.
    umi
        Total of each shape, ``(shapes,)``.
    dispersion
        Dispersion of each gene, ``(genes,)``.

    Returns
    -------
    dict
        Scalars ``expression``, ``pcc`` (mean over genes, without gradient) and ``total`` (squared error of log depth).
    """
    r = correlation(predicted, torch.log1p(cp10k))
    known = torch.isfinite(r)
    r = torch.where(known, r, 0.0)
    weight = known.float() if weights is None else known * weights
    pcc = (r * weight).sum() / weight.sum().clamp(min=1e-6)
    return {
        "expression": loss(predicted, cp10k, pcc, weights=weights, umi=umi, dispersion=dispersion),
        "pcc": (r.sum() / known.sum().clamp(min=1)).detach(),
        "total": F.mse_loss(density.clamp(min=1e-6).log(), depth.log()),
    }
