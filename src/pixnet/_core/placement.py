"""Where points lie on a slide, as they are placed and as they would lie mirrored, turned, scaled or shifted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.stats import rankdata

from pixnet._correlation import pearson

# How far sizes or distances of an array may differ from their median.
SPREAD = 0.2

UM = "in µm"
"""Placement of points whose coordinates are µm."""


@dataclass(frozen=True)
class PointLookup:
    """A picture of a slide that is asked at points.

    Attributes
    ----------
    values
        ``(y, x)``.
    to_pixels
        Matrix ``(3, 3)`` from pixels of the slide to pixels of the picture.
    """

    values: NDArray
    to_pixels: NDArray[np.float64]

    def at(self, x: NDArray, y: NDArray) -> NDArray:
        """Return the value at each point (pixels of the slide); 0 outside the picture."""
        col, row = np.floor(self.to_pixels[:2, :2] @ np.stack([x, y]) + self.to_pixels[:2, 2:]).astype(np.int64)
        inside = (row >= 0) & (col >= 0) & (row < self.values.shape[0]) & (col < self.values.shape[1])
        found = np.zeros(len(x), dtype=self.values.dtype)
        found[inside] = self.values[row[inside], col[inside]]
        return found


def placements(x: NDArray, y: NDArray, width: int, height: int, mpp: float) -> dict[str, tuple[NDArray, NDArray]]:
    """Return points as they are placed, mirrored, turned, exchanged, and scaled as if they were µm; by name."""
    found = {
        "as given": (x, y),
        "x mirrored": (width - x, y),
        "y mirrored": (x, height - y),
        "turned by 180 degrees": (width - x, height - y),
        "x and y exchanged": (y, x),
        "turned by 90 degrees": (height - y, x),
        "turned by 270 degrees": (y, width - x),
        "x and y exchanged, turned by 180 degrees": (height - y, width - x),
    }
    if not 0.8 < mpp < 1.25:
        found[UM] = (x / mpp, y / mpp)
    return found


def shifts(x: NDArray, y: NDArray, step: float, mpp: float) -> dict[str, tuple[NDArray, NDArray]]:
    """Return points shifted by one or two steps (pixels) in each direction; by name, in µm."""
    return {
        f"shifted by ({dx * step * mpp:+.0f}, {dy * step * mpp:+.0f}) µm": (x + dx * step, y + dy * step)
        for dx, dy in product((-2, -1, 0, 1, 2), repeat=2)
        if dx or dy
    }


def compare_placements(
    x: NDArray,
    y: NDArray,
    diameter: float,
    size: tuple[int, int],
    mpp: float,
    tissue: PointLookup,
    stain: PointLookup,
    total: NDArray | None,
) -> pd.DataFrame:
    """Return how well points fit a slide under each placement.

    Parameters
    ----------
    x, y
        Centres, in pixels of the slide.
    diameter
        Their usual diameter (pixels); shifts are half of it, and all of it.
    size
        Width and height of the slide (pixels).
    mpp
        Its pixel size (µm/px).
    tissue, stain
        Where there is tissue, and how much haematoxylin there is around each place.
    total
        Transcripts of each point; NaN where they are unknown. None: all are.

    Returns
    -------
    DataFrame
        Index ``placement``: "as given", the others, and of the shifts the best. Columns ``on_tissue`` and
        ``correlation``.
    """
    places = placements(x, y, *size, mpp)
    if total is not None:
        places |= shifts(x, y, diameter / 2, mpp)
    rows = {}
    for name, (a, b) in places.items():
        rows[name] = (float(tissue.at(a, b).mean()), _rank_correlation(stain.at(a, b), total))
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["on_tissue", "correlation"])
    by = ["correlation", "on_tissue"] if total is not None else ["on_tissue"]
    order = found.iloc[1:].sort_values(by, ascending=False, kind="stable").index
    shifted = [name for name in order if name.startswith("shifted")]
    return found.loc[["as given", *(name for name in order if name not in shifted[1:])]].rename_axis("placement")


def _rank_correlation(stain: NDArray, total: NDArray | None) -> float:
    """Return Spearman's correlation; NaN where it is not defined."""
    if total is None:
        return np.nan
    known = np.isfinite(total)
    if known.sum() < 3:
        return np.nan
    return float(pearson(rankdata(stain[known]), rankdata(total[known])))


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
