"""Measured tables: kinds of matrices, backed ones among them, raw counts told from others, names of genes."""

from __future__ import annotations

import anndata
import dask.array as da
import numpy as np
import pytest
from scipy import sparse

import pixnet as px
from pixnet._sdata.counts import counts_matrix, dense, element_ids, match_rows, not_annotated, totals
from pixnet._sdata.genes import gene_positions
from pixnet._sdata.measured import MeasuredTable

SYMBOLS = ["ERBB2", "CD74", "ACTB", "MYH11"]
IDS = ["ENSG00000141736", "ENSG00000019582.19", "ENSG00000075624", "ENSG00000133392"]


def read(sdata, table_key, genes, layer=None):
    return MeasuredTable.read(sdata.tables[table_key], table_key, layer, None).select(genes)


@pytest.fixture(scope="module")
def tissue():
    sdata = px.datasets.synthetic_tissue(300, n_genes=13, shapes=("bins",))
    px.tl.aggregate(sdata, "bins", image_key="truth", key_added="bins_true")
    return sdata


def stored(kind):
    def through_a_file(table, path):
        table = table.copy()
        table.X = kind(table.X)
        table.write_h5ad(path / "table.h5ad")
        return anndata.read_h5ad(path / "table.h5ad", backed="r")

    return through_a_file


def in_dask(kind):
    def chunked(table, path):
        table = table.copy()
        table.X = da.from_array(kind(table.X), chunks=(200, table.n_vars), asarray=False)
        return table

    return chunked


def with_layer(table, path):
    table = table.copy()
    table.layers["raw"] = table.X.tocsc()
    table.X = table.X.log1p()
    return table


KINDS = {
    "csc": lambda table, path: anndata.AnnData(table.X.tocsc(), table.obs, table.var, table.uns),
    "csr array": lambda table, path: anndata.AnnData(sparse.csr_array(table.X), table.obs, table.var, table.uns),
    "integers": lambda table, path: anndata.AnnData(
        table.X.toarray().astype(np.int32), table.obs, table.var, table.uns
    ),
    "h5ad csr": stored(sparse.csr_matrix),
    "h5ad csc": stored(sparse.csc_matrix),
    "h5ad dense": stored(lambda x: x.toarray()),
    "dask dense": in_dask(lambda x: x.toarray()),
    "dask csr": in_dask(sparse.csr_matrix),
    "layer": with_layer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_reads_alike(tissue, tmp_path, kind):
    expected = read(tissue, "bins_counts", ["TUM1", "FIB1"])
    scores = px.tl.evaluate(tissue, table_key="bins_true", reference_key="bins_counts")
    layer = "raw" if kind == "layer" else None
    other = px.datasets.synthetic_tissue(300, n_genes=13, shapes=())
    other["bins"], other["bins_true"] = tissue["bins"], tissue["bins_true"]
    other["bins_counts"] = KINDS[kind](tissue["bins_counts"], tmp_path)
    assert other["bins_counts"].isbacked == kind.startswith("h5ad")

    found = read(other, "bins_counts", ["TUM1", "FIB1"], layer)
    np.testing.assert_array_equal(dense(found.counts), dense(expected.counts))
    np.testing.assert_array_equal(found.total, expected.total)
    assert px.pp.select_genes(other, table_key="bins_counts", layer=layer) == px.pp.select_genes(
        tissue, table_key="bins_counts"
    )
    again = px.tl.evaluate(other, table_key="bins_true", reference_key="bins_counts", layer=layer)
    np.testing.assert_allclose(again["pearson"], scores["pearson"], equal_nan=True)


def test_a_stored_object_reads_alike(tissue, tmp_path):
    import spatialdata as sd

    shapes_only = sd.SpatialData(shapes={"bins": tissue["bins"]}, tables={"bins_counts": tissue["bins_counts"]})
    shapes_only.write(tmp_path / "bins.zarr")
    again = sd.read_zarr(tmp_path / "bins.zarr")
    assert px.pp.select_genes(again) == px.pp.select_genes(shapes_only)
    found, expected = (read(s, "bins_counts", ["TUM1"]) for s in (again, shapes_only))
    np.testing.assert_array_equal(dense(found.counts), dense(expected.counts))


# raw or not --------------------------------------------------------------------------------------------------------


def table_of(values, **layers):
    return anndata.AnnData(np.asarray(values), layers={k: np.asarray(v) for k, v in layers.items()})


RAW = np.array([[3.0, 0.0], [1.0, 7.0]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.log1p(RAW), r"fractions such as .*it looks normalised.*layer= \('counts'\)"),
        (1e4 * RAW / 3, "fractions"),
        (RAW - RAW.mean(axis=0), "negative values.*layer="),
        (np.where(RAW == 0, np.nan, RAW), "NaN or infinite"),
    ],
)
def test_what_is_not_a_raw_count_is_refused(values, message):
    table = table_of(values, counts=RAW)
    for form in (np.asarray, sparse.csr_matrix):
        table.X = form(values)
        with pytest.raises(ValueError, match=message):
            counts_matrix(table, "t")
    np.testing.assert_array_equal(counts_matrix(table, "t", "counts"), RAW)


TYPES = ["bool", "uint8", "int16", "int64", "uint64", "float16", "float32", "float64"]


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", TYPES)
def test_counts_of_any_type_are_added_exactly(dtype, form):
    if dtype == "float16" and form is not np.asarray:
        pytest.skip("scipy has no sparse matrices of float16")
    values = np.full((2, 3000), 1 if dtype == "bool" else 100, dtype=dtype)
    table = table_of(values.astype(float))
    table.X = form(values)
    matrix = counts_matrix(table, "t")
    assert matrix.dtype == np.float32
    assert totals(table, "t", matrix).tolist() == [float(values[0].sum(dtype=np.float64))] * 2


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64"])
def test_counts_that_float32_does_not_hold(dtype, form):
    large = 2**24 + 1
    table = table_of(RAW)
    table.X = form(np.array([[large, 0], [2**40, 2**40 + 1]], dtype=dtype))
    matrix = counts_matrix(table, "t")
    assert matrix.dtype == np.float64
    assert totals(table, "t", matrix).tolist() == [large, 2**41 + 1]
    table.X = form(np.array([[2**62, 0], [1, 1]], dtype=dtype))
    with pytest.raises(ValueError, match="'t'.*too large to be added exactly"):
        counts_matrix(table, "t")


def test_totals_are_not_rounded_to_the_type_of_the_counts():
    table = table_of(np.full((1, 4), 2.0**24 - 1, dtype=np.float32))
    for form in (np.asarray, sparse.csr_matrix):
        table.X = form(table_of(np.full((1, 4), 2.0**24 - 1, dtype=np.float32)).X)
        assert totals(table, "t", counts_matrix(table, "t")).tolist() == [4 * (2**24 - 1)]


def test_other_refusals():
    empty = anndata.AnnData(obs=table_of(RAW).obs, layers={"counts": RAW})
    with pytest.raises(ValueError, match=r"no counts in X.*'counts'"):
        counts_matrix(empty, "t")
    with pytest.raises(KeyError, match=r"no layer 'raw'.*'counts'"):
        counts_matrix(empty, "t", "raw")
    with pytest.raises(TypeError, match="complex"):
        counts_matrix(table_of(RAW.astype(complex)), "t")


# names of genes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_id(tissue):
    """A table indexed by Ensembl ids with symbols in a column, and one aggregated from a map that has symbols."""
    import spatialdata as sd

    measured, predicted = (tissue[key][:, :4].copy() for key in ("bins_counts", "bins_true"))
    measured.var_names, predicted.var_names = IDS, SYMBOLS
    measured.var["chromosome"] = ["17", "5", "7", "16"]
    measured.var["feature_name"] = np.array(SYMBOLS, dtype=object)
    image = {"he": tissue["he"]}
    sdata = sd.SpatialData(images=image, shapes={"bins": tissue["bins"]}, tables={"measured": measured, "p": predicted})
    px.pp.set_mpp(sdata, "he", 0.5)
    return sdata


FIXES = r"names are Ensembl ids, the genes asked for are symbols.*var\['feature_name'\] holds \d of them.*var_names ="


def test_ids_against_symbols(by_id):
    with pytest.raises(KeyError, match=FIXES):
        px.tl.evaluate(by_id, table_key="p", reference_key="measured")
    with pytest.raises(KeyError, match=FIXES):
        px.tl.train(by_id, shapes="bins", table_key="measured", genes=SYMBOLS[:2])
    model = px.models.PixNet(SYMBOLS, pretrained=False)
    with pytest.raises(KeyError, match=FIXES):
        px.tl.train(by_id, shapes="bins", table_key="measured", model=model)
    named = by_id.tables["measured"].copy()
    named.var_names = SYMBOLS
    by_id.tables["named"] = named
    with pytest.raises(ValueError, match=f"no gene is in all 2 tables.*{FIXES}"):
        px.pp.select_genes(by_id, table_key=["named", "measured"])
    del by_id.tables["named"]
    # What the message says fixes it.
    table = by_id.tables["measured"]
    table.var_names = table.var["feature_name"].astype(str)
    assert len(px.tl.evaluate(by_id, table_key="p", reference_key="measured")) == 4


def test_symbols_against_ids(by_id):
    table = by_id.tables["measured"]
    table.var["gene_ids"] = table.var_names
    table.var_names = SYMBOLS
    with pytest.raises(
        KeyError, match=r"names are symbols, the genes asked for are Ensembl.*var\['gene_ids'\] holds 4"
    ):
        gene_positions(by_id.tables["measured"], "measured", IDS)


def test_no_column_holds_them(by_id):
    del by_id.tables["measured"].var["feature_name"]
    with pytest.raises(KeyError, match="names are Ensembl ids.*no column of its var"):
        gene_positions(by_id.tables["measured"], "measured", SYMBOLS)


def test_repeated_symbols_after_mapping(by_id):
    table = by_id.tables["measured"]
    table.var_names = ["ERBB2", "CD74", "CD74", "MYH11"]
    with pytest.raises(ValueError, match=r"names 1 gene\(s\) more than once: 'CD74'.*sum or drop"):
        px.tl.evaluate(by_id, table_key="p", reference_key="measured")


def test_near_misses(by_id):
    with pytest.raises(KeyError, match="4 of them would be found without the version"):
        gene_positions(by_id.tables["measured"], "measured", [name.partition(".")[0] + ".3" for name in IDS])
    with pytest.raises(KeyError, match="another case"):
        gene_positions(by_id.tables["p"], "p", ["Erbb2", "Cd74"])
    with pytest.raises(
        KeyError, match="lacks 1 of the 2 genes: 'NOPE'; its names look like 'ERBB2', 'CD74', 'ACTB'\"?$"
    ):
        gene_positions(by_id.tables["p"], "p", ["ERBB2", "NOPE"])


# labels ------------------------------------------------------------------------------------------------------------


def labelled(dtype, numbers):
    """Return two objects on a plane of labels, and a table of their counts."""
    import spatialdata as sd
    from spatialdata.models import Image2DModel, Labels2DModel, TableModel

    plane = np.zeros((8, 8), dtype=dtype)
    plane[1:3, 1:3], plane[5:8, 5:8] = numbers[0], numbers[-1]
    table = anndata.AnnData(RAW[: len(numbers)])
    table.obs["region"], table.obs["instance_id"] = "cells", np.array(numbers)
    table.obs["region"] = table.obs["region"].astype("category")
    return sd.SpatialData(
        images={"im": Image2DModel.parse(np.ones((1, 8, 8), np.float32), dims=("c", "y", "x"))},
        labels={"cells": Labels2DModel.parse(plane, dims=("y", "x"))},
        tables={"counts": TableModel.parse(table, region="cells", region_key="region", instance_key="instance_id")},
    )


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        ("bool", [1]),
        ("uint8", [3, 255]),
        ("int16", [-4, 7]),
        ("uint32", [7, 2**32 - 1]),
        ("int64", [2**60, 2**60 + 1]),
        ("uint64", [2**60, 2**60 + 1]),
    ],
)
def test_labels_of_any_integer_type(dtype, numbers):
    sdata = labelled(dtype, numbers)
    assert element_ids(sdata, "cells").tolist() == numbers
    assert match_rows(sdata, "counts", "cells").tolist() == list(range(len(numbers)))
    found = px.tl.aggregate(sdata, "cells", image_key="im", agg_func="sum", inplace=False)
    assert found.obs["instance_id"].tolist() == numbers
    assert found.X.ravel().tolist() == ([13] if len(numbers) == 1 else [4, 9])


def test_labels_beyond_the_ids_of_tables_are_refused():
    from spatialdata.models import Labels2DModel

    sdata = labelled("uint64", [5, 6])
    sdata["far"] = Labels2DModel.parse(np.full((8, 8), 2**63 + 1, np.uint64), dims=("y", "x"))
    for call in (lambda: element_ids(sdata, "far"), lambda: px.tl.aggregate(sdata, "far", image_key="im")):
        with pytest.raises(ValueError, match="'far' go up to 9223372036854775809, beyond int64"):
            call()


def test_labels_that_are_not_integers_are_refused():
    try:
        sdata = labelled("float32", [5, 6])
    except ValueError:
        pytest.skip("this version of spatialdata refuses them itself")
    with pytest.raises(TypeError, match="labels 'cells' are float32; integers"):
        px.tl.aggregate(sdata, "cells", image_key="im")


def test_a_table_that_annotates_nothing_is_told_how_to():
    said = not_annotated(anndata.AnnData(np.ones((2, 2), np.float32)), "counts", "spots")
    assert "does not annotate 'spots' or anything else" in said
    assert "TableModel.parse(table, region='spots', region_key='region', instance_key='instance_id')" in said
