"""Values of one gene: of a gene map's pixels, or of a table's shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from spatialdata import SpatialData

from pixnet._names import check_genes, listed
from pixnet._sdata.counts import annotated_regions, counts_matrix, is_predicted_table, totals
from pixnet._sdata.genes import gene_positions


def to_cp10k(density: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return densities as parts of 10,000 of all transcripts; NaN where there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1e4 * density / total
    return np.where(total > 0, share, np.nan)


def table_values(
    sdata: SpatialData,
    table_key: str,
    gene: str,
    *,
    layer: str | None = None,
    total_key: str | None = None,
    log: bool = True,
) -> tuple[str, pd.Series]:
    """Return the element that a table annotates and one gene's CP10k for each of its instances.

    Parameters
    ----------
    sdata
        The object.
    table_key
        A table of measured counts, which are turned into CP10k, or a predicted one, which holds CP10k.
    gene
        The gene.
    layer
        Layer of counts in place of ``X`` (measured tables).
    total_key
        Column of ``obs`` with all counts of the observation (measured tables); ``None`` sums over all columns.
    log
        Take log1p.

    Raises
    ------
    KeyError
        If table, gene, layer or column is missing.
    ValueError
        If the table annotates no element or several, or a measured one does not hold raw counts.
    """
    if table_key not in sdata.tables:
        raise KeyError(f"no table {table_key!r} in this object; it has: {listed(sdata.tables)}")
    table = sdata.tables[table_key]
    check_genes([gene], among=[str(name) for name in table.var_names], where=f"table {table_key!r}")
    regions = annotated_regions(table)
    if len(regions) != 1:
        raise ValueError(f"table {table_key!r} annotates {listed(regions)}; a table of one shapes element is needed")
    predicted = is_predicted_table(table)
    matrix = table.X if predicted else counts_matrix(table, table_key, layer)
    column: Any = matrix[:, gene_positions(table, table_key, [gene])]
    values = np.asarray(column.toarray() if sparse.issparse(column) else column, dtype=np.float64).ravel()
    if not predicted:
        values = to_cp10k(values, totals(table, table_key, matrix, total_key))
    instances = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()
    return regions[0], pd.Series(np.log1p(values) if log else values, index=instances, name=gene)
