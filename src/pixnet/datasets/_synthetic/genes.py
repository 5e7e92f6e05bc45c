"""The gene panel of a synthetic tissue: programs by cell type, gradients, place in the cell; and counts drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixnet.datasets._synthetic.cells import (
    ADIPO,
    BCELL,
    ENDO,
    EPI,
    FIB,
    MACRO,
    MUSCLE,
    PLASMA,
    TCELL,
    TUM,
    TYPES,
    Cells,
)

# What a gene belongs to, in the order in which a panel is filled: 13 genes have one of each.
_PROGRAMS: tuple[tuple[str, int | None], ...] = (
    ("TUM", TUM),
    ("EPI", EPI),
    ("FIB", FIB),
    ("ALL", None),
    ("TCE", TCELL),
    ("HYP", None),
    ("BCE", BCELL),
    ("END", ENDO),
    ("MAC", MACRO),
    ("GRA", None),
    ("PLA", PLASMA),
    ("MUS", MUSCLE),
    ("ADI", ADIPO),
)
# RNA in a cell, by type, and how much of it varies from cell to cell.
_CONTENT = np.array([1.3, 1.9, 0.8, 0.45, 0.5, 1.2, 1.1, 0.7, 0.8, 0.7])
_CONTENT_SD = 0.35
_AMBIENT = 0.03


@dataclass(frozen=True)
class Panel:
    """Genes, and how much of each a source of expression gives.

    Sources, in order: the nuclei of each cell type, hypoxic nuclei, graded nuclei; the cells of each type, hypoxic
    cells, graded cells; the tissue's area.

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
                if kind == TUM:
                    by_type[gene, EPI] = max(by_type[gene, EPI], 0.25)
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

    def amounts(self, cells: Cells, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """RNA that each cell gives to the sources of nuclei, and to those of cells: ``(cells, types + 2)`` twice."""
        rng = np.random.default_rng([seed, 202])
        n, n_types = len(cells.kind), len(TYPES)
        content = _CONTENT[cells.kind] * np.exp(rng.normal(0, _CONTENT_SD, n) - _CONTENT_SD**2 / 2)
        amounts = np.zeros((n, n_types + 2))
        amounts[np.arange(n), cells.kind] = content
        amounts[:, n_types] = content * cells.hypoxia
        if n:
            x, y = cells.outline[:, 0], cells.outline[:, 1]
            angle = rng.uniform(0, 2 * np.pi)
            along = np.cos(angle) * x + np.sin(angle) * y
            low, high = along.min(), along.max()
            amounts[:, n_types + 1] = content * (along - low) / max(high - low, 1e-9)
        return amounts, amounts


# Transcripts per um^2 of tissue of average richness that a platform catches, how much its shapes differ in that
# (sd of the logarithm), and the size parameter of its negative binomial.
PLATFORMS = {
    "spots": (1.0, 0.20, 12.0),
    "spots_legacy": (0.7, 0.30, 8.0),
    "bins": (0.7, 0.25, 8.0),
    "bins_002um": (0.7, 0.25, 8.0),
    "cells": (2.0, 0.25, 10.0),
}
_ROWS = 20_000


def draw_counts(expected: NDArray[np.float64], platform: str, seed: int):
    """Draw raw counts of a platform.

    Parameters
    ----------
    expected
        ``(shapes, genes)``: density times um^2, divided by 10,000.
    platform
        Key of ``PLATFORMS``.
    seed
        Seed of the tissue.

    Returns
    -------
    scipy.sparse.csr_matrix
        Whole numbers as float32.
    """
    from scipy import sparse

    depth, spread, size = PLATFORMS[platform]
    parts = []
    for start in range(0, max(len(expected), 1), _ROWS):
        rng = np.random.default_rng([seed, 301, list(PLATFORMS).index(platform), start])
        part = expected[start : start + _ROWS] * depth
        caught = np.exp(rng.normal(0, spread, len(part)) - spread**2 / 2)
        mean = np.maximum(part * caught[:, None], 0)
        counts = rng.poisson(mean * rng.gamma(size, 1 / size, mean.shape))
        parts.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.vstack(parts, format="csr")
