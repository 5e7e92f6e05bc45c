"""tl.aggregate of images that pixnet did not predict, of maps of another quantity, on a cluster, and what comes after."""

from __future__ import annotations

from functools import partial
from unittest import mock

import dask
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Scale

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.zonal import zonal_statistics
from pixnet._names import TOTAL, TOTALS
from pixnet._sdata.store.element_store import write_mpp
from pixnet.tl._aggregate import aggregate

H, W = 60, 70
CELLS = [shapely.Point(p).buffer(4.3, 5) for p in np.random.default_rng(0).uniform(0, 60, (9, 2))]
COUNTS = np.random.default_rng(1).integers(0, 200, (3, H, W))


def polygons(geometries, index=None):
    return ShapesModel.parse(gpd.GeoDataFrame({"geometry": list(geometries)}, index=index))


def image(data, **kwargs):
    return Image2DModel.parse(data, dims=("c", "y", "x"), **kwargs)


def holding(element, labels=None):
    made = SpatialData(images={"im": element}, shapes={"cells": polygons(CELLS)})
    if labels is not None:
        made["areas"] = labels
    return made


def means(data, geometries=CELLS):
    """The means, the slow way."""
    cover = coverage(ShapeArrays.from_geometries(geometries), (0, 0, *data.shape[1:])).toarray()
    with np.errstate(invalid="ignore"):
        return cover @ data.reshape(len(data), -1).T.astype(float) / cover.sum(axis=1, keepdims=True)


# any image ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float32", "float64"]
)
def test_pixels_of_any_type(dtype):
    data = (COUNTS % 2 if dtype == "bool" else COUNTS).astype(dtype)
    table = aggregate(holding(image(data)), "cells", image_key="im", inplace=False)
    assert table.X.dtype == np.float32
    np.testing.assert_allclose(table.X, means(data.astype(float)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "chunked", "multiscale", "lazy", "stored", "stored multiscale"])
@pytest.mark.parametrize("n_channels", [1, 300])
def test_images_held_in_any_way(kind, n_channels, tmp_path):
    data = np.random.default_rng(2).integers(0, 4000, (n_channels, H, W)).astype(np.uint16)
    if kind == "lazy":
        made = holding(image(da.from_array(data, chunks=(7, 32, 25)) + np.uint16(3)))
        data = data + 3
    else:
        chunks = (5, 16, 33) if kind in {"chunked", "stored"} else None
        made = holding(image(data, chunks=chunks, scale_factors=[2, 2] if "multiscale" in kind else None))
    if "stored" in kind:
        made.write(tmp_path / "s.zarr")
        made = sd.read_zarr(tmp_path / "s.zarr")
    table = aggregate(made, "cells", image_key="im", inplace=False)
    np.testing.assert_allclose(table.X, means(data), rtol=1e-6)


def test_a_pyramid_level_taken_for_itself_lies_where_the_whole_does():
    made = SpatialData(images={"im": image(COUNTS.astype(np.float64), scale_factors=[2])})
    made["level"] = made["im"]["scale1"].ds["image"].copy()
    rng = np.random.default_rng(4)
    corners = 2 * rng.integers(0, 25, (20, 2))
    made["s"] = polygons(shapely.box(*c, *(c + s)) for c, s in zip(corners, 2 * rng.integers(1, 5, (20, 2))))
    whole = aggregate(made, "s", image_key="im", inplace=False)
    level = aggregate(made, "s", image_key="level", inplace=False)
    assert made["level"].shape == (3, H // 2, W // 2)
    np.testing.assert_allclose(level.X, whole.X, rtol=1e-6)
    np.testing.assert_allclose(level.obsm["spatial"], whole.obsm["spatial"])


def test_channels_named_by_numbers():
    made = holding(image(COUNTS.astype(np.uint8), c_coords=[10, 20, 30]))
    whole = aggregate(made, "cells", image_key="im", inplace=False)
    assert whole.var_names.tolist() == ["10", "20", "30"]
    for genes in (["30", "10"], np.array(["30", "10"]), pd.Index(["30", "10"])):
        part = aggregate(made, "cells", image_key="im", genes=genes, inplace=False)
        assert part.var_names.tolist() == ["30", "10"]
        np.testing.assert_array_equal(part.X, whole.X[:, [2, 0]])
    unnamed = aggregate(holding(image(COUNTS.astype(np.uint8))), "cells", image_key="im", inplace=False)
    assert unnamed.var_names.tolist() == ["0", "1", "2"]


def test_missing_pixels_of_one_channel_do_not_touch_the_others():
    data = COUNTS.astype(np.float32)
    data[1, 20:40] = np.nan
    table = aggregate(holding(image(data)), "cells", image_key="im", inplace=False)
    np.testing.assert_allclose(table.X[:, [0, 2]], means(COUNTS)[:, [0, 2]], rtol=1e-6)
    cover = coverage(ShapeArrays.from_geometries(CELLS), (0, 0, H, W)).toarray()
    valid = ~np.isnan(data[1].ravel())
    with np.errstate(invalid="ignore"):
        expected = cover[:, valid] @ data[1].ravel()[valid].astype(float) / cover[:, valid].sum(axis=1)
    np.testing.assert_allclose(table.X[:, 1], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["uint16", "int64", "chunked", "multiscale", "scaled", "stored"])
def test_labels_held_in_any_way(kind, tmp_path):
    labels = np.zeros((H, W), np.uint16 if kind == "uint16" else np.int64)
    labels[4:20, 6:20], labels[30:50, 10:40], labels[8:12, 8:16] = 65_000, 7, 0
    options = {"chunked": {"chunks": (9, 13)}, "multiscale": {"scale_factors": [2]}}.get(kind, {})
    given_labels = labels
    if kind == "scaled":
        given_labels = labels[::2, ::2]
        options = {"transformations": {"global": Scale([2.0, 2.0], axes=("x", "y"))}}
    made = holding(image(COUNTS.astype(np.int32)), Labels2DModel.parse(given_labels, dims=("y", "x"), **options))
    if kind == "stored":
        made.write(tmp_path / "s.zarr")
        made = sd.read_zarr(tmp_path / "s.zarr")
    aggregate(made, ["areas", "cells"], image_key="im")
    table = made.tables["areas_im"]
    assert table.obs["instance_id"].tolist() == [7, 65_000]
    expected = [COUNTS[:, labels == label].mean(axis=1) for label in (7, 65_000)]
    np.testing.assert_allclose(table.X, expected, rtol=1e-6)
    assert table.obs["area"].tolist() == [(labels == 7).sum(), (labels == 65_000).sum()]
    np.testing.assert_allclose(made.tables["cells_im"].X, means(COUNTS), rtol=1e-6)
    assert len(sd.match_table_to_element(made, element_name="areas", table_name="areas_im")) == 2


# gene maps ---------------------------------------------------------------------------------------------------------


def gene_map(seed, missing=0.0):
    """A map of two genes with a total that varies a lot, some pixels missing, bins of 5 px and spots made of them."""
    rng = np.random.default_rng(seed)
    data = rng.gamma(2, 20, (3, 60, 80)).astype(np.float32)
    data[-1] = 10 ** rng.uniform(2, 5, (60, 80))
    data[:, rng.random((60, 80)) < missing] = np.nan
    y, x = np.mgrid[0:60:5, 0:80:5].reshape(2, -1)
    squares = shapely.box(x, y, x + 5, y + 5)
    owner = rng.integers(-1, 12, len(x))  # a spot's bins need not touch; those of -1 belong to none
    spots = [shapely.union_all(squares[owner == k]) for k in range(12)]
    made = SpatialData(
        images={"m": image(data, c_coords=["A", "B", TOTAL], chunks=(2, 32, 32))},
        shapes={"bins": polygons(squares), "spots": polygons(spots)},
    )
    write_mpp(made, "m", 2.0)
    return made, data, owner


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.97]))
def test_bins_added_up_give_the_spots_that_they_make_up(seed, missing):
    made, data, owner = gene_map(seed, missing)
    found = aggregate(made, ["bins", "spots"], agg_func="sum", inplace=False)
    bins, spots = found["bins"], found["spots"]
    total = (bins.obs["total"] * bins.obs["coverage"] * bins.obs["area"]).fillna(0).to_numpy()
    counts = np.nan_to_num(bins.X * bins.obs["total"].to_numpy()[:, None])
    counts *= (bins.obs["coverage"] * bins.obs["area"]).to_numpy()[:, None]
    np.testing.assert_allclose(counts, np.nan_to_num(bins.layers["sum"]), rtol=1e-5)
    pixel_owner = np.kron(owner.reshape(12, 16), np.ones((5, 5), int))
    for k in range(12):
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(spots.X[k], counts[owner == k].sum(axis=0) / total[owner == k].sum(), rtol=1e-5)
            inside = (pixel_owner == k) & ~np.isnan(data[-1])
            exact = 1e4 * data[:-1, inside].sum(axis=1, dtype=float) / data[-1, inside].sum(dtype=float)
        np.testing.assert_allclose(spots.X[k], exact, rtol=1e-5)


def test_a_map_of_the_paper_s_quantity_is_summed_up_before_the_logarithm_is_undone():
    rng = np.random.default_rng(0)
    data = rng.gamma(2, 0.01, (3, H, W)).astype(np.float32)
    data[1] -= 0.02  # values of a linear head may fall below zero
    data[-1] = rng.gamma(4, 2500, (H, W))
    data[:, :, 40:] = np.nan
    made = holding(image(data, c_coords=["A", "B", TOTALS["log_sum"]]))
    write_mpp(made, "im", 2.0)
    table = aggregate(made, "cells", agg_func=["mean", "sum", "max"], inplace=False)
    cover = coverage(ShapeArrays.from_geometries(CELLS), (0, 0, H, W)).toarray()
    flat, valid = data.reshape(3, -1).astype(float), ~np.isnan(data[-1].ravel())
    sums, seen = cover[:, valid] @ flat[:, valid].T, cover[:, valid].sum(axis=1)
    there = seen > 0
    assert there.any()
    assert not there.all()
    np.testing.assert_allclose(table.X[there], np.expm1(4.0 * sums[there, :2]), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(table.layers["sum"][there], 4.0 * sums[there, :2], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(table.layers["density"][there], sums[there, :2] / seen[there, None], rtol=1e-5)
    np.testing.assert_allclose(table.obs["total"][there], sums[there, 2] / seen[there] / 1e4, rtol=1e-5)
    assert np.isnan(table.X[~there]).all()
    assert table.X[there, 1].min() < 0
    parameters = table.uns["pixnet"]
    assert parameters["quantity"] == "log_sum"
    assert parameters["unit"] == "CP10k"
    assert parameters["layer_units"]["sum"] == "log1p CP10k"


def test_a_quantity_that_cannot_be_summed_is_refused():
    made = holding(image(COUNTS.astype(np.float32), c_coords=["A", "B", TOTALS["log_sum"]]))
    with pytest.raises(ValueError, match="'im'.*pixel size is unknown.*set_mpp"):
        aggregate(made, "cells")
    made = holding(image(COUNTS.astype(np.float32), c_coords=["A", "B", "__total_rank__"]))
    with pytest.raises(ValueError, match="'__total_rank__'.*'__total__', '__total_log_sum__'"):
        aggregate(made, "cells")
    made = holding(image(COUNTS.astype(np.float32), c_coords=["A", TOTAL, TOTALS["log_sum"]]))
    with pytest.raises(ValueError, match="several totals"):
        aggregate(made, "cells")
    assert not made.tables


def small_tiles(tile_px):
    return mock.patch("pixnet.tl._aggregate.zonal_statistics", partial(zonal_statistics, tile_px=tile_px))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_other_shapes_and_tiles_change_nothing(seed):
    rng = np.random.default_rng(seed)
    made, _, _ = gene_map(seed, 0.2)
    boxes = [shapely.box(*p, *(p + s)) for p, s in zip(rng.uniform(-5, 70, (9, 2)), 10 ** rng.uniform(-1, 1.5, (9, 2)))]
    made["cells"] = polygons(CELLS + boxes)
    made["others"] = polygons(shapely.Point(p).buffer(15) for p in rng.uniform(0, 80, (20, 2)))
    made["boxes"] = polygons(boxes)
    together = aggregate(made, ["others", "cells", "boxes"], agg_func=["mean", "std", "min"], inplace=False)
    alone = aggregate(made, "cells", agg_func=["mean", "std", "min"], inplace=False)
    assert together["cells"].X.tobytes() == alone.X.tobytes()
    np.testing.assert_array_equal(together["boxes"].X, alone.X[len(CELLS) :])
    with small_tiles(16):
        small = aggregate(made, "cells", agg_func=["mean", "std", "min"], inplace=False)
    np.testing.assert_allclose(small.X, alone.X, rtol=1e-6)
    np.testing.assert_allclose(small.layers["std"], alone.layers["std"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(small.layers["min"], alone.layers["min"])


# elsewhere ---------------------------------------------------------------------------------------------------------


def test_worker_processes_give_the_same(tmp_path):
    distributed = pytest.importorskip("distributed")
    made, _, _ = gene_map(5, 0.3)
    made["cells"] = polygons(CELLS)
    made.write(tmp_path / "s.zarr")
    backed = sd.read_zarr(tmp_path / "s.zarr")
    lazy = SpatialData(
        images={"m": made["m"].copy(data=made["m"].data * np.float32(2))}, shapes={"cells": made["cells"]}
    )
    calls = {
        "stored": (backed, ["spots", "bins", "cells"], ["mean", "std", "max", "median"]),
        "in memory": (made, ["cells"], ["mean"]),
        "lazy": (lazy, ["cells"], ["mean", "min"]),
    }

    def run():
        with small_tiles(32):
            return {
                name: aggregate(sdata, shapes, agg_func=agg_func, inplace=False)
                for name, (sdata, shapes, agg_func) in calls.items()
            }

    expected = run()
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        with dask.config.set(scheduler="threads"):
            run()
        assert not any(client.run(lambda dask_worker: len(dask_worker.state.log)).values())
        found = run()
        done = sum(client.run(lambda dask_worker: len(dask_worker.state.log)).values())
    assert done > 0  # the workers did it
    for name, tables in expected.items():
        for shapes, table in tables.items():
            other = found[name][shapes]
            assert other.X.tobytes() == table.X.tobytes(), (name, shapes)
            for layer in table.layers:
                assert other.layers[layer].tobytes() == table.layers[layer].tobytes(), (name, shapes, layer)
            pd.testing.assert_frame_equal(other.obs, table.obs)


def test_squidpy_and_spatialdata_plot_take_the_table():
    squidpy = pytest.importorskip("squidpy")
    pytest.importorskip("spatialdata_plot")
    import matplotlib.pyplot as plt

    made = holding(image(COUNTS.astype(np.float32), c_coords=["CD3", "CD8", "DAPI"]))
    aggregate(made, "cells", image_key="im")
    table = made.tables["cells_im"]
    squidpy.gr.spatial_neighbors(table, n_neighs=3, coord_type="generic")
    squidpy.gr.spatial_autocorr(table, mode="moran", n_perms=None, n_jobs=1, show_progress_bar=False)
    assert set(table.uns["moranI"].index) == {"CD3", "CD8", "DAPI"}
    figure, ax = plt.subplots()
    try:
        made.pl.render_shapes("cells", color="CD8", cmap="viridis", table_name="cells_im").pl.show(
            ax=ax, coordinate_systems="global"
        )
        figure.canvas.draw()
        colours = np.concatenate([collection.get_facecolor() for collection in ax.collections])
        values = table[:, "CD8"].X.ravel()
        expected = plt.get_cmap("viridis")((values - values.min()) / np.ptp(values))
        np.testing.assert_allclose(colours[:, :3], expected[:, :3], atol=0.01)
    finally:
        plt.close(figure)
