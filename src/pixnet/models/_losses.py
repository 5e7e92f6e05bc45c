"""What training minimises, over shapes: sums of the map against what was measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("mse+pcc", "mse", "pcc", "poisson+pcc", "nb+pcc")

PCC_WEIGHT = 0.5


def pearson(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the Pearson correlation of each column over the rows, ``(genes,)``; NaN where a column is constant."""
    p = prediction - prediction.mean(dim=0)
    t = target - target.mean(dim=0)
    # Clamped before the root, whose slope at 0 would turn the gradients of all genes into NaN.
    scale = (p.square().sum(dim=0) * t.square().sum(dim=0)).clamp(min=1e-16).sqrt()
    return torch.where(scale > 1e-8, (p * t).sum(dim=0) / scale, torch.nan)


def log_expression(sums: Tensor, covered: Tensor, quantity: str = "density", pixel_um2: float = 1.0) -> Tensor:
    """Return the log1p CP10k of shapes, ``(shapes, genes)``, that sums of a map over their pixels stand for.

    Parameters
    ----------
    sums
        Sums of the map over each shape, ``(shapes, genes + 1)``, the last column those of ``__total__``.
    covered
        Map pixels that each shape covers, ``(shapes,)``.
    quantity
        ``"density"``: genes are densities, CP10k is their share of the total; ``"log_sum"``: the sum over a shape's area
        in um^2 is its log1p CP10k (PixNet as published); ``"log_mean"``: the mean over its area is.
    pixel_um2
        Area of a map pixel in um^2.
    """
    if quantity == "density":
        return torch.log1p(1e4 * sums[:, :-1] / sums[:, -1:].clamp(min=1e-6))
    if quantity == "log_sum":
        return sums[:, :-1] * pixel_um2
    return sums[:, :-1] / covered.clamp(min=1e-6)[:, None]


def nb_deviance(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Return half the deviance of a negative binomial with variance ``mean + dispersion * mean**2``, elementwise.

    Parameters
    ----------
    counts, mean
        Observed and expected counts, ``(shapes, genes)``.
    dispersion
        Of each gene, ``(genes,)``, positive.
    """
    mean, size = mean.clamp(min=1e-6), 1 / dispersion
    # Ratios before logs: differences of logs lose their digits where counts are large. A count of 0 has no first term.
    own = counts * (counts.clamp(min=1e-6) / mean).log()
    return own - (counts + size) * torch.log1p((counts - mean) / (mean + size))


def shape_loss(
    sums: Tensor,
    covered: Tensor,
    cp10k: Tensor,
    depth: Tensor,
    kind: str = "mse+pcc",
    *,
    quantity: str = "density",
    pixel_um2: float = 1.0,
    umi: Tensor | None = None,
    dispersion: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare the sums over shapes with the measurement.

    Parameters
    ----------
    sums
        Sums of the map over each shape, ``(shapes, genes + 1)``, the last column those of ``__total__``.
    covered
        Pixels that each shape covers, ``(shapes,)``.
    cp10k
        Measured CP10k, ``(shapes, genes)``.
    depth
        Measured UMI per area over the section's mean, times 1e4, ``(shapes,)``.
    kind
        ``"mse+pcc"``: ``MSE + 0.5 (1 - PCC)`` on log1p of CP10k, PCC per gene over the shapes of the batch (PixNet);
        ``"mse"``, ``"pcc"``: one of the two; ``"poisson+pcc"``: Poisson deviance of CP10k in place of MSE;
        ``"nb+pcc"``: half the negative binomial deviance of the raw counts in its place, so that shapes of few transcripts
        say less.
    quantity, pixel_um2
        What the map holds (see `log_expression`), and the area of its pixels in um^2.
    umi
        All UMI of each shape, ``(shapes,)``; for ``"nb+pcc"``.
    dispersion
        Of each gene, ``(genes,)``; for ``"nb+pcc"``.

    Returns
    -------
    dict
        Scalars ``expression``, ``pcc`` (mean over genes, no part of the gradient) and ``total`` (squared error of
        log depth).
    """
    predicted, measured = log_expression(sums, covered, quantity, pixel_um2), torch.log1p(cp10k)
    correlation = pearson(predicted, measured)
    known = torch.isfinite(correlation)
    pcc = torch.where(known, correlation, 0.0).sum() / known.sum().clamp(min=1)
    if kind == "mse+pcc":
        expression = F.mse_loss(predicted, measured) + PCC_WEIGHT * (1 - pcc)
    elif kind == "mse":
        expression = F.mse_loss(predicted, measured)
    elif kind == "pcc":
        expression = 1 - pcc
    elif kind == "poisson+pcc":
        # Per gene in units of its mean, so that a handful of abundant genes does not decide.
        scale = cp10k.mean(dim=0).clamp(min=1e-3)
        rate = (_linear(predicted) / scale).clamp(min=1e-6)
        expression = (rate - cp10k / scale * rate.log()).mean() + PCC_WEIGHT * (1 - pcc)
    elif kind == "nb+pcc":
        if umi is None or dispersion is None:
            raise ValueError("loss 'nb+pcc' needs umi= and dispersion=")
        per = umi[:, None] / 1e4
        deviance = nb_deviance(cp10k * per, _linear(predicted) * per, dispersion)
        expression = deviance.mean() + PCC_WEIGHT * (1 - pcc)
    else:
        raise ValueError(f"loss is {kind!r}; valid: {', '.join(map(repr, LOSSES))}")
    density = (sums[:, -1] / covered.clamp(min=1e-6)).clamp(min=1e-6)
    total = F.mse_loss(density.log(), depth.log())
    return {"expression": expression, "pcc": pcc.detach(), "total": total}


def _linear(log1p: Tensor) -> Tensor:
    """Return CP10k of log1p CP10k, whose maps of logs may leave its range (0 to 1e4) while they learn."""
    return torch.expm1(log1p.clamp(max=9.3)).clamp(min=0)
