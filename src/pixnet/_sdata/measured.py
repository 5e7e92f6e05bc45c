"""Tables of raw counts, read and validated once, and the genes to choose from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from pixnet._logging import logger
from pixnet._names import TOTAL, listed
from pixnet._sdata.counts import counts_matrix, totals
from pixnet._sdata.genes import beginning_with, check_names_unique, gene_positions, other_names

N_TOP = 250
"""Genes that are chosen unless told otherwise."""


@dataclass(frozen=True)
class MeasuredTable:
    """Raw counts of some or all genes of a table.

    Attributes
    ----------
    name
        Name of the table, as messages give it.
    table
        The table.
    counts
        Raw counts ``(observations, genes)``, sparse or dense.
    total
        All UMI of each observation.
    genes
        Names of the genes.
    panel
        Positions of the genes that the table has; None: all of them. Others have no counts.
    within_panel
        Whether the total is that of the table's own genes.
    """

    name: str
    table: AnnData
    counts: Any
    total: np.ndarray
    genes: pd.Index
    panel: np.ndarray | None = None
    within_panel: bool = False

    @classmethod
    def read(
        cls, table: AnnData, name: str, layer: str | None, total_key: str | None, within_panel: bool = False
    ) -> MeasuredTable:
        """Read and validate the counts of all genes of a table, and its totals: of all transcripts, or of its genes."""
        counts = counts_matrix(table, name, layer)
        total = totals(table, name, counts, None if within_panel else total_key)
        return cls(name, table, counts, total, table.var_names, within_panel=within_panel)

    def select(self, genes: Sequence[str], *, partial: bool = False) -> MeasuredTable:
        """Return the counts of some of all the table's genes, in their order.

        A gene that the table lacks is refused. With ``partial`` it is left out of the panel, without counts, and only a
        table that lacks all genes is refused. Totals within the panel are those of its genes among these.
        """
        check_names_unique(self.table, self.name)
        columns = self.genes.get_indexer(list(genes))
        here = columns >= 0
        if not here.any() or (not partial and not here.all()):
            gene_positions(self.table, self.name, genes)  # says what is missing
        counts = sparse.csr_matrix(self.counts[:, columns[here]])
        if not here.all():
            shape = (counts.shape[0], len(here))
            counts = sparse.csr_matrix((counts.data, np.flatnonzero(here)[counts.indices], counts.indptr), shape)
        panel = None if here.all() else np.flatnonzero(here)
        return self._totalled(replace(self, counts=counts, genes=pd.Index(genes), panel=panel))

    def keep(self, columns: np.ndarray) -> MeasuredTable:
        """Return some of the genes, told by their columns."""
        panel = None if self.panel is None else np.flatnonzero(np.isin(columns, self.panel))
        return self._totalled(replace(self, counts=self.counts[:, columns], genes=self.genes[columns], panel=panel))

    @staticmethod
    def _totalled(table: MeasuredTable) -> MeasuredTable:
        if not table.within_panel:
            return table
        return replace(table, total=np.asarray(table.counts.sum(axis=1), dtype=np.float64).ravel())


def rank_genes(
    tables: Sequence[MeasuredTable],
    *,
    n_top: int | None = N_TOP,
    exclude_prefixes: Sequence[str] = ("MT-", "mt-"),
    min_fraction: float = 0.0,
) -> list[str]:
    """Return the genes that all tables have, by their mean CP10k over all observations (see `pixnet.pp.select_genes`).

    If tables are of panels, they are the genes that any of them has.
    """
    genes = _all_genes(tables) if any(table.within_panel for table in tables) else _common_genes(tables)
    excluded = set().union(*(beginning_with(table.table, exclude_prefixes) for table in tables))
    genes = genes[~genes.isin([*excluded, TOTAL])]
    if len(genes) == 0:
        raise ValueError(
            f"every gene that all tables have begins with one of exclude_prefixes={tuple(exclude_prefixes)!r}"
        )
    total, detected, n = np.zeros(len(genes)), np.zeros(len(genes)), np.zeros(len(genes))
    for table in tables:
        usable = table.total > 0
        weight = np.zeros(len(usable))
        weight[usable] = 1e4 / table.total[usable]
        columns = table.genes.get_indexer(genes)
        here = columns >= 0
        chosen = table.counts[:, columns[here]]
        total[here] += np.asarray(chosen.T @ weight).ravel()
        detected[here] += np.asarray((chosen[usable] > 0).sum(axis=0)).ravel()
        n[here] += int(usable.sum())
    if not n.any():
        raise ValueError("no spot has any counts")
    n = np.maximum(n, 1)
    enough = detected / n >= min_fraction
    genes, mean = genes[enough], (total / n)[enough]
    if len(genes) == 0:
        raise ValueError(f"no gene is detected in at least {min_fraction:g} of the spots (min_fraction)")
    order = np.lexsort([genes.to_numpy(dtype=str), -mean])
    return [str(name) for name in genes[order[:n_top]]]


def _all_genes(tables: Sequence[MeasuredTable]) -> pd.Index:
    for one in tables:
        check_names_unique(one.table, one.name)
    return pd.Index(list(dict.fromkeys(gene for one in tables for gene in one.genes)))


def _common_genes(tables: Sequence[MeasuredTable]) -> pd.Index:
    for one in tables:
        check_names_unique(one.table, one.name)
    first, *others = tables
    common = first.genes
    for other in others:
        common = common[common.isin(other.genes)]
        if len(common) == 0:
            raise ValueError(
                f"no gene is in all {len(tables)} tables: {first.name!r} has {listed(first.genes[:3])}, {other.name!r} has "
                f"{listed(other.genes[:3])}{other_names(other.table, other.name, first.genes)}"
            )
    return common


def columns_with_counts(tables: Sequence[MeasuredTable]) -> np.ndarray:
    """Return the columns of genes that have a count in any of some tables of the same genes; name the others.

    Raises
    ------
    ValueError
        If no gene has a count.
    """
    seen = np.any([np.asarray(table.counts.sum(axis=0)).ravel() > 0 for table in tables], axis=0)
    silent = tables[0].genes[~seen]
    if len(silent):
        logger.warning(
            "%d genes have no counts in the training tables and are left out: %s", len(silent), listed(silent[:10])
        )
    if not seen.any():
        raise ValueError("none of the genes has a count in the training tables")
    return np.flatnonzero(seen)
