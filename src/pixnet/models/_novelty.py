"""How unlike the training tissue a place is: how far its features lie from those that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

RANK = 256
"""Directions in which features are compared one by one; the rest counts together."""

STEPS = 200
"""Steps between the percentiles that are kept."""

LEAST = 100
"""Places at least of training tissue, and of held-out tissue, for percentiles."""


class Novelty(nn.Module):
    """Percentile of the distance of features from those of the training tissue.

    Features of all levels, averaged over a pixel of the coarsest, have the density of a probabilistic principal component
    analysis (Tipping & Bishop 1999) of those of the training tissue. The distance is that of Mahalanobis under it: 99 is
    farther than 99 % of held-out training tissue.

    Parameters
    ----------
    levels
        Number of channels and stride of each level in use.
    stride
        Stride of what is returned at least (model pixels); the coarsest level's if that is larger.
    """

    mean: Tensor
    sd: Tensor
    components: Tensor
    variance: Tensor
    noise: Tensor
    quantiles: Tensor

    def __init__(self, levels: Mapping[int, tuple[int, int]], stride: int) -> None:
        super().__init__()
        self.strides = {level: s for level, (_, s) in levels.items()}
        self.stride = max(stride, *self.strides.values())
        n = sum(channels for channels, _ in levels.values())
        rank = min(RANK, n)
        for name, value in {
            "mean": torch.zeros(n),
            "sd": torch.ones(n),
            "components": torch.zeros(rank, n),
            "variance": torch.ones(rank),
            "noise": torch.ones(()),
            "quantiles": torch.zeros(STEPS + 1),
        }.items():
            self.register_buffer(name, value)

    @property
    def known(self) -> bool:
        """Whether it was fitted."""
        return bool(self.quantiles.any())

    def pooled(self, features: Mapping[int, Tensor]) -> Tensor:
        """Return raw features of an image by level, each averaged over pixels of `stride`, ``(N, h, w, C)``."""
        parts = [F.avg_pool2d(features[level].float(), self.stride // s) for level, s in self.strides.items()]
        return torch.cat([part.permute(0, 2, 3, 1) for part in parts], dim=-1)

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """Return the percentile of each pixel, ``(N, h, w)``, from raw features by level."""
        with torch.autocast(self.mean.device.type, enabled=False):
            return self.percentile(self.log_distance(self.pooled(features)))

    def log_distance(self, pooled: Tensor) -> Tensor:
        """Return the log of the squared distance of pooled features ``(..., C)``."""
        standard = (pooled - self.mean) / self.sd
        along = standard @ self.components.T
        rest = (standard.square().sum(dim=-1) - along.square().sum(dim=-1)).clamp(min=0)
        return ((along.square() / self.variance).sum(dim=-1) + rest / self.noise).clamp(min=1e-6).log()

    def percentile(self, distance: Tensor) -> Tensor:
        """Return the percentile of log distances among those of held-out tissue."""
        above = torch.searchsorted(self.quantiles, distance.contiguous()).clamp(1, STEPS)
        low, high = self.quantiles[above - 1], self.quantiles[above]
        share = ((distance - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        return (above - 1 + share) * (100 / STEPS)

    @torch.no_grad()
    def fit(self, training: NDArray[np.float32], held_out: NDArray[np.float32], seed: int) -> None:
        """Fit the density to pooled features of training tissue ``(n, C)``, and percentiles to those of held-out tissue.

        With too few of either, nothing is known.
        """
        from sklearn.decomposition import PCA

        if min(len(training), len(held_out)) < LEAST:
            self.quantiles.zero_()
            return
        mean, sd = training.mean(axis=0), training.std(axis=0).clip(1e-3)
        rank = min(len(self.variance), len(training) // 4)
        pca = PCA(rank, random_state=seed).fit((training - mean) / sd)
        full = rank == len(mean)  # nothing is left over
        self.components.zero_()
        self.variance.fill_(1)
        for buffer, value in (
            (self.mean, mean),
            (self.sd, sd),
            (self.components[:rank], pca.components_),
            (self.variance[:rank], pca.explained_variance_.clip(1e-3)),
            (self.noise, 1.0 if full else max(pca.noise_variance_, 1e-3)),
        ):
            buffer.copy_(torch.as_tensor(value))
        device = self.mean.device
        distance = self.log_distance(torch.from_numpy(held_out).to(device)).double().cpu().numpy()
        self.quantiles.copy_(torch.from_numpy(np.quantile(distance, np.linspace(0, 1, STEPS + 1))))
