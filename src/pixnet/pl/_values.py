"""Values of one gene: of a gene map's pixels or of a table's shapes, with the words that name them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import sparse
from spatialdata import SpatialData

from pixnet._names import is_total, listed
from pixnet._sdata.counts import annotated_regions, counts_matrix, gene_positions, totals
from pixnet._sdata.record import is_predicted_table

QUANTITIES = ("density", "cp10k")
LABELS = {
    "density": "density (≈ CP10k)",
    "cp10k": "CP10k",
    "log_sum": "log1p CP10k / µm²",
    "total": "density (10,000 on average)",
}


def check_genes(genes: str | Iterable[str], valid: list[str], where: str) -> list[str]:
    """Return genes as a list.

    Raises
    ------
    KeyError
        If one is not there; the message names the nearest ones.
    TypeError
        If they are not names.
    ValueError
        If there are none, or one is named twice.
    """
    names = [genes] if isinstance(genes, str) else genes
    if not isinstance(names, Iterable):
        raise TypeError(f"genes is {genes!r}; a gene name or a list of them is needed")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"genes holds {next(n for n in names if not isinstance(n, str))!r}; gene names (str) are needed"
        )
    if not names:
        raise ValueError(f"genes is empty; {where} has {summary(valid)}")
    if len(set(names)) != len(names):
        raise ValueError(f"genes names {next(n for n in names if names.count(n) > 1)!r} twice")
    known = set(valid)
    for name in names:
        if name not in known:
            by_case = {v.lower(): v for v in valid}
            near = difflib.get_close_matches(name.lower(), list(by_case), n=3)
            hint = f"; did you mean {', '.join(repr(by_case[n]) for n in near)}?" if near else ""
            raise KeyError(f"gene {name!r} is not in {where}{hint} It has {summary(valid)}")
    return names


def summary(names: list[str], most: int = 12) -> str:
    """Return a list of names, cut where it is long."""
    shown = listed(names[:most])
    return shown if len(names) <= most else f"{len(names)} genes: {shown}, ..."


def gene_title(gene: str) -> str:
    """Return what a panel is called."""
    return "all transcripts" if is_total(gene) else gene


def check_quantity(quantity: str) -> str:
    """Return what of a gene map is shown.

    Raises
    ------
    ValueError
        If it is no quantity that pixnet knows.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; valid: {listed(QUANTITIES)}")
    return quantity


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
        If table, gene, layer or column is not there.
    ValueError
        If the table annotates no element or several, or a measured one holds no raw counts.
    """
    if table_key not in sdata.tables:
        raise KeyError(f"no table {table_key!r} in this object; it has: {listed(sdata.tables)}")
    table = sdata.tables[table_key]
    check_genes(gene, list(map(str, table.var_names)), f"table {table_key!r}")
    regions = annotated_regions(table)
    if len(regions) != 1:
        raise ValueError(f"table {table_key!r} annotates {listed(regions)}; a table of one shapes element is needed")
    predicted = is_predicted_table(table)
    matrix = table.X if predicted else counts_matrix(table, table_key, layer)
    column = matrix[:, gene_positions(table, table_key, [gene])]
    values = np.asarray(column.todense() if sparse.issparse(column) else column, dtype=np.float64).ravel()
    if not predicted:
        values = to_cp10k(values, totals(table, table_key, matrix, total_key))
    instances = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()
    return regions[0], pd.Series(np.log1p(values) if log else values, index=instances, name=gene)
