"""How unlike the training tissue a place is: how far its features lie from those that the model was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

RANK = 64
"""Directions in which the training tissue varies most; what lies off them counts together."""

GAUSSIANS = 8
"""Gaussians that describe the training tissue along these directions, at most."""

LEAST_EACH = 500
"""Places of training tissue for each Gaussian, at least; one needs no more than `LEAST`."""

STEPS = 200
"""Steps between the percentiles that are kept."""

REGULARISATION = 0.1
"""Added to the variances of each Gaussian; those of the features are 1."""

FAR = 1e6
"""Stands for infinity, which checkpoints do not hold: the surprise of a Gaussian that is not there, for instance."""

LEAST = 100
"""Places at least of training tissue, and of held-out tissue, for percentiles."""


class Novelty(nn.Module):
    """Percentile of the distance of features from those of the training tissue.

    Features of all levels are averaged over a pixel of the coarsest. Principal components of the training tissue split
    them in two: along the components, the surprise is the negative log density of a mixture of Gaussians, which stand
    for kinds of tissue; off them, it is the squared distance. The distance is the larger of the two, each in spreads of
    held-out tissue above its median, and 99 is farther than 99 % of held-out training tissue.

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
    factors: Tensor
    offsets: Tensor
    weights: Tensor
    scales: Tensor
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
            "factors": torch.eye(rank).repeat(GAUSSIANS, 1, 1),  # of the precisions
            "offsets": torch.zeros(GAUSSIANS, rank),
            "weights": torch.zeros(GAUSSIANS),  # logs, normalisation included
            "scales": torch.tensor([0.0, 1.0, 0.0, 1.0]),  # median and spread, along and off the components
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
            return self.percentile(self.distance(self.pooled(features)))

    def distance(self, pooled: Tensor) -> Tensor:
        """Return the distance of pooled features ``(..., C)``."""
        along, off = self._surprise(pooled)
        return torch.maximum((along - self.scales[0]) / self.scales[1], (off - self.scales[2]) / self.scales[3])

    def _surprise(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative log density along the components, and the squared distance off them."""
        standard = (pooled - self.mean) / self.sd
        along = standard @ self.components.T
        off = (standard.square().sum(dim=-1) - along.square().sum(dim=-1)).clamp(min=0)
        within = [(along @ f - o).square().sum(dim=-1) for f, o in zip(self.factors, self.offsets)]
        return -torch.logsumexp(self.weights - torch.stack(within, dim=-1) / 2, dim=-1), off

    def percentile(self, distance: Tensor) -> Tensor:
        """Return the percentile of distances among those of held-out tissue."""
        above = torch.searchsorted(self.quantiles, distance.contiguous()).clamp(1, STEPS)
        low, high = self.quantiles[above - 1], self.quantiles[above]
        share = ((distance - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        return (above - 1 + share) * (100 / STEPS)

    @torch.no_grad()
    def fit(self, training: NDArray[np.float32], held_out: NDArray[np.float32], seed: int) -> None:
        """Fit the densities to pooled features of training tissue ``(n, C)``, and percentiles to those of held-out tissue.

        With too few of either, nothing is known.
        """
        from sklearn.decomposition import PCA

        if min(len(training), len(held_out)) < LEAST:
            self.quantiles.zero_()
            return
        mean, sd = training.mean(axis=0), training.std(axis=0).clip(1e-3)
        rank = min(len(self.components), len(training) // 4)
        standard = (training - mean) / sd
        components = PCA(rank, random_state=seed).fit(standard).components_
        mixture = _mixture(standard @ components.T, seed)
        factors, k = mixture.precisions_cholesky_, len(mixture.weights_)
        offsets = np.einsum("kr,krs->ks", mixture.means_, factors)
        weights = np.log(mixture.weights_) + np.log(np.einsum("krr->kr", factors)).sum(axis=1)
        for buffer in (self.components, self.factors, self.offsets):
            buffer.zero_()
        self.weights.fill_(-FAR)
        for buffer, value in (
            (self.mean, mean),
            (self.sd, sd),
            (self.components[:rank], components),
            (self.factors[:k, :rank, :rank], factors),
            (self.offsets[:k, :rank], offsets),
            (self.weights[:k], weights),
        ):
            buffer.copy_(torch.as_tensor(value))
        unseen = torch.from_numpy(held_out).to(self.mean.device)
        scales = [_median_and_spread(surprise.double().cpu().numpy()) for surprise in self._surprise(unseen)]
        if rank == len(mean):  # nothing is off the components
            scales[1] = (FAR, 1.0)
        self.scales.copy_(torch.tensor([*scales[0], *scales[1]]))
        distance = self.distance(unseen).double().cpu().numpy()
        self.quantiles.copy_(torch.from_numpy(np.quantile(distance, np.linspace(0, 1, STEPS + 1))))


def _mixture(along: NDArray[np.float32], seed: int) -> GaussianMixture:
    """Fit a mixture of Gaussians to features along the components."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    k = int(np.clip(len(along) // LEAST_EACH, 1, GAUSSIANS))
    mixture = GaussianMixture(k, reg_covar=REGULARISATION, max_iter=50, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 50 steps describe it well enough
        return mixture.fit(along.astype(np.float64))


def _median_and_spread(surprise: NDArray[np.float64]) -> tuple[float, float]:
    """Return the median, and how far above it the 84th percentile lies."""
    median, high = np.quantile(surprise, [0.5, 0.84])
    return float(median), max(float(high - median), 1e-3)
