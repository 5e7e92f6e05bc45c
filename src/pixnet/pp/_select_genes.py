"""The genes a model is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet._logging import logger
from pixnet._names import TOTAL, listed
from pixnet._sdata.counts import check_totals_alike, counts_matrix, totals
from pixnet._sdata.genes import check_names_unique, other_names
from pixnet._sdata.inputs import named_objects
from pixnet._sdata.keys import resolve_table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def select_genes(
    sdata: SpatialData | Sequence[SpatialData] | Mapping[str, SpatialData],
    *,
    table_key: str | Sequence[str] | None = None,
    n_top: int | None = 250,
    total_key: str | None = None,
    exclude_prefixes: Sequence[str] = ("MT-", "mt-"),
    min_fraction: float = 0.0,
    layer: str | None = None,
) -> list[str]:
    """Choose the genes of highest mean expression.

    The mean is that of CP10k (1e4 * counts / total) over all spots of all tables. Only genes that every table has are
    considered; spots whose total is 0 are left out.

    Parameters
    ----------
    sdata
        One object, a list or a dict of them.
    table_key
        Table of raw counts in each object, or several; ``None``: the recorded one, else the only one.
    n_top
        Number of genes; ``None`` is all that qualify, ordered.
    total_key
        Column of ``obs`` with all transcripts of the spot; ``None`` takes the sum over all columns of the table.
    exclude_prefixes
        Genes whose names begin so are left out.
    min_fraction
        Least share of spots in which the gene is detected.
    layer
        Layer that holds the raw counts; ``None`` is ``X``.

    Returns
    -------
    list of str
        Gene names, highest mean first; ties in alphabetical order.

    Raises
    ------
    KeyError
        If a table, layer or ``obs`` column is missing.
    ValueError
        If no gene qualifies, names are repeated, values are no raw counts, or totals
        without ``total_key`` would be sums over very different numbers of genes.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600, n_genes=20)
    >>> len(px.pp.select_genes(sdata, n_top=5))
    5
    """
    if n_top is not None and (isinstance(n_top, bool) or not isinstance(n_top, int | np.integer) or n_top < 1):
        raise ValueError(f"n_top is {n_top!r}; a positive whole number or None is needed")
    if not 0 <= min_fraction <= 1:
        raise ValueError(f"min_fraction is {min_fraction!r}; a share between 0 and 1 is needed")
    prefixes = (exclude_prefixes,) if isinstance(exclude_prefixes, str) else tuple(exclude_prefixes)
    tables = list(_tables(sdata, table_key))
    check_totals_alike({name: table.n_vars for name, table in tables}, total_key)
    genes = _common_genes(tables)
    genes = genes[[not name.startswith(prefixes) for name in genes]] if prefixes else genes
    genes = genes[genes != TOTAL]
    if len(genes) == 0:
        raise ValueError(f"every gene that all tables have begins with one of exclude_prefixes={prefixes!r}")

    total, detected, n = np.zeros(len(genes)), np.zeros(len(genes)), 0
    for name, table in tables:
        part_total, part_detected, part_n = _sums(table, genes, name, total_key, layer)
        total += part_total
        detected += part_detected
        n += part_n
    if n == 0:
        raise ValueError("no spot has any counts")
    enough = detected / n >= min_fraction
    genes, mean = genes[enough], total[enough] / n
    if len(genes) == 0:
        raise ValueError(f"no gene is detected in at least {min_fraction:g} of the spots (min_fraction)")
    if n_top is not None and len(genes) < n_top:
        logger.warning("only %d genes qualify, fewer than n_top=%d", len(genes), n_top)
    order = np.lexsort([genes.to_numpy(dtype=str), -mean])
    return [str(name) for name in genes[order[:n_top]]]


def _tables(sdata: Any, table_key: str | Sequence[str] | None) -> Iterator[tuple[str, AnnData]]:
    """Yield the tables of all objects, each with a name for messages."""
    keys = [table_key] if table_key is None or isinstance(table_key, str) else list(table_key)
    objects = named_objects(sdata)
    for name, one in objects.items():
        for wanted in keys:
            key = resolve_table(one, wanted)
            yield (f"{key} of object {name}" if len(objects) > 1 else key), one.tables[key]


def _common_genes(tables: list[tuple[str, AnnData]]) -> pd.Index:
    for name, table in tables:
        check_names_unique(table, name)
    (first, a), *others = tables
    common = a.var_names
    for name, table in others:
        common = common[common.isin(table.var_names)]
        if len(common) == 0:
            raise ValueError(
                f"no gene is in all {len(tables)} tables: {first!r} has {listed(a.var_names[:3])}, {name!r} has "
                f"{listed(table.var_names[:3])}{other_names(table, name, a.var_names)}"
            )
    return common


def _sums(
    table: AnnData, genes: pd.Index, name: str, total_key: str | None, layer: str | None
) -> tuple[NDArray, NDArray, int]:
    """Sum of CP10k and number of spots with counts, per gene, and the number of spots."""
    matrix = counts_matrix(table, name, layer)
    depth = totals(table, name, matrix, total_key)
    usable = depth > 0
    weight = np.zeros(len(depth))
    weight[usable] = 1e4 / depth[usable]
    chosen = matrix[:, table.var_names.get_indexer(genes)]
    total = np.asarray(chosen.T @ weight).ravel()
    detected = np.asarray((chosen[usable] > 0).sum(axis=0)).ravel()
    return total, detected, int(usable.sum())
