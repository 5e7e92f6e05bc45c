"""Gene choice: the definition, several tables, kinds of matrices, refusals."""

from __future__ import annotations

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

import pixnet as px
from pixnet._sdata.measured import MeasuredTable
from pixnet.tl._training_genes import choose_genes


def make(counts, genes, total=None, layer=None, kind=np.asarray):
    counts = np.asarray(counts, dtype=float)
    n = len(counts)
    obs = pd.DataFrame(
        {"region": pd.Categorical(["spots"] * n), "instance_id": np.arange(n)}, index=[str(i) for i in range(n)]
    )
    if total is not None:
        obs["total"] = total
    values = kind(counts)
    table = AnnData(X=np.log1p(counts) if layer else values, obs=obs, var=pd.DataFrame(index=list(genes)))
    if layer:
        table.layers[layer] = values
    shapes = ShapesModel.parse(geopandas.GeoDataFrame({"geometry": shapely.points(np.arange(n), 0), "radius": 1.0}))
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="instance_id")
    return SpatialData(shapes={"spots": shapes}, tables={"spots_counts": table})


COUNTS = np.array([[10, 0, 5, 1, 4], [0, 20, 60, 0, 20], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
GENES = ["A", "B", "MT-C", "D", "E"]


def by_definition(counts, genes, total=None):
    total = counts.sum(axis=1) if total is None else total
    usable = total > 0
    mean = (1e4 * counts[usable] / total[usable, None]).mean(axis=0)
    return [g for _, g in sorted(zip(-mean, genes)) if not g.startswith(("MT-", "mt-"))]


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_definition(kind):
    sdata = make(COUNTS, GENES, kind=kind)
    expected = by_definition(COUNTS, GENES)
    assert px.pp.select_genes(sdata) == expected == ["A", "D", "E", "B"]
    assert px.pp.select_genes(sdata, n_top=2) == expected[:2]


def test_total_key_changes_the_weights():
    total = np.array([1000, 100, 1000, 5])
    sdata = make(COUNTS, GENES, total=total)
    assert px.pp.select_genes(sdata, total_key="total") == by_definition(COUNTS, GENES, total)
    assert px.pp.select_genes(sdata, total_key="total") != px.pp.select_genes(sdata)


def test_several_tables_pool_spots_and_keep_common_genes():
    a, b = make(COUNTS, GENES), make(COUNTS[:2, ::-1], ["E", "F", "MT-C", "B", "A"])
    frames = [
        pd.DataFrame(c, columns=g) for c, g in ((COUNTS, GENES), (COUNTS[:2, ::-1], ["E", "F", "MT-C", "B", "A"]))
    ]
    cp10k = pd.concat([1e4 * f[f.sum(axis=1) > 0].div(f[f.sum(axis=1) > 0].sum(axis=1), axis=0) for f in frames])
    expected = cp10k[["A", "B", "E"]].mean().sort_values(ascending=False).index.tolist()
    assert px.pp.select_genes([a, b]) == expected
    assert px.pp.select_genes({"one": a, "two": b}) == expected


def test_options():
    sdata = make(COUNTS, GENES)
    assert "MT-C" in px.pp.select_genes(sdata, exclude_prefixes=())
    assert px.pp.select_genes(sdata, exclude_prefixes="A") == ["MT-C", "D", "E", "B"]
    assert px.pp.select_genes(sdata, min_fraction=0.5) == ["A", "D", "E"]
    assert px.pp.select_genes(make(COUNTS, GENES, layer="raw"), layer="raw") == ["A", "D", "E", "B"]
    assert px.pp.select_genes(sdata, n_top=None) == ["A", "D", "E", "B"]


def test_ties_are_alphabetical():
    assert px.pp.select_genes(make([[1, 1, 1]], ["Z", "B", "M"])) == ["B", "M", "Z"]


def test_refusals():
    sdata = make(COUNTS, GENES)
    with pytest.raises(ValueError, match="no gene is in all 2 tables.*names are Ensembl ids"):
        px.pp.select_genes([sdata, make(COUNTS, [f"ENSG0000000000{i}" for i in range(5)])])
    with pytest.raises(ValueError, match="total_key"):
        px.pp.select_genes([sdata, make(np.tile(COUNTS, (1, 2)), [*GENES, "F", "G", "H", "I", "J"])])
    with pytest.raises(ValueError, match="more than once"):
        px.pp.select_genes(make(COUNTS, ["A", "A", "B", "C", "D"]))
    with pytest.raises(ValueError, match="NaN"):
        px.pp.select_genes(make(np.where(COUNTS == 5, np.nan, COUNTS), GENES))
    with pytest.raises(ValueError, match="fractions"):
        px.pp.select_genes(make(COUNTS / 3, GENES))
    with pytest.raises(ValueError, match="negative"):
        px.pp.select_genes(make(-COUNTS, GENES))
    with pytest.raises(KeyError, match="'depth'.*total_key"):
        px.pp.select_genes(sdata, total_key="depth")
    with pytest.raises(KeyError, match="no layer 'raw'"):
        px.pp.select_genes(sdata, layer="raw")
    with pytest.raises(KeyError, match="'counts'"):
        px.pp.select_genes(sdata, table_key="counts")
    with pytest.raises(ValueError, match="no spot has any counts"):
        px.pp.select_genes(make(COUNTS * 0, GENES))
    with pytest.raises(ValueError, match="min_fraction"):
        px.pp.select_genes(sdata, min_fraction=1.0)
    with pytest.raises(ValueError, match="n_top"):
        px.pp.select_genes(sdata, n_top=0)
    with pytest.raises(ValueError, match="exclude_prefixes"):
        px.pp.select_genes(sdata, exclude_prefixes=("A", "B", "MT", "D", "E"))
    with pytest.raises(ValueError, match="empty"):
        px.pp.select_genes([])
    with pytest.raises(TypeError, match="SpatialData"):
        px.pp.select_genes(AnnData(COUNTS.astype(float)))


def test_mitochondrial_genes_are_known_by_symbols_in_var_and_by_ensembl_id():
    ids = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003.4", "ENSG00000198888.2", "ENSMUSG00000064370"]
    sdata = make(COUNTS, ids)
    assert sorted(px.pp.select_genes(sdata)) == sorted(ids[:3])
    assert len(px.pp.select_genes(sdata, exclude_prefixes=())) == 5
    sdata["spots_counts"].var["gene_name"] = pd.Categorical(["MT-CO1", "A", "RPL3", "B", "C"])
    assert sorted(px.pp.select_genes(sdata)) == sorted(ids[1:3])
    assert ids[2] not in px.pp.select_genes(sdata, exclude_prefixes=["RPL"])
    assert sorted(in_training(sdata)) == sorted(ids[1:3])


def in_training(sdata):
    """Return the genes that `tl.train` gives a channel each where no programs are asked for."""
    table = MeasuredTable.read(sdata["spots_counts"], "spots_counts", None, None)
    return choose_genes(None, None, {"0": {"spots": table}}, {}, every=False)[0]


def test_only_a_number_that_was_asked_for_warns(caplog, monkeypatch):
    monkeypatch.setattr("pixnet._logging.logger.propagate", True)
    sdata = make(COUNTS, GENES)
    px.pp.select_genes(sdata)
    assert in_training(sdata) == px.pp.select_genes(sdata)
    assert caplog.text == ""
    px.pp.select_genes(sdata, n_top=10)
    assert "only 4 genes qualify, fewer than n_top=10" in caplog.text
