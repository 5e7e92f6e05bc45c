"""Measured tables: raw counts of genes and the totals they are normalised by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from pixnet._names import listed
from pixnet._sdata.rasters import full_resolution
from pixnet._sdata.shapes import label_ids
from pixnet._sdata.store.bound import bound

EXACT = {np.float32: 2**24, np.float64: 2**53}
"""Up to which every whole number is exact."""

SUM_RATIO = 1.5
"""Totals that are sums over columns may be compared while the numbers of columns differ at most this much."""


def annotated_regions(table: Any) -> list[str]:
    """Return the elements that a table annotates (SpatialData's ``region``)."""
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    if region is None:
        return []
    return [region] if isinstance(region, str) else [str(r) for r in region]


def not_annotated(table: AnnData, table_key: str, shapes_key: str) -> str:
    """Return the sentence that says that a table does not annotate an element, and how to link them."""
    regions = annotated_regions(table)
    where = f"but {listed(regions)}" if regions else "or anything else"
    return (
        f"table {table_key!r} does not annotate {shapes_key!r} {where}. To link them, add obs columns with the name of the element "
        f"(here 'region', a category) and the id of each shape (here 'instance_id'), then sdata[{table_key!r}] = "
        f"spatialdata.models.TableModel.parse(table, region={shapes_key!r}, region_key='region', instance_key='instance_id')"
    )


def made_by_pixnet(table: AnnData) -> dict[str, Any]:
    """Return what a table says of how pixnet made it; empty for a measured one."""
    made = table.uns.get("pixnet")
    return dict(made) if isinstance(made, Mapping) else {}


def is_predicted_table(table: AnnData) -> bool:
    """Whether a table was aggregated from an image by pixnet: it is not a measurement then."""
    return made_by_pixnet(table).get("kind") == "aggregate"


def counts_matrix(table: AnnData, table_key: str, layer: str | None = None) -> sparse.csr_matrix | np.ndarray:
    """Return the matrix of raw counts of a table, observations by genes, sparse or dense, in memory.

    Whatever type they are stored in, counts are float32 here, or float64 where one is too large for that.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If it does not hold numbers.
    ValueError
        If it holds NaN, negative or fractional values, or values that are too large to be exact.
    """
    layers = listed(name for name in table.layers if name is not None)  # newer versions of anndata list X as None
    if layer is not None and layer not in table.layers:
        raise KeyError(f"table {table_key!r} has no layer {layer!r}; it has: {layers}")
    matrix = table.X if layer is None else table.layers[layer]
    where = f"table {table_key!r} ({'X' if layer is None else f'layer {layer!r}'})"
    if matrix is None:
        raise ValueError(f"{where} is empty: there are no counts in X; name a layer with layer= ({layers})")
    if hasattr(matrix, "to_memory"):  # anndata's backed sparse matrices
        matrix = matrix.to_memory()
    elif hasattr(matrix, "compute"):  # dask, whose chunks may be sparse
        matrix = matrix.compute()
    if not sparse.issparse(matrix):
        matrix = np.asarray(matrix)
    if sparse.issparse(matrix):
        matrix = matrix.tocsr()
    values = matrix.data if sparse.issparse(matrix) else matrix
    if values.dtype.kind not in "iufb":
        raise TypeError(f"{where} is {values.dtype}; counts are numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(
            f"{where} holds NaN or infinite values; counts are whole numbers from 0: fix or drop those rows"
        )
    if values.size and values.min() < 0:
        raise ValueError(
            f"{where} holds negative values: these are not raw counts; name the layer that has them with layer="
        )
    if values.dtype.kind == "f" and values.size and (values != np.rint(values)).any():
        raise ValueError(
            f"{where} holds fractions such as {float(values[values != np.rint(values)][0]):g}: it looks normalised. "
            f"Raw counts are needed; name the layer that has them with layer= ({layers})"
        )
    most = int(values.max()) if values.size else 0
    if most > EXACT[np.float64]:
        raise ValueError(
            f"{where} holds a count of {most:.3g}, which is too large to be added exactly; is it a hash or an id?"
        )
    return matrix.astype(np.float32 if most <= EXACT[np.float32] else np.float64, copy=False)


def _row_sums(matrix: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    if sparse.issparse(matrix):  # which sums in its own precision, whatever it is asked for
        return np.asarray(matrix.astype(np.float64).sum(axis=1)).ravel()
    return matrix.sum(axis=1, dtype=np.float64)


def totals(
    table: AnnData, table_key: str, matrix: sparse.csr_matrix | np.ndarray, total_key: str | None = None
) -> np.ndarray:
    """Return all UMI of each observation, ``(n,)``: ``obs[total_key]``, else the sum over all columns.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If it holds NaN or negative values, or less than the counts of the table's own genes.
    """
    sums = _row_sums(matrix)
    if total_key is None:
        return sums
    if total_key not in table.obs:
        raise KeyError(f"table {table_key!r} has no obs column {total_key!r} (total_key=); it has: {listed(table.obs)}")
    total = pd.to_numeric(table.obs[total_key], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(total).all() or (total < 0).any():
        raise ValueError(
            f"obs[{total_key!r}] of table {table_key!r} holds NaN, negative or non-numeric values; totals are UMI counts"
        )
    if (total < sums * (1 - 1e-6)).any():
        raise ValueError(
            f"obs[{total_key!r}] of table {table_key!r} is smaller than the sum of the counts in {int((total < sums).sum())} rows: "
            "a total counts all UMI of the observation, those of the table's genes among them"
        )
    return total


def check_totals_alike(columns: dict[str, int], total_key: str | None) -> None:
    """Refuse tables whose totals would mean different things.

    Parameters
    ----------
    columns
        Number of columns of each table, by name.
    total_key
        If given, all use the same obs column, which settles it.
    """
    if total_key is not None or len(columns) < 2:
        return
    least, *_, most = sorted(columns, key=lambda name: columns[name])
    if columns[most] > SUM_RATIO * columns[least]:
        raise ValueError(
            f"tables {least!r} ({columns[least]} genes) and {most!r} ({columns[most]} genes) sum over too different sets of "
            "genes for their totals to mean the same: name the obs column that holds the UMI over all genes with total_key=, or "
            "say which tables are panels, whose totals are those of their own genes, with totals={name: 'panel'}"
        )


def element_ids(sdata: SpatialData, shapes_key: str) -> pd.Index:
    """Return the ids of a shapes element, or the labels (without 0) of a labels element, in order."""
    if shapes_key in sdata.shapes:
        return sdata.shapes[shapes_key].index
    element = sdata.labels[shapes_key]
    with bound(element, f"labels {shapes_key!r}"):
        labels = np.unique(np.asarray(full_resolution(element).data))
    return pd.Index(label_ids(labels[labels != 0], shapes_key))


def dense(matrix: Any) -> np.ndarray:
    """Return a matrix, sparse, lazy or neither, as an array."""
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def match_rows(sdata: SpatialData, table_key: str, shapes_key: str) -> np.ndarray:
    """Return, for each row of a table, its position in a shapes element; -1 for rows of other elements.

    Raises
    ------
    ValueError
        If the table does not annotate the element, ids repeat, or ids have no shape.
    """
    table = sdata.tables[table_key]
    if shapes_key not in annotated_regions(table):
        raise ValueError(not_annotated(table, table_key, shapes_key))
    attrs = table.uns["spatialdata_attrs"]
    of_element = (table.obs[attrs["region_key"]].astype(str) == shapes_key).to_numpy()
    ids = table.obs[attrs["instance_key"]]
    if ids[of_element].duplicated().any():
        raise ValueError(
            f"table {table_key!r} has several rows for one shape of {shapes_key!r}: {listed(ids[ids.duplicated()][:3])}"
        )
    index = element_ids(sdata, shapes_key)
    found = index.get_indexer(ids)
    lost = of_element & (found < 0)
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} of the {int(of_element.sum())} rows of table {table_key!r} have no shape in {shapes_key!r}: ids such as "
            f"{listed(ids[lost][:3])} against {listed(index[:3])}; drop those rows or correct obs[{attrs['instance_key']!r}]"
        )
    return np.where(of_element, found, -1)
