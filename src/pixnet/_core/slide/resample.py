"""Resampling along one axis: exact area means, and linear interpolation."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def area_weights(start: int, stop: int, first: int, last: int, ratio: float, extent: float) -> sparse.csr_array:
    """Return how much of each source pixel lies in each target pixel, along one axis.

    Parameters
    ----------
    start, stop
        Range of target pixels.
    first, last
        Range of source pixels.
    ratio
        Source pixels per target pixel, at least 1.
    extent
        Length of the axis in source pixels; only what lies within counts.

    Returns
    -------
    csr_array
        ``(stop - start, last - first)`` float64, in source pixels.
    """
    i = np.arange(start, stop)
    low, high = i * ratio, np.minimum((i + 1) * ratio, extent)
    columns = np.floor(low).astype(int)[:, None] + np.arange(int(np.ceil(ratio)) + 1)
    overlap = np.minimum(columns + 1, high[:, None]) - np.maximum(columns, low[:, None])
    return _matrix(overlap, columns, first, last)


def linear_weights(start: int, stop: int, first: int, last: int, ratio: float) -> sparse.csr_array:
    """Return the weights that interpolate linearly between the centres of source pixels, along one axis.

    The arguments are those of `area_weights`, with a ratio below 1; outside ``first`` to ``last`` the edge repeats.
    """
    centre = (np.arange(start, stop) + 0.5) * ratio - 0.5
    below = np.floor(centre).astype(int)
    share = centre - below
    columns = np.clip(np.stack([below, below + 1], axis=1), first, last - 1)
    return _matrix(np.stack([1 - share, share], axis=1), columns, first, last)


def _matrix(weights: np.ndarray, columns: np.ndarray, first: int, last: int) -> sparse.csr_array:
    """Return a matrix from a few entries in each row."""
    rows = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
    keep = (weights > 1e-9) & (columns >= first) & (columns < last)
    entries = (weights[keep], (rows[keep], columns[keep] - first))
    return sparse.coo_array(entries, shape=(len(columns), last - first)).tocsr()
