"""What training minimises, over shapes: sums of the map against what was measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("mse+pcc", "mse", "pcc", "poisson+pcc")


def pearson(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the Pearson correlation of each column over the rows, ``(genes,)``; NaN where a column is constant."""
    p = prediction - prediction.mean(dim=0)
    t = target - target.mean(dim=0)
    # Clamped before the root, whose slope at 0 would turn the gradients of all genes into NaN.
    scale = (p.square().sum(dim=0) * t.square().sum(dim=0)).clamp(min=1e-16).sqrt()
    return torch.where(scale > 1e-8, (p * t).sum(dim=0) / scale, torch.nan)


def shape_loss(sums: Tensor, covered: Tensor, cp10k: Tensor, depth: Tensor, kind: str = "mse+pcc") -> dict[str, Tensor]:
    """Compare the sums over shapes with the measurement.

    Parameters
    ----------
    sums
        Sums of the densities over each shape, ``(shapes, genes + 1)``, the last column those of ``__total__``.
    covered
        Pixels that each shape covers, ``(shapes,)``.
    cp10k
        Measured CP10k, ``(shapes, genes)``.
    depth
        Measured UMI per area over the section's mean, times 1e4, ``(shapes,)``.
    kind
        ``"mse+pcc"``: ``MSE + 0.5 (1 - PCC)`` on log1p of CP10k, PCC per gene over the shapes of the batch (PixNet);
        ``"mse"``, ``"pcc"``: one of the two; ``"poisson+pcc"``: Poisson deviance of CP10k in place of MSE.

    Returns
    -------
    dict
        Scalars ``expression``, ``pcc`` (mean over genes, no part of the gradient) and ``total`` (squared error of
        log depth).
    """
    genes = 1e4 * sums[:, :-1] / sums[:, -1:].clamp(min=1e-6)
    predicted, measured = torch.log1p(genes), torch.log1p(cp10k)
    correlation = pearson(predicted, measured)
    known = torch.isfinite(correlation)
    pcc = torch.where(known, correlation, 0.0).sum() / known.sum().clamp(min=1)
    if kind == "mse+pcc":
        expression = F.mse_loss(predicted, measured) + 0.5 * (1 - pcc)
    elif kind == "mse":
        expression = F.mse_loss(predicted, measured)
    elif kind == "pcc":
        expression = 1 - pcc
    elif kind == "poisson+pcc":
        # Per gene in units of its mean, so that a handful of abundant genes does not decide.
        scale = cp10k.mean(dim=0).clamp(min=1e-3)
        rate = (genes / scale).clamp(min=1e-6)
        expression = (rate - cp10k / scale * rate.log()).mean() + 0.5 * (1 - pcc)
    else:
        raise ValueError(f"loss is {kind!r}; valid: {', '.join(map(repr, LOSSES))}")
    density = (sums[:, -1] / covered.clamp(min=1e-6)).clamp(min=1e-6)
    total = F.mse_loss(density.log(), depth.log())
    return {"expression": expression, "pcc": pcc.detach(), "total": total}
