"""What a map holds: from logits to values, and where training starts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINKS = ("exp", "softplus")

QUANTITIES = {
    "density": "CP10k density (__total__ averages 1e4 over the training shapes)",
    "log_sum": "log1p CP10k per um2, summed over a shape (__total__: density, averages 1e4 over the training shapes)",
    "log_mean": "log1p CP10k, averaged over a shape (__total__: density, averages 1e4 over the training shapes)",
}
"""What a gene's channel is, by its unit: a linear density of transcripts, or what sums (or averages) to a shape's log."""


def linked(logits: Tensor, quantity: str, link: str, area_um2: float) -> Tensor:
    """Return the map that logits stand for.

    Parameters
    ----------
    logits
        ``(N, genes + 1, ...)``, the total's last.
    quantity, link
        Of the model.
    area_um2
        What logits of a ``"log_sum"`` are divided by, so that they are of the size of logs.
    """
    # Logarithms and exponentials in float32: bfloat16 would keep 3 digits of a value that spans decades.
    logits = logits.float()
    genes, total = logits[:, :-1], logits[:, -1:]
    exp = link == "exp"
    total = (total.clamp(-10, 4).exp() if exp else F.softplus(total)) * 1e4
    if quantity == "density":
        genes = (genes.clamp(max=0).exp() if exp else F.softplus(genes) * 1e-3) * total
    elif quantity == "log_sum":
        genes = genes / area_um2
    return torch.cat([genes, total], dim=1)


def baseline(level: Tensor, quantity: str, link: str) -> tuple[Tensor, float]:
    """Return the logits of the genes, ``(G,)``, and of the total, that are the same everywhere.

    Parameters
    ----------
    level
        Of densities, each gene's mean share of all transcripts, ``(G,)``; of logs, its mean log1p CP10k.
    quantity, link
        Of the model.
    """
    total = 0.0 if link == "exp" else 0.5413  # its exp, its softplus is 1
    if quantity != "density":
        return level, total
    level = level.clamp(min=1e-8)
    if link == "exp":
        return level.log(), total
    target = level * 1e3
    return target + torch.log(-torch.expm1(-target)), total
