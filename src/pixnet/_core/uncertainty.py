"""How far off a prediction may be: shapes of any size, from what shapes of one size showed.

The expression of a shape is Gamma distributed around its prediction, so that its counts are negative binomial. The
error of the model is a field in space whose correlation falls exponentially with distance. A shape sees its mean, so
its dispersion is the field's variance times the mean correlation between two points of the shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

_RADII = np.logspace(-3, 3, 241)
"""Radii of a disc, in correlation lengths, at which the mean correlation is tabulated."""

_MOST_DISPERSION = 1e4


def check_level(level: object) -> None:
    """Refuse a probability of an interval that is none."""
    number = isinstance(level, int | float | np.number) and not isinstance(level, bool)
    if not number or not 0 < level < 1:  # type: ignore[operator]
        raise ValueError(f"interval is {level!r}; a probability between 0 and 1 is needed, such as 0.9")


def mean_correlation(area_um2: ArrayLike, correlation_um: float) -> Floats:
    """Return the mean of ``exp(-distance / correlation_um)`` over pairs of points of a disc of some area."""
    radius = np.sqrt(np.asarray(area_um2, dtype=np.float64) / np.pi) / correlation_um
    return np.interp(np.log(np.maximum(radius, 1e-12)), np.log(_RADII), _TABLE)


def _disc_correlation(radius: Floats) -> Floats:
    """Return the mean of ``exp(-d)`` over the distribution of distances ``d`` in discs of some radii."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    s = (nodes + 1) / 2  # distance over the diameter
    density = (16 * s / np.pi) * (np.arccos(s) - s * np.sqrt(1 - s**2))
    return (np.exp(-2 * radius[:, None] * s) * density * weights / 2).sum(axis=1)


_TABLE = _disc_correlation(_RADII)


def at_area(dispersion: ArrayLike, area_um2: ArrayLike, known_um2: float, correlation_um: float) -> Floats:
    """Return the dispersion of shapes of other areas ``(shapes, genes)`` from that of shapes of one area ``(genes,)``."""
    scale = mean_correlation(area_um2, correlation_um) / mean_correlation(known_um2, correlation_um)
    return np.multiply.outer(scale, np.asarray(dispersion, dtype=np.float64))


def gamma_quantile(share: float, dispersion: Floats) -> Floats:
    """Return the quantile of a Gamma variable of mean 1 and of variance ``dispersion``."""
    shape = 1 / np.clip(dispersion, 1e-6, _MOST_DISPERSION)
    return special.gammaincinv(shape, share) / shape


class GammaInterval:
    """Central interval of the expression of a shape over its prediction, tabulated over dispersions.

    Parameters
    ----------
    level
        Probability of the interval.
    """

    def __init__(self, level: float) -> None:
        self._log = np.linspace(np.log(1e-6), np.log(_MOST_DISPERSION), 800)
        tails = ((1 - level) / 2, (1 + level) / 2)
        self._ends = [gamma_quantile(tail, np.exp(self._log)) for tail in tails]

    def __call__(self, dispersion: Floats) -> tuple[Floats, Floats]:
        """Return the factors of the lower and the upper end; NaN where the dispersion is unknown."""
        at = np.log(np.clip(dispersion, 1e-6, _MOST_DISPERSION))
        lower, upper = (np.interp(at, self._log, end) for end in self._ends)
        return np.where(np.isnan(dispersion), np.nan, lower), np.where(np.isnan(dispersion), np.nan, upper)


def count_cdf(counts: Floats, mean: Floats, dispersion: Floats) -> Floats:
    """Return the probability of at most so many counts: negative binomial, ``var = mean + dispersion * mean**2``."""
    size = 1 / np.clip(dispersion, 1e-6, _MOST_DISPERSION)
    mean = np.maximum(mean, 1e-12)
    found = special.betainc(size, np.maximum(counts, 0) + 1, size / (size + mean))
    return np.where(counts < 0, 0.0, found)


def count_quantile(share: float, mean: Floats, dispersion: Floats) -> Floats:
    """Return a quantile of negative binomial counts."""
    size = 1 / np.clip(dispersion, 1e-6, _MOST_DISPERSION)
    mean = np.maximum(mean, 1e-12)
    return np.asarray(stats.nbinom.ppf(share, size, size / (size + mean)), dtype=np.float64)


def randomised_pit(counts: Floats, mean: Floats, dispersion: Floats, rng: np.random.Generator) -> Floats:
    """Return the randomised probability integral transform of counts: uniform on 0 to 1 where the distribution is right.

    A count stands for the range of probabilities between the one below it and its own, in which a point is drawn, so
    that few counts do not look better covered than they are (Czado, Gneiting & Held, Biometrics 2009).
    """
    low, high = count_cdf(counts - 1, mean, dispersion), count_cdf(counts, mean, dispersion)
    return low + rng.random(counts.shape) * (high - low)


def marginal_dispersion(counts: Floats, total: Floats) -> tuple[Floats, Floats]:
    """Return each gene's share of all transcripts and its dispersion around it, by moments: what is known without an image."""
    share = counts.sum(axis=0) / max(float(total.sum()), 1e-9)
    mean = total[:, None] * share
    excess = ((counts - mean) ** 2 - mean).sum(axis=0)
    return share, np.clip(excess / np.maximum((mean**2).sum(axis=0), 1e-12), 0, 100)
