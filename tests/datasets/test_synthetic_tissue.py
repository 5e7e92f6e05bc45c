"""The synthetic tissue: determinism, exactness of the truth, counts, structure."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import shapely

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._sdata.pixel_size import find_mpp
from pixnet.datasets import synthetic_tissue
from pixnet.datasets._synthetic.genes import PLATFORMS
from pixnet.datasets._synthetic.world import TissueSpec, World, world


@pytest.fixture(scope="module")
def sdata():
    return synthetic_tissue(600, n_genes=30, shapes=("spots", "cells", "bins", "spots_legacy", "bins_002um"))


def pixels_of(sdata):
    return sdata["he"]["scale0"]["image"].values


def truth_of(sdata):
    return np.nan_to_num(sdata["truth"].values.astype(np.float64))


def test_contract(sdata):
    assert set(sdata.images) == {"he", "truth"}
    assert {"spots", "cells", "bins"} <= set(sdata.shapes)
    assert {"spots_counts", "cells_counts", "bins_counts"} <= set(sdata.tables)
    he = sdata["he"]["scale0"]["image"]
    assert he.shape == (3, 1200, 1200)
    assert he.dtype == np.uint8
    truth = sdata["truth"]
    assert truth.shape == (31, 300, 300)
    assert truth.dtype == np.float32
    assert str(truth.coords["c"].values[-1]) == "__total__"
    assert [find_mpp(sdata, key) for key in ("he", "truth")] == [0.5, 2.0]
    for name in ("spots", "cells", "bins"):
        table = sdata[f"{name}_counts"]
        assert list(table.obs["instance_id"]) == list(sdata[name].index)
        assert (table.X.data == np.rint(table.X.data)).all()
        assert list(table.var_names) == [str(c) for c in truth.coords["c"].values[:-1]]


def test_total_is_the_sum_and_averages_ten_thousand(sdata):
    truth = sdata["truth"].values.astype(np.float64)
    np.testing.assert_allclose(truth[:-1].sum(axis=0), truth[-1], rtol=1e-5)
    assert np.nanmean(truth[-1]) == pytest.approx(1e4, rel=0.02)
    assert 0.1 < np.isnan(truth[-1]).mean() < 0.6


def test_pixels_do_not_depend_on_the_part_or_the_order():
    spec = TissueSpec(400.0, 0.5, 13, 3, 0)
    whole = World(spec)
    picture = whole.render(slice(0, 800), slice(0, 800))
    densities = whole.truth(slice(0, 200), slice(0, 200))
    again = World(spec)
    assert (again.render(slice(333, 411), slice(5, 290)) == picture[:, 333:411, 5:290]).all()
    np.testing.assert_array_equal(again.truth(slice(111, 163), slice(90, 200)), densities[:, 111:163, 90:200])


def test_seeds():
    a, b = synthetic_tissue(300, n_genes=13, seed=1), synthetic_tissue(300, n_genes=13, seed=1)
    assert (pixels_of(a) == pixels_of(b)).all()
    assert (a["cells_counts"].X != b["cells_counts"].X).nnz == 0
    other = synthetic_tissue(300, n_genes=13, seed=2)
    assert (pixels_of(a) != pixels_of(other)).mean() > 0.3
    restained = synthetic_tissue(300, n_genes=13, seed=1, stain_seed=5)
    assert (pixels_of(a) != pixels_of(restained)).mean() > 0.3
    assert (a["cells_counts"].X != restained["cells_counts"].X).nnz == 0


def test_genes_mean_the_same_on_every_slide():
    first, second = (World(TissueSpec(300.0, 0.5, 30, seed, 0)).panel for seed in (1, 2))
    assert (first.loadings == second.loadings).all()
    other = World(TissueSpec(300.0, 0.5, 30, 1, 0, panel_seed=1)).panel
    assert other.names == first.names
    assert (other.loadings != first.loadings).mean() > 0.3
    a, b = (synthetic_tissue(300, n_genes=13, shapes="cells", panel_seed=seed) for seed in (0, 1))
    assert (pixels_of(a) == pixels_of(b)).all()
    assert (a["cells_counts"].X != b["cells_counts"].X).nnz > 0


def test_pickles_as_its_specification():
    sdata = synthetic_tissue(300, lazy=True)
    data = sdata["he"]["scale0"]["image"].data
    content = pickle.dumps(data)
    assert len(content) < 10_000
    assert (pickle.loads(content)[:, :64, :64].compute() == data[:, :64, :64].compute()).all()


@pytest.mark.parametrize(("name", "edge"), [("bins", 4), ("bins_002um", 1)])
def test_bins_are_sums_of_the_truth(sdata, name, edge):
    truth = truth_of(sdata)
    n = 300 // edge
    sums = truth.reshape(31, n, edge, n, edge).sum(axis=(2, 4))
    centres = shapely.centroid(sdata[name].geometry.to_numpy())
    row, col = ((f(centres) * 0.5 / (2 * edge)).astype(int) for f in (shapely.get_y, shapely.get_x))
    expected = sums[:-1, row, col].T * 4 / 1e4 * PLATFORMS[name].depth
    counts = sdata[f"{name}_counts"].X.toarray()
    # Drawn around the expectation: the sum over bins of each gene is within 5 standard errors.
    _, spread, nb_size, *_ = PLATFORMS[name]
    variance = expected + expected**2 * ((1 + 1 / nb_size) * np.exp(spread**2) - 1)
    z = (counts - expected).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert np.abs(z).max() < 5


@pytest.mark.parametrize("name", ["spots", "cells", "spots_legacy"])
def test_shapes_are_sums_of_the_truth(sdata, name):
    element = sdata[name]
    radius = element["radius"].to_numpy() if "radius" in element else None
    shapes = ShapeArrays.from_geometries(element.geometry.to_numpy(), radius).transform(np.diag([0.25, 0.25, 1.0]))
    weights = coverage(shapes, (0, 0, 300, 300))
    expected = weights @ truth_of(sdata)[:-1].reshape(30, -1).T * 4 / 1e4 * PLATFORMS[name].depth
    counts = sdata[f"{name}_counts"].X.toarray()
    _, spread, nb_size, *_ = PLATFORMS[name]
    variance = expected + expected**2 * ((1 + 1 / nb_size) * np.exp(spread**2) - 1)
    z = (counts - expected).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert np.abs(z).max() < 5
    # At least half of each is tissue.
    tissue = np.isfinite(sdata["truth"].values[-1]).ravel()
    assert ((weights @ tissue.astype(float)) / shapes.area).min() >= 0.5 - 1e-6


def test_cells_do_not_overlap_and_hold_their_type(sdata):
    cells = sdata["cells"]
    assert shapely.is_valid(cells.geometry.to_numpy()).all()
    tree = shapely.STRtree(cells.geometry.to_numpy())
    left, right = tree.query(cells.geometry.to_numpy(), predicate="overlaps")
    pairs = left < right
    common = shapely.intersection(*(cells.geometry.to_numpy()[i[pairs]] for i in (left, right)))
    assert shapely.area(common).sum() < 1e-3 * cells.geometry.area.sum()
    counts = sdata["cells_counts"].to_df()
    counts = counts.div(counts.sum(axis=1) + 1, axis=0)
    tumour = (cells["cell_type"] == "tumour").to_numpy()
    assert tumour.sum() > 50
    assert counts.loc[tumour, "TUM1"].mean() > 3 * counts.loc[~tumour, "TUM1"].mean()


def test_the_picture_shows_tissue_where_the_truth_has_it(sdata):
    he = pixels_of(sdata).astype(float)
    dark = 255 - he.reshape(3, 300, 4, 300, 4).mean(axis=(0, 2, 4))
    tissue = np.isfinite(sdata["truth"].values[-1])
    assert dark[~tissue].mean() < 25
    assert dark[tissue].mean() > 60


@pytest.mark.parametrize("mpp", [0.25, 1.0])
def test_other_resolutions_show_the_same(sdata, mpp):
    other = synthetic_tissue(600, mpp=mpp, n_genes=30, shapes=("spots",))
    assert (other["spots_counts"].X != sdata["spots_counts"].X).nnz == 0
    image = pixels_of(other)
    side = int(8 / mpp)
    a = image.reshape(3, 75, side, 75, side).mean(axis=(2, 4))
    b = pixels_of(sdata).reshape(3, 75, 16, 75, 16).mean(axis=(2, 4))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97


def test_large_is_lazy():
    made = world(TissueSpec(2000.0, 0.25, 20, 0, 0))
    assert made.image_shape == (8000, 8000)
    sdata = synthetic_tissue(2000, mpp=0.25, n_genes=20, shapes=())
    assert sdata["he"]["scale0"]["image"].shape == (3, 8000, 8000)
    part = sdata["he"]["scale0"]["image"].data[:, 4000:4100, 4000:4100].compute()
    assert (part == made.render(slice(4000, 4100), slice(4000, 4100))).all()
    assert np.isfinite(sdata["truth"].data[-1, 490:510, 490:510].compute()).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size_um": 10}, "size_um"),
        ({"mpp": 0}, "mpp"),
        ({"n_genes": 0}, "n_genes"),
        ({"seed": -1}, "seed"),
        ({"panel_seed": 0.5}, "panel_seed"),
        ({"shapes": ("spot",)}, "'spot'.*'spots'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_tissue(**{"size_um": 300, **arguments})
