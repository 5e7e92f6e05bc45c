"""The gene panel of a synthetic tissue: programs by cell type, gradients, place in the cell; and counts drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixnet.datasets._synthetic import cells as types
from pixnet.datasets._synthetic.cells import RNA_CONTENT, TYPES, Cells

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# The program of each gene and the cell type that expresses it, in the order in which a panel is filled.
_PROGRAMS: tuple[tuple[str, int | None], ...] = (
    ("TUM", types.TUM),
    ("EPI", types.EPI),
    ("FIB", types.FIB),
    ("ALL", None),
    ("TCE", types.TCELL),
    ("HYP", None),
    ("BCE", types.BCELL),
    ("END", types.ENDO),
    ("MAC", types.MACRO),
    ("GRA", None),
    ("PLA", types.PLASMA),
    ("MUS", types.MUSCLE),
    ("ADI", types.ADIPO),
)
_CONTENT_SD = 0.35  # spread of the RNA content from cell to cell
_AMBIENT = 0.03


@dataclass(frozen=True)
class Panel:
    """Genes, and how much of each a source of expression gives.

    The sources are, in order: the nuclei of each cell type, hypoxic nuclei, graded nuclei; the cells of each type,
    hypoxic cells, graded cells; the area of the tissue.

    Attributes
    ----------
    names
        ``"{program}{number}"``: TUM1, EPI1, ... ; HYP follows hypoxia, GRA a gradient that leaves no trace in the
        picture, ALL is in every cell.
    loadings
        ``(genes, sources)``.
    """

    names: list[str]
    loadings: NDArray[np.float64]

    @classmethod
    def draw(cls, n_genes: int, seed: int) -> Panel:
        """Draw a panel."""
        rng = np.random.default_rng([seed, 201])
        n_types = len(TYPES)
        program = np.arange(n_genes) % len(_PROGRAMS)
        names = [f"{_PROGRAMS[p][0]}{i // len(_PROGRAMS) + 1}" for i, p in enumerate(program)]
        level = np.exp(rng.normal(0, 0.8, n_genes))
        by_type = rng.uniform(0.01, 0.10, (n_genes, n_types))
        # Markers are seldom pure: one in four is also in another type.
        shared = rng.random(n_genes) < 0.25
        other, share = rng.integers(0, n_types, n_genes), rng.uniform(0.2, 0.7, n_genes)
        by_type[shared, other[shared]] = share[shared]
        lack, graded = np.zeros(n_genes), np.zeros(n_genes)
        for gene, p in enumerate(program):
            name, kind = _PROGRAMS[p]
            if kind is not None:
                by_type[gene, kind] = 1.0
                if kind == types.TUM:
                    by_type[gene, types.EPI] = max(by_type[gene, types.EPI], 0.25)
            elif name == "ALL":
                by_type[gene] = rng.uniform(0.3, 0.6, n_types)
            elif name == "HYP":
                lack[gene] = 1.6
            else:
                graded[gene] = 0.8
        by_type *= level[:, None]
        # Every cell type has the same sum over the panel; how much RNA it holds is its content.
        by_type /= by_type.sum(axis=0, keepdims=True)
        typical = by_type.max(axis=1)
        for extra in (lack, graded):
            if extra.any():
                extra *= typical.mean() * level / level.mean()
        nuclear = rng.beta(1.6, 2.4, n_genes)[:, None]
        from_cells = np.column_stack([by_type, lack, graded])
        ambient = _AMBIENT * by_type.mean(axis=1, keepdims=True) * 1e-2
        loadings = np.concatenate([nuclear * from_cells, (1 - nuclear) * from_cells, ambient], axis=1)
        return cls(names, loadings)

    def amounts(self, cells: Cells, seed: int) -> NDArray[np.float64]:
        """Draw the RNA that each cell gives to its sources, ``(cells, types + 2)``: alike for nuclei and cells."""
        rng = np.random.default_rng([seed, 202])
        n, n_types = len(cells.kind), len(TYPES)
        content = RNA_CONTENT[cells.kind] * np.exp(rng.normal(0, _CONTENT_SD, n) - _CONTENT_SD**2 / 2)
        amounts = np.zeros((n, n_types + 2))
        amounts[np.arange(n), cells.kind] = content
        amounts[:, n_types] = content * cells.hypoxia
        if n:
            angle = rng.uniform(0, 2 * np.pi)
            along = np.cos(angle) * cells.nuclei["x"] + np.sin(angle) * cells.nuclei["y"]
            low, high = along.min(), along.max()
            amounts[:, n_types + 1] = content * (along - low) / max(high - low, 1e-9)
        return amounts


class Platform(NamedTuple):
    """A way to measure: transcripts caught per µm² of average tissue, spread of that (sd of its log), noise, and shapes.

    Counts are negative binomial with the size parameter ``nb_size``. Spots have a pitch and a diameter (µm), bins an
    edge.
    """

    depth: float
    spread: float
    nb_size: float
    pitch: float = 0.0
    diameter: float = 0.0
    edge: float = 0.0


PLATFORMS = {
    "spots": Platform(1.0, 0.20, 12.0, pitch=100.0, diameter=55.0),
    "spots_legacy": Platform(0.7, 0.30, 8.0, pitch=200.0, diameter=100.0),
    "bins": Platform(0.7, 0.25, 8.0, edge=8.0),
    "bins_002um": Platform(0.7, 0.25, 8.0, edge=2.0),
    "cells": Platform(2.0, 0.25, 10.0),
}
_ROWS = 20_000


def draw_counts(expected: NDArray[np.float64], platform: str, seed: int) -> csr_matrix:
    """Draw raw counts, float32, from ``(shapes, genes)``: density times µm², divided by 10,000."""
    from scipy import sparse

    depth, spread, nb_size, *_ = PLATFORMS[platform]
    parts = []
    for start in range(0, max(len(expected), 1), _ROWS):
        rng = np.random.default_rng([seed, 301, list(PLATFORMS).index(platform), start])
        part = expected[start : start + _ROWS] * depth
        caught = np.exp(rng.normal(0, spread, len(part)) - spread**2 / 2)
        mean = np.maximum(part * caught[:, None], 0)
        counts = rng.poisson(mean * rng.gamma(nb_size, 1 / nb_size, mean.shape))
        parts.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.vstack(parts, format="csr")
