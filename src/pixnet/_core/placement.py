"""Where points lie on a slide, as they are placed and as they would lie mirrored, turned or shifted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

# How far sizes or distances of an array may differ from their median.
SPREAD = 0.2


def on_mask(mask: NDArray[np.bool_], to_mask: NDArray[np.float64], x: NDArray, y: NDArray) -> NDArray[np.bool_]:
    """Return whether each point (pixels of the slide) is on a mask; nothing outside it is."""
    col, row = np.floor(to_mask[:2, :2] @ np.stack([x, y]) + to_mask[:2, 2:]).astype(np.int64)
    found = (row >= 0) & (col >= 0) & (row < mask.shape[0]) & (col < mask.shape[1])
    found[found] = mask[row[found], col[found]]
    return found


def pitch(centres: NDArray, shapes: str) -> float:
    """Return the mean distance of neighbours in a square or hexagonal array, named for messages."""
    if len(centres) < 4:
        raise ValueError(f"{shapes!r} has {len(centres)} shapes; at least 4 are needed to measure their pitch")
    tree = cKDTree(centres)
    distances = tree.query(centres, k=min(7, len(centres)))[0][:, 1:]
    nearest = float(np.median(distances[:, 0]))
    if nearest <= 0:
        raise ValueError(f"the shapes of {shapes!r} lie on one another; a regular array is needed")
    for _ in range(3):
        # Only the nearest neighbour would be short where centres were jittered by measurement; diagonals of a square
        # array are 1.41 away and stay out.
        neighbours = distances[(distances > 0.75 * nearest) & (distances < 1.25 * nearest)]
        nearest = float(neighbours.mean())
    usual = distances[:, 0]
    if np.mean(np.abs(usual - nearest) < SPREAD * nearest) < 0.8:
        raise ValueError(f"the centres of {shapes!r} do not form a regular array, so there is no pitch to measure")
    return nearest
