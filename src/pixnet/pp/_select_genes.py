"""Choice of the genes that a model is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet._logging import logger
from pixnet._sdata.counts import check_totals_alike
from pixnet._sdata.inputs import named_objects
from pixnet._sdata.keys import resolve_table
from pixnet._sdata.measured import N_TOP, MeasuredTable, rank_genes

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def select_genes(
    sdata: SpatialData | Sequence[SpatialData] | Mapping[str, SpatialData],
    *,
    table_key: str | Sequence[str] | None = None,
    n_top: int | None = N_TOP,
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
        Number of genes; ``None`` takes all that qualify, in order.
    total_key
        Column of ``obs`` with all transcripts of the spot; ``None`` takes the sum over all columns of the table.
    exclude_prefixes
        Beginnings of the names of genes to leave out: of ``var_names``, and of symbols in any column of ``var``. The
        default leaves out mitochondrial genes, which are known by their Ensembl ids (human, mouse), too.
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
        If no gene qualifies, names are repeated, values are not raw counts, or totals without ``total_key`` would be
        sums over very different numbers of genes.

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
    tables = list(_tables(sdata, table_key))
    check_totals_alike({name: table.n_vars for name, table in tables}, total_key)
    genes = rank_genes(
        [MeasuredTable.read(table, name, layer, total_key) for name, table in tables],
        n_top=n_top,
        exclude_prefixes=(exclude_prefixes,) if isinstance(exclude_prefixes, str) else tuple(exclude_prefixes),
        min_fraction=min_fraction,
    )
    if n_top is not None and len(genes) < n_top != N_TOP:
        logger.warning("only %d genes qualify, fewer than n_top=%d", len(genes), n_top)
    return genes


def _tables(sdata: Any, table_key: str | Sequence[str] | None) -> Iterator[tuple[str, AnnData]]:
    """Yield the tables of all objects, each with a name for messages."""
    keys = [table_key] if table_key is None or isinstance(table_key, str) else list(table_key)
    objects = named_objects(sdata)
    for name, one in objects.items():
        for wanted in keys:
            key = resolve_table(one, wanted)
            yield (f"{key} of object {name}" if len(objects) > 1 else key), one.tables[key]
