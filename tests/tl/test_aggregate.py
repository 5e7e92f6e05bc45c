from __future__ import annotations

import json

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
from spatialdata.models import Image2DModel, Image3DModel, Labels2DModel, Labels3DModel, PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, remove_transformation, set_transformation

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._names import TOTAL
from pixnet._sdata.counts import is_predicted_table
from pixnet._sdata.record import identity_of, note
from pixnet._sdata.store.element_store import write_mpp
from pixnet.tl._aggregate import aggregate

H, W, MPP = 64, 80, 2.0
GENES = ["ACTB", "HLA-A", "ENSG01.2"]


def polygons(geometries, index=None, **kwargs):
    return ShapesModel.parse(gpd.GeoDataFrame({"geometry": list(geometries)}, index=index), **kwargs)


def circles(centres, radius, index=None):
    frame = gpd.GeoDataFrame({"geometry": shapely.points(centres), "radius": radius}, index=index)
    return ShapesModel.parse(frame)


def bins(size, prefix=None):
    y, x = np.mgrid[0:H:size, 0:W:size].reshape(2, -1)
    index = None if prefix is None else [f"{prefix}{i}" for i in range(len(x))]
    return polygons(shapely.box(x, y, x + size, y + size), index)


def gene_map(seed=0, missing=True):
    rng = np.random.default_rng(seed)
    data = rng.gamma(2, 20, (len(GENES) + 1, H, W)).astype(np.float32)
    data[-1] = rng.gamma(4, 2500, (H, W))
    if missing:
        data[:, :, :20] = np.nan
    return data


@pytest.fixture
def sdata():
    """A gene map, an image that is none, spots, bins, cells with text ids, and labels."""
    data = gene_map()
    rng = np.random.default_rng(1)
    labels = np.zeros((H, W), np.int32)
    labels[10:30, 5:40], labels[30:50, 30:70] = 7, 3
    cells = [shapely.Point(p).buffer(r, 4) for p, r in zip(rng.uniform(5, 60, (30, 2)), rng.uniform(0.3, 6, 30))]
    made = SpatialData(
        images={
            "he_genes": Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=[*GENES, TOTAL], chunks=(2, 32, 32)),
            "protein": Image2DModel.parse(
                np.nan_to_num(data[:2], nan=5.0), dims=("c", "y", "x"), c_coords=["CD3", "CD8"], scale_factors=[2]
            ),
        },
        shapes={
            "spots": circles(rng.uniform(0, 80, (12, 2)), 8.0, [f"s{i}" for i in range(12)]),
            "bins": bins(4),
            "cells": polygons(cells, [f"cell-{i}" for i in rng.permutation(30)]),
        },
        labels={"regions": Labels2DModel.parse(labels, dims=("y", "x"))},
    )
    write_mpp(made, "he_genes", MPP)
    note(made, "images", "he_genes", {"model": "a model", "identity": identity_of(made["he_genes"])})
    return made


def weights_of(sdata, name):
    element = sdata[name]
    radius = element["radius"].to_numpy() if "radius" in element else None
    return coverage(ShapeArrays.from_geometries(element.geometry.to_numpy(), radius), (0, 0, H, W)).toarray(), element


def test_a_gene_map_gives_cp10k_by_the_ratio_of_sums(sdata):
    assert aggregate(sdata, "spots", agg_func=["mean", "sum", "std", "min", "max"]) is None
    table = sdata.tables["spots_genes"]
    cover, element = weights_of(sdata, "spots")
    flat = sdata["he_genes"].values.reshape(4, -1).astype(np.float64)
    valid = ~np.isnan(flat[-1])
    sums = cover[:, valid] @ flat[:, valid].T
    seen = cover[:, valid].sum(axis=1)
    assert (seen == 0).any()
    with np.errstate(invalid="ignore"):
        cp10k, density = 1e4 * sums[:, :-1] / sums[:, -1:], sums[:, :-1] / seen[:, None]
        total = sums[:, -1] / seen / 1e4
    np.testing.assert_allclose(table.X, cp10k, rtol=1e-5)
    np.testing.assert_allclose(table.layers["density"], density, rtol=1e-5)
    np.testing.assert_allclose(table.obs["total"], total, rtol=1e-5)
    np.testing.assert_allclose(table.X, table.layers["density"] / table.obs["total"].to_numpy()[:, None], rtol=1e-5)
    np.testing.assert_allclose(table.layers["sum"], density * seen[:, None] * MPP**2, rtol=1e-5)
    assert (table.layers["min"][seen > 0] < table.layers["max"][seen > 0]).all()
    assert (table.layers["std"][seen > 0] > 0).all()
    np.testing.assert_allclose(table.obs["area"], np.pi * 64 * MPP**2)
    np.testing.assert_allclose(table.obs["coverage"], seen / (np.pi * 64), atol=1e-6)
    assert table.X.dtype == table.layers["density"].dtype == np.float32
    assert table.var_names.tolist() == GENES
    assert table.obs["instance_id"].tolist() == table.obs_names.tolist() == element.index.tolist()
    assert table.obs["region"].unique().tolist() == ["spots"]
    np.testing.assert_allclose(table.obsm["spatial"], np.column_stack([element.geometry.x, element.geometry.y]))
    assert sdata["spots"].index.tolist() == [f"s{i}" for i in range(12)]


def test_parameters_are_recorded(sdata):
    aggregate(sdata, "spots", genes=["ACTB"], agg_func=["sum"], min_coverage=0.25)
    parameters = sdata.tables["spots_genes"].uns["pixnet"]
    expected = {
        "kind": "aggregate", "shapes": "spots", "image_key": "he_genes", "agg_func": ["sum"], "weights": "area",
        "min_coverage": 0.25, "coordinate_system": "global", "model": "a model", "unit": "CP10k", "mpp": MPP,
    }  # fmt: skip
    assert expected.items() <= parameters.items()
    assert parameters["genes"] == ["ACTB"]
    assert "um^2" in parameters["layer_units"]["sum"]
    assert json.loads(json.dumps(sdata.attrs["pixnet"])) == sdata.attrs["pixnet"]


def test_several_elements_are_one_pass_and_equal_single_calls(sdata):
    names = ["bins", "regions", "cells", "spots"]
    single = {name: aggregate(sdata, name, inplace=False) for name in names}
    together = aggregate(sdata, names, inplace=False)
    assert list(together) == names
    for name in names:
        assert together[name].X.tobytes() == single[name].X.tobytes()
        pd.testing.assert_frame_equal(together[name].obs, single[name].obs)
    assert not sdata.tables
    aggregate(sdata, names, key_added={"bins": "small"})
    assert set(sdata.tables) == {"small", "regions_genes", "cells_genes", "spots_genes"}


def test_bins_add_up_to_larger_ones(sdata):
    sdata["large"] = bins(16, "large")
    tables = aggregate(sdata, ["bins", "large"], agg_func=["sum"], inplace=False)
    small = tables["bins"]
    centre = small.obsm["spatial"]
    owner = (centre[:, 1] // 16 * (W // 16) + centre[:, 0] // 16).astype(int)
    sums = pd.DataFrame(np.nan_to_num(small.layers["sum"])).groupby(owner).sum().to_numpy()
    np.testing.assert_allclose(sums, np.nan_to_num(tables["large"].layers["sum"]), rtol=1e-5)
    weight = small.obs["coverage"] * small.obs["area"]
    total = (small.obs["total"].fillna(0) * weight).groupby(owner).sum().to_numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(sums / total[:, None], tables["large"].X, rtol=1e-5)


def test_gene_subset_in_the_order_asked_for(sdata):
    whole = aggregate(sdata, "cells", inplace=False)
    part = aggregate(sdata, "cells", genes=["ENSG01.2", "ACTB"], inplace=False)
    assert part.var_names.tolist() == ["ENSG01.2", "ACTB"]
    np.testing.assert_array_equal(part.X, whole.X[:, [2, 0]])
    np.testing.assert_array_equal(part.obs["total"], whole.obs["total"])


def test_any_other_image_gives_plain_statistics(sdata):
    write_mpp(sdata, "protein", 0.5)
    table = aggregate(sdata, "cells", image_key="protein", agg_func=["mean", "sum", "max"], inplace=False)
    cover, _ = weights_of(sdata, "cells")
    flat = np.asarray(sdata["protein"]["scale0"].ds["image"].values, np.float64).reshape(2, -1)
    np.testing.assert_allclose(table.X, cover @ flat.T / cover.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(table.layers["sum"], cover @ flat.T, rtol=1e-5)
    assert set(table.layers) - {None} == {"sum", "max"}
    assert "total" not in table.obs
    assert table.uns["pixnet"]["layer_units"]["sum"] == "value x pixel"
    np.testing.assert_allclose(table.obs["area"], cover.sum(axis=1) * 0.25)
    only = aggregate(sdata, "cells", image_key="protein", agg_func="std", inplace=False)
    assert not only.layers


def test_quantiles_of_images_and_of_the_densities_of_maps(sdata):
    table = aggregate(sdata, "bins", image_key="protein", agg_func=["median", "q90"], inplace=False)
    pixels = np.asarray(sdata["protein"]["scale0"].ds["image"].values).reshape(2, H // 4, 4, W // 4, 4)
    pixels = pixels.transpose(1, 3, 0, 2, 4).reshape(-1, 2, 16)
    np.testing.assert_array_equal(table.X, np.median(pixels, axis=2))
    expected = np.quantile(pixels, 0.9, axis=2, method="averaged_inverted_cdf")
    np.testing.assert_allclose(table.layers["q90"], expected, rtol=1e-6)
    assert table.uns["pixnet"]["agg_func"] == ["median", "q90"]
    assert table.uns["pixnet"]["unit"] == table.uns["pixnet"]["layer_units"]["q90"] == "value"

    table = aggregate(sdata, "bins", agg_func="median", inplace=False)
    mean = aggregate(sdata, "bins", inplace=False)
    assert set(table.layers) - {None} == {"density", "median"}
    np.testing.assert_array_equal(table.X, mean.X)
    pixels = sdata["he_genes"].values[:-1].reshape(3, H // 4, 4, W // 4, 4).transpose(1, 3, 0, 2, 4)
    np.testing.assert_array_equal(table.layers["median"], np.median(pixels.reshape(-1, 3, 16), axis=2))
    assert table.uns["pixnet"]["layer_units"]["median"] == "density"


def test_without_a_pixel_size_areas_are_in_pixels_and_say_so(sdata, caplog):
    with caplog.at_level("WARNING", logger="pixnet"):
        table = aggregate(sdata, "bins", image_key="protein", inplace=False)
    assert (table.obs["area"] == 16).all()
    assert table.uns["pixnet"]["area_unit"] == "pixel"
    remove_transformation(sdata["he_genes"], "pixnet_um")
    with pytest.raises(ValueError, match="set_mpp"):
        aggregate(sdata, "bins", image_key="he_genes", agg_func="sum")


def test_rows_with_little_coverage_become_nan(sdata):
    table = aggregate(sdata, "bins", agg_func=["std"], min_coverage=0.5, inplace=False)
    assert sorted(set(table.obs["coverage"])) == [0, 1]
    sdata["half"] = polygons([shapely.box(18, 0, 24, 4), shapely.box(14, 0, 22, 4), shapely.box(0, 0, 4, 4)])
    loose = aggregate(sdata, "half", inplace=False)
    strict = aggregate(sdata, "half", agg_func=["std"], min_coverage=0.5, inplace=False)
    np.testing.assert_allclose(strict.obs["coverage"], [4 / 6, 2 / 8, 0])
    assert np.isnan(strict.X).all(axis=1).tolist() == [False, True, True]
    assert np.isnan(loose.X).all(axis=1).tolist() == [False, False, True]
    for layer in strict.layers.values():
        assert np.isnan(layer).all(axis=1).tolist() == [False, True, True]
    assert strict.obs["total"].isna().tolist() == [False, True, True]
    assert len(strict) == 3


def test_labels_elements(sdata):
    table = aggregate(sdata, "regions", inplace=False)
    assert table.obs["instance_id"].tolist() == [3, 7]
    labels = sdata["regions"].values
    data = sdata["he_genes"].values
    for row, label in zip(table.X, [3, 7]):
        inside = (labels == label) & ~np.isnan(data[-1])
        np.testing.assert_allclose(row, 1e4 * data[:-1, inside].sum(axis=1) / data[-1, inside].sum(), rtol=1e-5)
    np.testing.assert_allclose(table.obs["area"], [800 * 4, 700 * 4])


def test_tables_join_with_their_shapes(sdata):
    aggregate(sdata, ["cells", "bins", "regions"])
    for name, key in (("cells", "cells_genes"), ("bins", "bins_genes")):
        element, table = sd.join_spatialelement_table(
            sdata=sdata, spatial_element_names=name, table_name=key, how="inner"
        )
        assert len(element[name]) == len(table) == len(sdata[name])
        matched = sd.match_table_to_element(sdata, element_name=name, table_name=key)
        assert matched.obs_names.tolist() == sdata.tables[key].obs_names.tolist()
    sd.match_element_to_table(sdata, element_name="cells", table_name="cells_genes")
    assert len(sd.match_table_to_element(sdata, element_name="regions", table_name="regions_genes")) == 2
    values = sd.get_values(value_key="HLA-A", sdata=sdata, element_name="cells", table_name="cells_genes")
    assert values.index.tolist() == sdata["cells"].index.tolist()


def test_squidpy_finds_neighbours(sdata):
    squidpy = pytest.importorskip("squidpy")
    table = aggregate(sdata, "bins", inplace=False)
    squidpy.gr.spatial_neighbors(table, coord_type="generic", n_neighs=4)
    assert table.obsp["spatial_connectivities"].shape == (len(table), len(table))


def test_backed_objects_are_written(sdata, tmp_path):
    sdata.write(tmp_path / "s.zarr")
    opened = sd.read_zarr(tmp_path / "s.zarr")
    aggregate(opened, ["cells", "regions"], agg_func=["mean", "sum"])
    again = sd.read_zarr(tmp_path / "s.zarr")
    for key in ("cells_genes", "regions_genes"):
        np.testing.assert_array_equal(again.tables[key].X, opened.tables[key].X)
        assert is_predicted_table(again.tables[key])
        assert list(again.tables[key].uns["pixnet"]["agg_func"]) == ["mean", "sum"]
    np.testing.assert_allclose(opened.tables["cells_genes"].X, aggregate(sdata, "cells", inplace=False).X, rtol=1e-6)
    with pytest.raises(ValueError, match="overwrite=True"):
        aggregate(opened, "cells")
    aggregate(opened, "cells", genes=["ACTB"], overwrite=True)
    assert sd.read_zarr(tmp_path / "s.zarr").tables["cells_genes"].shape == (30, 1)
    aggregate(opened, "spots", inplace=False)
    assert "spots_genes" not in sd.read_zarr(tmp_path / "s.zarr").tables


def test_lazy_maps_need_not_be_stored(sdata):
    expected = aggregate(sdata, "cells", inplace=False)
    lazy = da.map_blocks(lambda block: block * 1, sdata["he_genes"].data.rechunk((4, 40, 40)), dtype=np.float32)
    sdata["lazy"] = Image2DModel.parse(lazy, dims=("c", "y", "x"), c_coords=[*GENES, TOTAL])
    found = aggregate(sdata, "cells", image_key="lazy", inplace=False)
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-6)


def test_a_map_is_known_by_its_total_alone(sdata):
    del sdata.attrs["pixnet"]
    found = aggregate(sdata, "cells", inplace=False)
    assert found.uns["pixnet"]["unit"] == "CP10k"
    assert "model" not in found.uns["pixnet"]


# invariants --------------------------------------------------------------------------------------------------------


def random_affine(rng):
    """Rotation, flips, anisotropic scale, shear and shift."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    scale = np.diag(rng.choice([-1, 1], 2) * 10 ** rng.uniform(-0.5, 0.5, 2))
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ scale @ [[1, rng.uniform(-0.5, 0.5)], [0, 1]]
    matrix[:2, 2] = rng.uniform(-50, 50, 2)
    return matrix


def apply(matrix, geometries):
    return [shapely.transform(g, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]) for g in geometries]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["circles", "polygons", "whole pixels"]))
def test_a_ramp_gives_the_centroid_under_any_affine(seed, kind):
    """A pixel's value is where its centre lies in the world: the mean over a shape is the shape's centroid.

    It is so exactly where shapes are made of whole pixels. A pixel that is covered in part counts at its centre, not at
    the centre of what is covered, which averages out along an outline.
    """
    rng = np.random.default_rng(seed)
    to_world, shapes_to_world = random_affine(rng), random_affine(rng)
    pixels_to_own = np.linalg.inv(shapes_to_world) @ to_world

    def register(matrix):
        return {"world": Affine(matrix, ("x", "y"), ("x", "y"))}

    y, x = np.mgrid[:60, :70] + 0.5
    world = np.einsum("ij,jyx->iyx", to_world, np.stack([x, y, np.ones_like(x)]))[:2]
    image = Image2DModel.parse(
        world,
        dims=("c", "y", "x"),
        c_coords=["x", "y"],
        chunks=(1, 25, 33),
        transformations=register(to_world),
        scale_factors=[2] if seed % 2 else None,
    )
    centres, radius = rng.uniform(25, 35, (8, 2)), rng.uniform(4, 20, 8)
    if kind == "circles":
        own = centres @ pixels_to_own[:2, :2].T + pixels_to_own[:2, 2]
        smallest, largest = np.linalg.svd(np.linalg.inv(pixels_to_own[:2, :2]), compute_uv=False)[::-1]
        frame = gpd.GeoDataFrame(
            {"geometry": shapely.points(own), "radius": np.maximum(4 / smallest, radius / largest)}
        )
        frame["radius"] = np.minimum(frame["radius"], 22 / largest)
        element, expected, off = ShapesModel.parse(frame, transformations=register(shapes_to_world)), centres, 0.1
    else:
        if kind == "polygons":
            geometries = [
                shapely.Point(p).buffer(r, 2).difference(shapely.Point(p + r / 3).buffer(r / 4, 3))
                for p, r in zip(centres, radius)
            ]
            off = 0.1
        else:
            squares = rng.integers(5, 50, (8, 30, 2))
            geometries = [shapely.union_all(shapely.box(*s.T, *(s + 3).T)) for s in squares]
            off = 1e-6
        element = polygons(apply(pixels_to_own, geometries), transformations=register(shapes_to_world))
        expected = np.array([[g.centroid.x, g.centroid.y] for g in geometries])
    made = SpatialData(images={"im": image}, shapes={"s": element})
    table = aggregate(made, "s", image_key="im", inplace=False)
    in_world = expected @ to_world[:2, :2].T + to_world[:2, 2]
    np.testing.assert_allclose(table.obsm["spatial"], in_world, atol=1e-6)
    np.testing.assert_allclose(table.obs["coverage"], 1)
    from_world = np.linalg.inv(to_world)
    found = table.X.astype(float) @ from_world[:2, :2].T + from_world[:2, 2]
    np.testing.assert_allclose(found, expected, atol=off + 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_partition_adds_up_to_the_whole(seed):
    rng = np.random.default_rng(seed)
    data = gene_map(seed)
    parts = shapely.get_parts(
        shapely.voronoi_polygons(
            shapely.MultiPoint(rng.uniform(0, 64, (25, 2))), extend_to=shapely.box(-5, -5, W + 5, H + 5)
        )
    )
    made = SpatialData(
        images={"m": Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=[*GENES, TOTAL], chunks=(4, 20, 30))},
        shapes={"parts": polygons(parts), "all": polygons([shapely.box(0, 0, W, H)])},
    )
    write_mpp(made, "m", 0.7)
    tables = aggregate(made, ["parts", "all"], agg_func="sum", inplace=False)
    whole = np.nansum(data[:-1].astype(np.float64), axis=(1, 2)) * 0.49
    np.testing.assert_allclose(np.nansum(tables["parts"].layers["sum"], axis=0), whole, rtol=1e-5)
    np.testing.assert_allclose(tables["all"].layers["sum"][0], whole, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_chunks_and_order_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    data = gene_map(seed)
    cells = [shapely.Point(p).buffer(r, 3) for p, r in zip(rng.uniform(0, 70, (20, 2)), rng.uniform(0.1, 15, 20))]
    found = []
    for chunks in ((4, 64, 80), (1, 7, 9), (3, 64, 11)):
        order = rng.permutation(20)
        made = SpatialData(
            images={"m": Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=[*GENES, TOTAL], chunks=chunks)},
            shapes={"s": polygons([cells[i] for i in order], order)},
        )
        table = aggregate(made, "s", agg_func=["mean", "std", "max"], inplace=False)
        found.append(table[[str(i) for i in range(20)]])
    for other in found[1:]:
        np.testing.assert_allclose(other.X, found[0].X, rtol=1e-6)
        np.testing.assert_allclose(other.layers["std"], found[0].layers["std"], rtol=1e-5)
        np.testing.assert_array_equal(other.layers["max"], found[0].layers["max"])


def test_the_same_as_exactextract():
    exactextract = pytest.importorskip("exactextract")
    from exactextract.raster import NumPyRasterSource

    rng = np.random.default_rng(3)
    data = rng.random((2, 200, 220)).astype(np.float32)
    cells = []
    for p, r in zip(rng.uniform(0, 200, (150, 2)), 10 ** rng.uniform(-1, 1.6, 150)):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        shape = shapely.Polygon(
            p + r * rng.uniform(0.4, 1, 12)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
        )
        shape = shapely.make_valid(shape).difference(shapely.Point(p).buffer(r / 6))
        cells.append(max(shapely.get_parts(shape), key=lambda part: part.area))
    centres, radius = rng.uniform(30, 170, (50, 2)), 10 ** rng.uniform(-1, 1.4, 50)
    made = SpatialData(
        images={"im": Image2DModel.parse(data, dims=("c", "y", "x"), chunks=(1, 64, 64))},
        shapes={"cells": polygons(cells), "spots": circles(centres, radius)},
    )
    tables = aggregate(made, ["cells", "spots"], image_key="im", agg_func=["mean", "std", "min", "max"], inplace=False)
    discs = [shapely.Point(p).buffer(r, quad_segs=500) for p, r in zip(centres, radius)]
    for name, geometries in (("cells", cells), ("spots", discs)):
        # Its y axis points up.
        features = gpd.GeoDataFrame(
            {"geometry": [shapely.transform(g, lambda xy: xy * [1, -1] + [0, 200]) for g in geometries]}
        )
        for c in range(2):
            raster = NumPyRasterSource(data[c].astype(np.float64), 0, 0, 220, 200)
            oracle = exactextract.exact_extract(
                raster, json.loads(features.to_json())["features"], ["mean", "stdev", "min", "max"], output="pandas"
            )
            seen = oracle["mean"].notna().to_numpy()
            table = tables[name]
            assert (np.isnan(table.X[:, c]) == ~seen).all()
            np.testing.assert_allclose(table.X[seen, c], oracle["mean"][seen], atol=1e-5)
            np.testing.assert_allclose(table.layers["std"][seen, c], oracle["stdev"][seen], atol=2e-4)
            if name == "cells":
                np.testing.assert_allclose(table.layers["min"][seen, c], oracle["min"][seen], atol=1e-6)
                np.testing.assert_allclose(table.layers["max"][seen, c], oracle["max"][seen], atol=1e-6)


def test_more_shapes_than_sixteen_bits_count():
    image = Image2DModel.parse(np.ones((1, 300, 300), np.float32), dims=("c", "y", "x"))
    y, x = np.mgrid[:300, :300].reshape(2, -1)
    made = SpatialData(images={"im": image}, shapes={"s": polygons(shapely.box(x, y, x + 1, y + 1))})
    table = aggregate(made, "s", image_key="im", inplace=False)
    assert len(table) == 90_000
    assert (table.X == 1).all()


# bad input ---------------------------------------------------------------------------------------------------------


def check_refused(sdata, error, message, *args, **kwargs):
    before = json.dumps(sdata.attrs), [name for _, name, _ in sdata.gen_elements()]
    with pytest.raises(error, match=message):
        aggregate(sdata, *args, **kwargs)
    assert (json.dumps(sdata.attrs), [name for _, name, _ in sdata.gen_elements()]) == before


@pytest.mark.parametrize(
    ("error", "message", "shapes", "arguments"),
    [
        (KeyError, "'nuclei'.*'spots'", "nuclei", {}),
        (KeyError, "'he'.*'he_genes'", "spots", {"image_key": "he"}),
        (TypeError, "shapes", 3, {}),
        (ValueError, "shapes is empty", [], {}),
        (ValueError, "twice", ["spots", "spots"], {}),
        (KeyError, "'ACTG'.*'ACTB'", "spots", {"genes": ["ACTB", "ACTG"]}),
        (ValueError, "__total__.*not a gene", "spots", {"genes": ["__total__"]}),
        (ValueError, "genes is empty", "spots", {"genes": []}),
        (ValueError, "more than once: ACTB", "spots", {"genes": ["ACTB", "ACTB"]}),
        (TypeError, "genes", "spots", {"genes": 5}),
        (ValueError, "'q100'; valid: 'mean'", "spots", {"agg_func": ["mean", "q100"]}),
        (ValueError, "'mode'; valid: 'mean'", "spots", {"agg_func": "mode"}),
        (ValueError, "different", "spots", {"agg_func": ["mean", "mean"]}),
        (ValueError, "one or several", "spots", {"agg_func": []}),
        (TypeError, "agg_func", "spots", {"agg_func": np.mean}),
        (ValueError, "'area', 'center'", "spots", {"weights": "exact"}),
        (ValueError, "min_coverage", "spots", {"min_coverage": 1.5}),
        (TypeError, "min_coverage", "spots", {"min_coverage": "half"}),
        (ValueError, "'elsewhere' is not shared", "spots", {"coordinate_system": "elsewhere"}),
        (ValueError, "one name for 2 tables", ["spots", "cells"], {"key_added": "both"}),
        (KeyError, "'bins'", "spots", {"key_added": {"bins": "b"}}),
        (ValueError, "two tables one name", ["spots", "cells"], {"key_added": {"spots": "a", "cells": "a"}}),
        (TypeError, "key_added", "spots", {"key_added": 5}),
        (ValueError, "exists as one of the object's shapes", "spots", {"key_added": "cells", "overwrite": True}),
        (ValueError, "letters", "spots", {"key_added": "a/b"}),
    ],
)
def test_bad_arguments(sdata, error, message, shapes, arguments):
    check_refused(sdata, error, message, shapes, **arguments)


def test_bad_elements(sdata):
    with pytest.raises(TypeError, match="SpatialData"):
        aggregate(sdata["he_genes"], "spots")
    sdata["transcripts"] = PointsModel.parse(pd.DataFrame({"x": [1.0, 2], "y": [1.0, 2]}))
    check_refused(sdata, ValueError, "points have no area", "transcripts")
    sdata["far"] = polygons([shapely.box(0, 0, 1, 1)], transformations={"other": Identity()})
    check_refused(sdata, ValueError, "share no coordinate system", "far")
    sdata["tie"] = polygons(
        [shapely.box(0, 0, 1, 1), shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])], ["good", "bad"]
    )
    check_refused(sdata, ValueError, "invalid.*'bad'", ["spots", "tie"])
    sdata["twins"] = polygons([shapely.box(0, 0, 1, 1)] * 2, [4, 4])
    check_refused(sdata, ValueError, "duplicate ids: 4", "twins")
    sdata["flat"] = polygons([shapely.box(0, 0, 1, 1)])
    set_transformation(sdata["flat"], Scale([0.0, 1.0], axes=("x", "y")))
    check_refused(sdata, ValueError, "'flat'.*cannot be inverted", "flat")
    sdata["nothing"] = Labels2DModel.parse(np.zeros((9, 9), int), dims=("y", "x"))
    check_refused(sdata, ValueError, "'nothing' is empty", "nothing")


def test_elements_of_three_dimensions(sdata):
    tall = gpd.GeoDataFrame({"geometry": [shapely.box(0, 0, 1, 1), shapely.force_3d(shapely.box(0, 0, 1, 1), 2)]})
    tall.index, tall.attrs = ["a", "tall"], sdata["cells"].attrs
    sdata.shapes.data["tall"] = tall  # spatialdata itself would refuse some of these
    check_refused(sdata, ValueError, "z coordinates: 'tall'.*force_2d", "tall")
    sdata["stack"] = Image3DModel.parse(np.zeros((1, 2, 9, 9)), dims=("c", "z", "y", "x"))
    check_refused(sdata, ValueError, "'stack' has dimensions.*2D", "spots", image_key="stack")
    sdata["volume"] = Labels3DModel.parse(np.ones((2, 9, 9), int), dims=("z", "y", "x"))
    check_refused(sdata, ValueError, "'volume' have dimensions.*2D", ["spots", "volume"])


class Warp(Identity):
    """A transformation that is not affine, as a later version of spatialdata may have them."""

    def to_affine_matrix(self, input_axes, output_axes):
        raise NotImplementedError


@pytest.mark.parametrize("warped", ["cells", "regions", "he_genes"])
def test_transformations_that_are_not_affine(sdata, warped):
    set_transformation(sdata[warped], Warp())
    check_refused(
        sdata, ValueError, f"transformation of '{warped}' to 'global' is not affine .Warp", ["cells", "regions"]
    )


def test_what_is_refused_leaves_the_store_as_it_was(sdata, tmp_path):
    sdata["tie"] = polygons([shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])], ["bad"])
    sdata["far"] = polygons([shapely.box(0, 0, 1, 1)], transformations={"other": Identity()})
    sdata["second"] = sdata["he_genes"]
    sdata.write(tmp_path / "s.zarr")
    opened = sd.read_zarr(tmp_path / "s.zarr")
    opened["cells"].index = [*opened["cells"].index[:-2], "twin", "twin"]

    def content():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    for error, message, shapes, arguments in [
        (KeyError, "'nuclei'", "nuclei", {}),
        (ValueError, "share no coordinate system", ["spots", "far"], {}),
        (ValueError, "invalid.*'bad'", ["spots", "tie"], {}),
        (ValueError, "duplicate ids: 'twin'", ["spots", "cells"], {}),
        (KeyError, "'ACTG'", "spots", {"genes": ["ACTG"]}),
        (ValueError, "taken|exists", "spots", {"key_added": "bins"}),
    ]:
        check_refused(opened, error, message, shapes, image_key="he_genes", **arguments)
    opened.attrs = {}
    check_refused(opened, ValueError, "several.*'he_genes', 'second'", "spots")
    assert content() == before


def test_bad_images(sdata):
    sdata["second"] = sdata["he_genes"]
    del sdata.attrs["pixnet"]
    check_refused(sdata, ValueError, "several.*'he_genes', 'second'", "spots")
    del sdata.images["second"], sdata.images["he_genes"]
    check_refused(sdata, ValueError, "no gene map.*tl.predict", "spots")
    sdata.images["none"] = Image2DModel.parse(np.zeros((1, 9, 9)), dims=("c", "y", "x")).isel(c=slice(0, 0))
    check_refused(sdata, ValueError, "no channels", "spots", image_key="none")
    check_refused(sdata, KeyError, "no image 'regions'", "spots", image_key="regions")
    sdata["alone"] = Image2DModel.parse(np.ones((1, 9, 9)), dims=("c", "y", "x"), c_coords=[TOTAL])
    check_refused(sdata, ValueError, "'alone' contains no genes", "spots", image_key="alone")
    sdata["twice"] = Image2DModel.parse(np.zeros((2, 9, 9)), dims=("c", "y", "x")).assign_coords(c=["a", "a"])
    check_refused(sdata, ValueError, "one name: 'a'", "spots", image_key="twice")


def test_all_checks_come_before_any_pixel_is_read(sdata):
    def fail(block):
        raise AssertionError("a pixel was read")

    lazy = da.map_blocks(fail, sdata["he_genes"].data, dtype=np.float32, meta=np.zeros((0, 0, 0), np.float32))
    sdata["lazy"] = Image2DModel.parse(lazy, dims=("c", "y", "x"), c_coords=[*GENES, TOTAL])
    sdata["watched"] = Labels2DModel.parse(
        da.map_blocks(fail, da.zeros((9, 9), dtype=int), dtype=int, meta=np.zeros((0, 0), int)), dims=("y", "x")
    )
    sdata["twins"] = polygons([shapely.box(0, 0, 1, 1)] * 2, [4, 4])
    check_refused(sdata, ValueError, "duplicate", ["watched", "twins"], image_key="lazy")
    check_refused(sdata, KeyError, "XYZ", "watched", image_key="lazy", genes=["XYZ"])
    aggregate(sdata, "spots", image_key="he_genes")
    check_refused(sdata, ValueError, "overwrite=True", ["watched", "spots"], image_key="lazy")


def test_a_table_that_cannot_be_stored_leaves_nothing(sdata, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("pixnet._sdata.store.element_store.put", full)
    check_refused(sdata, OSError, "no space", "spots")
    assert "spots_genes" not in sdata
