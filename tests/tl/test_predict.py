"""tl.predict: the element it gives, what it refuses, and that no interruption harms a store."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import dask.array as da
import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
import torch
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import (
    Affine,
    Identity,
    Scale,
    get_transformation,
    remove_transformation,
    set_transformation,
)

import pixnet as px
from pixnet._core.predict.portable_model import clear_cache
from pixnet._logging import logger
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names

GENES = ["A", "B", "C"]
SHAPE = (500, 620)


@pytest.fixture(autouse=True)
def _quiet():
    threads, progress = torch.get_num_threads(), px.settings.progress
    torch.set_num_threads(1)
    px.settings.progress = False
    yield
    torch.set_num_threads(threads)
    px.settings.progress = progress


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    net = px.models.PixNet(GENES, mpp=0.5, pretrained=False, window=64, halo=64)
    torch.nn.init.normal_(net.members[0].last.weight, std=0.5)
    return net.eval()


def slide(shape=SHAPE, mpp=0.5, tissue=True):
    rng = np.random.default_rng(1)
    pixels = rng.integers(90, 220, (3, *shape), dtype=np.uint8)
    image = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        scale_factors=(2,) if min(shape) > 1 else None,
        chunks=(3, 128, 128),
        transformations={"global": Identity(), "um": Scale([mpp, mpp], axes=("x", "y"))},
    )
    sdata = SpatialData(images={"he": image})
    px.pp.set_mpp(sdata, "he", mpp)
    if tissue:
        mask = np.zeros((shape[0] // 10, shape[1] // 10), np.uint8)
        mask[5:30, 8:50] = 1
        sdata["he_tissue"] = Labels2DModel.parse(
            mask,
            dims=("y", "x"),
            transformations={
                "global": Scale([10, 10], axes=("x", "y")),
                "um": Scale([10 * mpp, 10 * mpp], axes=("x", "y")),
            },
        )
    return sdata


@pytest.fixture
def sdata():
    return slide()


@pytest.fixture
def backed(tmp_path):
    slide().write(tmp_path / "s.zarr")
    return sd.read_zarr(tmp_path / "s.zarr")


def full(sdata, key="he_genes"):
    return sdata[key]["scale0"]["image"]


def tree_hash(path):
    """Names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# what it gives -----------------------------------------------------------------------------------------------------


def test_map_of_an_object_in_memory(sdata, model):
    assert px.tl.predict(sdata, model) is None
    found = full(sdata)
    assert found.dims == ("c", "y", "x")
    assert found.shape == (4, 125, 155)
    assert found.dtype == np.float32
    assert list(found.coords["c"].values) == [*GENES, "__total__"]
    tissue = np.zeros((125, 155), bool)
    tissue[13:75, 20:125] = True  # 12.5 rounds to the pixel that is half tissue
    tissue[12] = tissue[13]
    np.testing.assert_array_equal(~np.isnan(found.values), np.broadcast_to(tissue, found.shape))
    assert (found.values[:, tissue] >= 0).all()
    entry = sdata.attrs["pixnet"]["images"]["he_genes"]
    assert (entry["kind"], entry["image_key"], entry["genes"]) == ("gene_map", "he", GENES)
    assert find_mpp(sdata, "he_genes") == 2.0
    assert not sdata.is_backed()


def test_map_of_a_backed_object(backed, model):
    px.tl.predict(backed, model)
    again = sd.read_zarr(backed.path)
    np.testing.assert_array_equal(full(again).values, full(backed).values)
    assert again.attrs["pixnet"]["images"]["he_genes"] == backed.attrs["pixnet"]["images"]["he_genes"]
    assert backed.is_self_contained("he_genes")
    assert list(again["he_genes"].children) == ["scale0", "scale1", "scale2"]
    assert not (backed.path / ".pixnet").exists()


def test_it_lies_where_the_slide_does(sdata, model):
    px.tl.predict(sdata, model, mask_key=False)
    for system in ("global", "um"):
        of_slide, of_map = (sd.get_extent(sdata[k], coordinate_system=system) for k in ("he", "he_genes"))
        np.testing.assert_allclose(list(of_slide.values()), list(of_map.values()))


def test_values_are_the_models(sdata, model):
    px.tl.predict(sdata, model, mask_key=False, precision="float32")
    pixels = sdata["he"]["scale0"]["image"].values
    i, j = 2, 3  # any window: read with its halo, by hand
    part = np.full((3, 192, 192), 255, np.uint8)
    part[:] = pixels[:, i * 64 - 64 : i * 64 + 128, j * 64 - 64 : j * 64 + 128]
    with torch.no_grad():
        expected = model(torch.from_numpy(part)[None].float() / 255)[0, :, 16:-16, 16:-16].numpy()
    found = full(sdata).values[:, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_lazy_equals_stored_and_writes_nothing(backed, model, monkeypatch):
    before = tree_hash(backed.path)
    lazy = px.tl.predict(backed, model, inplace=False)
    assert isinstance(lazy.data, da.Array)
    assert "he_genes" not in backed
    assert "pixnet" not in backed.attrs
    assert tree_hash(backed.path) == before
    px.tl.predict(backed, model)
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous").values, full(backed).values)
    np.testing.assert_allclose(lazy.values, full(backed).values, rtol=1e-5)  # dask's threads may have other settings
    assert get_transformation(lazy, get_all=True).keys() == {"global", "um", "pixnet_um"}
    np.testing.assert_array_equal(
        get_transformation(lazy, "um").to_affine_matrix(("x", "y"), ("x", "y")), np.diag([2.0, 2.0, 1.0])
    )


def test_a_lazy_map_can_be_aggregated(backed, model):
    px.pp.make_grid(backed, 50, image_key="he")
    px.tl.predict(backed, model)
    stored = px.tl.aggregate(backed, "grid", image_key="he_genes", inplace=False)
    other = sd.read_zarr(backed.path)
    other["lazy"] = px.tl.predict(other, model, inplace=False)
    lazy = px.tl.aggregate(other, "grid", image_key="lazy", inplace=False)
    np.testing.assert_allclose(lazy.X, stored.X, rtol=1e-5)


@pytest.mark.parametrize("tile_size", [1, 256, 512, 1024])
def test_tile_size_does_not_matter(sdata, model, tile_size):
    px.tl.predict(sdata, model, precision="float32")
    px.tl.predict(sdata, model, precision="float32", tile_size=tile_size, key_added="other")
    one, other = full(sdata).values, full(sdata, "other").values
    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
    np.testing.assert_allclose(other, one, rtol=1e-3)


def test_the_same_call_gives_the_same_bytes(backed, model):
    for key in ("a", "b"):
        px.tl.predict(backed, model, key_added=key)
    chunks = [tree_hash(backed.path / "images" / key / "s0") for key in ("a", "b")]
    assert chunks[0] == chunks[1]


def test_chunks_of_the_image_do_not_matter(model):
    one, other = slide(), slide()
    pixels = one["he"]["scale0"]["image"].values
    system = {"global": Identity(), "um": Scale([0.5, 0.5], axes=("x", "y"))}
    other["he"] = Image2DModel.parse(
        da.from_array(pixels, chunks=(1, 77, 311)), dims=("c", "y", "x"), transformations=system
    )
    px.pp.set_mpp(other, "he", 0.5)
    for sdata in (one, other):
        px.tl.predict(sdata, model)
    np.testing.assert_array_equal(full(one).values, full(other).values)


def test_genes_are_picked_in_order(sdata, model):
    px.tl.predict(sdata, model, precision="float32")
    px.tl.predict(sdata, model, precision="float32", genes=["C", "A"], key_added="some")
    np.testing.assert_allclose(full(sdata, "some").values, full(sdata).values[[2, 0, 3]], rtol=1e-5)
    assert list(full(sdata, "some").coords["c"].values) == ["C", "A", "__total__"]


def test_coarser_maps(sdata, model):
    px.tl.predict(sdata, model, mask_key=False)
    px.tl.predict(sdata, model, mask_key=False, out_mpp=10, key_added="coarse")
    fine, coarse = full(sdata).values, full(sdata, "coarse").values
    assert coarse.shape == (4, 25, 31)
    np.testing.assert_allclose(coarse, fine.reshape(4, 25, 5, 31, 5).mean(axis=(2, 4)), rtol=1e-5)
    assert find_mpp(sdata, "coarse") == pytest.approx(10)


def as_element(sdata, polygon, scale=2.0):
    """The polygon as an element of other units than pixels."""
    frame = gpd.GeoDataFrame(geometry=[shapely.transform(polygon, lambda xy: xy / scale)])
    return ShapesModel.parse(frame, transformations={"global": Scale([scale, scale], axes=("x", "y"))})


@pytest.mark.parametrize("how", ["box", "polygon", "frame", "element"])
@pytest.mark.parametrize("out_mpp", [None, 5.3])
def test_a_region_has_the_values_of_the_whole_map(sdata, model, how, out_mpp):
    polygon = shapely.Polygon([(101, 90), (330, 141), (333, 260), (180, 207)])
    if how == "box":
        region = polygon.bounds
        polygon = shapely.box(*region)
    elif how == "polygon":
        region = polygon
    else:
        sdata["part"] = as_element(sdata, polygon)
        region = "part" if how == "element" else sdata["part"]
    given = {"precision": "float32", "out_mpp": out_mpp}
    px.tl.predict(sdata, model, **given)
    px.tl.predict(sdata, model, region=region, key_added="of_part", **given)
    whole, found = full(sdata).values, full(sdata, "of_part").values
    pixel = (out_mpp or 2) / 0.5
    y, x = np.indices(whole.shape[1:]) * pixel
    touched = shapely.area(shapely.intersection(polygon, shapely.box(x, y, x + pixel, y + pixel))) > 1e-9
    np.testing.assert_array_equal(~np.isnan(found), ~np.isnan(whole) & touched)
    np.testing.assert_allclose(found[:, touched], whole[:, touched], rtol=1e-4)
    if how == "element":  # all that the shapes need is there
        one, other = (px.tl.aggregate(sdata, "part", image_key=k, inplace=False) for k in ("he_genes", "of_part"))
        np.testing.assert_allclose(one.X, other.X, rtol=1e-5)


def test_regions_are_lazy_too_and_resume_only_the_same(sdata, model):
    box = (100, 90, 330, 260)
    px.tl.predict(sdata, model, region=box)
    lazy = px.tl.predict(sdata, model, region=box, inplace=False)
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous").values, full(sdata).values)
    with pytest.raises(ValueError, match="no tissue of image 'he' lies in region="):
        px.tl.predict(sdata, model, region=(600, 480, 620, 500), overwrite=True)
    assert sdata.attrs["pixnet"]["images"]["he_genes"]["region"]["box"] == list(box)


class Near(torch.nn.Module):
    """An encoder that sees blocks of 16 px."""

    strides, channels = (4, 16), (4, 6)

    def __init__(self):
        super().__init__()
        self.fine, self.deep = torch.nn.Conv2d(3, 4, 4, stride=4), torch.nn.Conv2d(4, 6, 4, stride=4)

    def forward(self, image):
        fine = self.fine(image)
        return [fine, self.deep(fine)]


@pytest.mark.parametrize(("y", "x"), [(37, 53), (64, 128)])
def test_a_crop_has_the_values_of_the_slide_that_it_was_cut_from(y, x):
    torch.manual_seed(0)
    net = px.models.PixNet(GENES, mpp=0.5, encoder=Near(), window=64, halo=64).eval()
    torch.nn.init.normal_(net.members[0].last.weight, std=0.5)
    sdata = slide()
    px.tl.predict(sdata, net, mask_key=False, precision="float32")
    box = {"min_coordinate": [y, x], "max_coordinate": [y + 300, x + 401], "target_coordinate_system": "global"}
    crop = sd.bounding_box_query(sdata, axes=("y", "x"), **box)
    px.tl.predict(crop, net, mask_key=False, precision="float32", key_added="again")
    found, matrix = full(crop, "again").values, get_transformation(crop["again"], "global")
    matrix = matrix.to_affine_matrix(("y", "x"), ("y", "x"))
    np.testing.assert_array_equal(np.diag(matrix), [4, 4, 1])
    assert ((matrix[:2, 2] % 64 == 0) & (matrix[:2, 2] <= [y, x])).all()
    i, j = (matrix[:2, 2] // 4).astype(int)
    whole = full(sdata).values[:, i : i + found.shape[1], j : j + found.shape[2]]
    inner = np.s_[:, 28 : 28 + 36, 28 : 28 + 60]  # what lies near the edge of a crop sees white beyond it
    np.testing.assert_allclose(found[inner], whole[inner], rtol=1e-4)
    outside = np.add.outer(np.arange(found.shape[1]) * 4 + matrix[0, 2] < y - 2, np.zeros(found.shape[2], bool))
    assert np.isnan(found[:, outside]).all()


def test_masks_of_any_affine(sdata, model):
    turned = Affine([[0, 10, 0], [10, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    mask = sdata["he_tissue"].values.T.copy()
    sdata["turned"] = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"global": turned})
    px.tl.predict(sdata, model)
    px.tl.predict(sdata, model, mask_key="turned", key_added="b")
    np.testing.assert_array_equal(full(sdata).values, full(sdata, "b").values)


def test_a_missing_mask_is_computed_and_not_kept(model):
    sdata = px.datasets.synthetic_tissue(size_um=150, n_genes=5)
    for key in list(sdata.labels):
        del sdata[key]
    px.tl.predict(sdata, model)
    assert not list(sdata.labels)
    assert (~np.isnan(full(sdata).values)).any()


def test_one_level(sdata, model):
    px.tl.predict(sdata, model, scale_factors=())
    assert sdata["he_genes"].shape == (4, 125, 155)


def test_precision_bfloat16_is_close(sdata, model):
    for precision in ("float32", "bfloat16"):
        px.tl.predict(sdata, model, precision=precision, key_added=precision)
    a, b = full(sdata, "float32").values, full(sdata, "bfloat16").values
    assert np.nanmedian(np.abs(a - b) / a) < 0.05


def test_overwrite(backed, model):
    px.tl.predict(backed, model)
    with pytest.raises(ValueError, match="'he_genes' exists.*overwrite=True"):
        px.tl.predict(backed, model)
    px.tl.predict(backed, model, genes=["B"], overwrite=True)
    assert full(sd.read_zarr(backed.path)).shape[0] == 2


def test_a_checkpoint_and_the_shipped_model(sdata, model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    px.tl.predict(sdata, tmp_path / "m.safetensors")
    px.tl.predict(sdata, model, key_added="b")
    np.testing.assert_array_equal(full(sdata).values, full(sdata, "b").values)
    assert sdata.attrs["pixnet"]["images"]["he_genes"]["model"] == "m"


def test_slides_finer_and_coarser_than_the_model(model, monkeypatch):
    warned = []
    monkeypatch.setattr(logger, "warning", lambda text, *args: warned.append(text % args))
    fine, coarse = (slide((250, 310), mpp, tissue=False) for mpp in (0.25, 0.8))
    px.tl.predict(fine, model, mask_key=False)
    assert full(fine).shape == (4, 32, 39)
    assert not warned
    px.tl.predict(coarse, model, mask_key=False)
    assert full(coarse).shape == (4, 100, 124)
    assert "enlarged" in warned[0]
    with pytest.raises(ValueError, match="more than 2 times coarser"):
        px.tl.predict(slide(mpp=1.1), model)


def test_a_foreign_stain_is_named(sdata, model, monkeypatch):
    warned = []
    monkeypatch.setattr(logger, "warning", lambda text, *args: warned.append(text % args))
    own = px.models.PixNet(GENES, mpp=0.5, pretrained=False, window=64, halo=64)
    own.stain = [{"od_mean": [0.22, 0.22, 0.22], "od_sd": [0.11, 0.11, 0.11]}]
    px.tl.predict(sdata, own)
    assert not warned
    own.stain = [{"od_mean": [0.22, 0.9, 0.22], "od_sd": [0.11, 0.11, 0.11]}]
    px.tl.predict(sdata, own, key_added="b")
    assert "mean optical density in green is 0.2" in warned[0]
    assert "in red" not in warned[0]


@pytest.mark.parametrize(("quantity", "total"), [("density", "__total__"), ("log_sum", "__total_log_sum__")])
@pytest.mark.parametrize("inplace", [True, False])
def test_the_total_tells_what_the_values_are(sdata, quantity, total, inplace):
    own = px.models.PixNet(GENES, mpp=0.5, pretrained=False, window=64, halo=64, quantity=quantity)
    found = px.tl.predict(sdata, own, inplace=inplace)
    assert channel_names(sdata["he_genes"] if inplace else found) == [*GENES, total]


def test_a_huge_slide_is_a_graph_in_no_time(model):
    def unread(block_info=None):
        read.append(block_info)
        return np.full(block_info[None]["chunk-shape"], 128, np.uint8)

    read: list[object] = []
    pixels = da.map_blocks(
        unread, chunks=((3,), (4096,) * 24 + (1696,), (4096,) * 24 + (1696,)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )  # fmt: skip
    mask = np.zeros((1250, 1250), np.uint8)
    mask[100:900, 200:800] = 1
    sdata = SpatialData(
        images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        labels={
            "he_tissue": Labels2DModel.parse(
                mask, dims=("y", "x"), transformations={"global": Scale([80, 80], axes=("x", "y"))}
            )
        },
    )
    px.pp.set_mpp(sdata, "he", 0.5)
    big = px.models.PixNet([f"g{i}" for i in range(250)], mpp=0.5, pretrained=False)
    start = time.perf_counter()
    lazy = px.tl.predict(sdata, big, inplace=False)
    seconds = time.perf_counter() - start
    assert lazy.shape == (251, 25_000, 25_000)
    assert seconds < 30
    assert len(lazy.data.dask) <= 5 * lazy.data.npartitions
    assert lazy.data.npartitions == 98**2
    assert len(read) <= 16 * 4  # a look at the stain: none of the tiles ran


# what it refuses, before any pixel is read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"image_key": "no"}, KeyError, "'he'"),
        ({"genes": ["A", "Z"]}, KeyError, "'Z' is not in the model.*'A', 'B', 'C'"),
        ({"genes": ["A", "A"]}, ValueError, "more than once"),
        ({"genes": ["__total__"]}, ValueError, "__total__"),
        ({"genes": 5}, TypeError, "list of names"),
        ({"mask_key": "no"}, KeyError, "he_tissue"),
        ({"mask_key": True}, TypeError, "mask_key"),
        ({"out_mpp": 0.5}, ValueError, "cannot be finer"),
        ({"out_mpp": -1}, ValueError, "positive"),
        ({"tile_size": 0}, ValueError, "tile_size"),
        ({"tile_size": "big"}, TypeError, "tile_size"),
        ({"precision": "half"}, ValueError, "bfloat16"),
        ({"scale_factors": (1,)}, ValueError, "scale_factors"),
        ({"scale_factors": 2}, TypeError, "scale_factors"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"key_added": "he_tissue", "overwrite": True}, ValueError, "he_tissue"),
        ({"key_added": "he", "overwrite": True}, ValueError, "made from"),
        ({"resume": True, "inplace": False}, ValueError, "resume"),
        ({"region": "no"}, KeyError, "region="),
        ({"region": 3}, TypeError, "name of a shapes or labels element"),
        ({"region": (1, 2, 3)}, TypeError, "x0, y0, x1, y1"),
        ({"region": (5, 5, 5, 9)}, ValueError, "x0 < x1"),
        ({"region": shapely.Polygon()}, ValueError, "empty"),
        ({"region": shapely.LineString([(0, 0), (5, 5)])}, TypeError, "LineString"),
        ({"region": shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)])}, ValueError, "invalid"),
        ({"region": (700, 0, 900, 90)}, ValueError, "outside image 'he'.*x 0 to 620"),
        ({"region": gpd.GeoDataFrame(geometry=[])}, ValueError, "empty"),
        ({"model": 3}, TypeError, "PixNet"),
        ({"model": "nowhere.safetensors"}, FileNotFoundError, "nowhere"),
    ],
)
def test_refusals(model, arguments, error, match):
    def unread(block_info=None):
        raise AssertionError("a pixel was read")

    pixels = da.map_blocks(unread, chunks=((3,), (500,), (620,)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    sdata = slide()
    sdata["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    px.pp.set_mpp(sdata, "he", 0.5)
    arguments = {"model": model, **arguments}
    with pytest.raises(error, match=match):
        px.tl.predict(sdata, **arguments)


def test_the_pixel_size_must_be_known(sdata, model):
    remove_transformation(sdata["he"], "pixnet_um")
    with pytest.raises(ValueError, match="set_mpp"):
        px.tl.predict(sdata, model)


def test_no_tissue(sdata, model):
    sdata["he_tissue"] = Labels2DModel.parse(np.zeros((50, 62), np.uint8), dims=("y", "x"))
    with pytest.raises(ValueError, match="no tissue.*mask_key=False"):
        px.tl.predict(sdata, model)
    away = slide()
    set_transformation(
        away["he_tissue"], Affine([[10, 0, 9e4], [0, 10, 0], [0, 0, 1]], ("x", "y"), ("x", "y")), "global"
    )
    with pytest.raises(ValueError, match="no tissue.*outside"):
        px.tl.predict(away, model)


def test_no_tissue_found_names_the_rule_and_the_pixel_size(model):
    glass = slide(tissue=False)
    glass["he"] = Image2DModel.parse(np.full((3, 64, 64), 240, np.uint8), dims=("c", "y", "x"))
    px.pp.set_mpp(glass, "he", 0.5)
    with pytest.raises(ValueError, match=r"32 x 32 µm at 0.5 µm/px: pieces smaller than 30,000 µm².*mask_key=False"):
        px.tl.predict(glass, model)


@pytest.mark.parametrize("shape", [(2, 4), (3, 150), (150, 3)])
@pytest.mark.parametrize("arguments", [{}, {"tile_size": 1}, {"scale_factors": (3, 2)}, {"inplace": False}])
def test_slides_of_few_pixels(model, shape, arguments):
    sdata = slide(shape, tissue=False)
    lazy = px.tl.predict(sdata, model, mask_key=False, **arguments)
    found = full(sdata).values if lazy is None else lazy.values
    assert found.shape == (4, *(-(-n // 4) for n in shape))
    # a pixel at the edge has a value when at least half of it lies on the slide
    inside = np.multiply.outer(*(np.clip(n - 4 * np.arange(-(-n // 4)), 0, 4) for n in shape)) >= 8
    np.testing.assert_array_equal(~np.isnan(found), np.broadcast_to(inside, found.shape))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("out_mpp", [None, 10])
def test_slides_thinner_than_half_a_map_pixel_are_refused(model, shape, out_mpp):
    with pytest.raises(ValueError, match=rf"no map pixel .* none of {out_mpp or 2} µm is.*out_mpp"):
        px.tl.predict(slide(shape, tissue=False), model, mask_key=False, out_mpp=out_mpp)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 31)])
def test_masks_of_few_pixels(sdata, model, shape):
    mask = np.zeros(shape, np.uint8)
    mask[0, 0] = 1
    system = Scale([620 / shape[1], 500 / shape[0]], axes=("x", "y"))
    sdata["m"] = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"global": system})
    px.tl.predict(sdata, model, mask_key="m")
    found = ~np.isnan(full(sdata).values[0])
    assert found[: 125 // shape[0], : 155 // shape[1]].all()
    assert found.mean() == pytest.approx(1 / np.prod(shape), rel=0.02)


def test_wrong_channels(model):
    sdata = slide()
    sdata["rgba"] = Image2DModel.parse(np.zeros((4, 64, 64), np.uint8), dims=("c", "y", "x"))
    with pytest.raises(ValueError, match="RGBA"):
        px.tl.predict(sdata, model, image_key="rgba")


def test_read_only_stores_are_refused(backed, model, monkeypatch):
    before = tree_hash(backed.path)

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"read-only.*sdata\.write"):
        px.tl.predict(backed, model)
    assert tree_hash(backed.path) == before
    assert px.tl.predict(backed, model, inplace=False).shape == (4, 125, 155)


def test_remote_and_old_stores_are_refused_but_can_be_predicted_from(tmp_path, model):
    from spatialdata._io.format import SpatialDataContainerFormatV01

    slide().write(tmp_path / "old.zarr", sdata_formats=SpatialDataContainerFormatV01())
    old = sd.read_zarr(tmp_path / "old.zarr")
    with pytest.raises(ValueError, match=r"old format \(Zarr v2\).*write"):
        px.tl.predict(old, model)
    lazy = px.tl.predict(old, model, inplace=False)
    old.write(tmp_path / "new.zarr")  # as the message says
    new = sd.read_zarr(tmp_path / "new.zarr")
    px.tl.predict(new, model)
    expected = lazy.compute(scheduler="synchronous").values
    np.testing.assert_array_equal(full(new).values, expected)
    old.path = None  # as an object in memory
    px.tl.predict(old, model)
    np.testing.assert_array_equal(full(old).values, expected)

    remote = slide()
    remote.path = "s3://bucket/slide.zarr"
    with pytest.raises(ValueError, match=r"s3://bucket/slide.zarr is remote.*sdata\.write"):
        px.tl.predict(remote, model)


def test_a_corrupt_chunk_is_named_and_the_run_resumed(backed, model):
    chunk = next(p for p in (backed.path / "images" / "he" / "s0").rglob("c/0/1/3") if p.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:50])
    with pytest.raises(RuntimeError, match=r"pixels y .* x .* of image 'he' could not be read.*resume=True"):
        px.tl.predict(backed, model)
    chunk.write_bytes(whole)
    px.tl.predict(backed, model, resume=True)
    assert "he_genes" in sd.read_zarr(backed.path)


# interruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """A process that a shell started in the background ignores Ctrl-C: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stopped_after(model, n, error=None):
    """Have a model stop at a window, and count its windows; Ctrl-C comes as it does, as a signal to the main thread."""
    windows = []

    def hook(module, arguments):
        windows.append(1)
        if len(windows) > n:
            if not isinstance(error, KeyboardInterrupt):
                raise error
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    handle = model.members[0].decoder.register_forward_pre_hook(hook)
    clear_cache()
    try:
        yield windows
    finally:
        handle.remove()
        clear_cache()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_interrupted_runs_resume_to_the_same_bytes(backed, model, error):
    px.tl.predict(backed, model, tile_size=64)
    expected = tree_hash(backed.path / "images" / "he_genes")
    with stopped_after(model, 9, error), pytest.raises(type(error)):
        px.tl.predict(backed, model, genes=["A", "B", "C"], tile_size=64, overwrite=True)
    assert tree_hash(backed.path / "images" / "he_genes") == expected  # the old one is whole
    assert "he_genes" in sd.read_zarr(backed.path)
    with stopped_after(model, 1000) as windows:
        px.tl.predict(backed, model, tile_size=64, overwrite=True, resume=True)
    assert 0 < len(windows) <= 40 - 6  # 40 tiles touch the tissue; what was done is left out
    assert tree_hash(backed.path / "images" / "he_genes") == expected
    assert not (backed.path / ".pixnet").exists()


def test_resume_with_other_arguments_is_refused(backed, model):
    with stopped_after(model, 5, RuntimeError("broken")), pytest.raises(RuntimeError, match="broken"):
        px.tl.predict(backed, model, tile_size=64)
    with pytest.raises(ValueError, match="other genes"):
        px.tl.predict(backed, model, tile_size=64, genes=["A"], resume=True)
    with pytest.raises(ValueError, match="other .*tile_size"):
        px.tl.predict(backed, model, tile_size=128, resume=True)
    torch.set_num_threads(2)  # which rounds differently
    with pytest.raises(ValueError, match="other .*threads"):
        px.tl.predict(backed, model, tile_size=64, resume=True)
    torch.set_num_threads(1)
    px.tl.predict(backed, model, tile_size=128)  # without resume it starts again, and clears
    assert not (backed.path / ".pixnet").exists()


def test_resume_with_nothing_to_resume(backed, model):
    px.tl.predict(backed, model, resume=True)
    assert "he_genes" in sd.read_zarr(backed.path)


def test_objects_in_memory_resume_too(sdata, model):
    px.tl.predict(sdata, model, tile_size=64, key_added="a")
    with stopped_after(model, 9, RuntimeError("broken")), pytest.raises(RuntimeError, match="broken"):
        px.tl.predict(sdata, model, tile_size=64)
    px.tl.predict(sdata, model, tile_size=64, resume=True)
    np.testing.assert_array_equal(full(sdata).values, full(sdata, "a").values)


KILLED = """
import sys, time
import numpy as np, spatialdata as sd, torch
import pixnet as px
torch.set_num_threads(1)
px.settings.progress = False
windows = []
def sleep(module, arguments):
    windows.append(1)
    if len(windows) > 8:
        print("half", flush=True)
        time.sleep(60)
model = px.models.load(sys.argv[2])
model.members[0].decoder.register_forward_pre_hook(sleep)
px.tl.predict(sd.read_zarr(sys.argv[1]), model, tile_size=64, overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_run_resumes_to_the_same_bytes(backed, model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    px.tl.predict(backed, tmp_path / "m.safetensors", tile_size=64)
    expected = tree_hash(backed.path / "images" / "he_genes")
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), str(backed.path), str(tmp_path / "m.safetensors")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline().strip() == b"half"
    with pytest.raises(RuntimeError, match="another process is writing 'he_genes'"):
        px.tl.predict(backed, tmp_path / "m.safetensors", tile_size=64, overwrite=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    opened = sd.read_zarr(backed.path)
    assert tree_hash(backed.path / "images" / "he_genes") == expected
    assert len(list((backed.path / ".pixnet").iterdir())) == 1
    (log,) = (backed.path / ".pixnet").glob("*/done.txt")
    assert 3 <= len(log.read_text().splitlines()) < 20
    log.write_text(log.read_text() + "3 ")  # as if killed within a line
    px.tl.predict(opened, tmp_path / "m.safetensors", tile_size=64, overwrite=True, resume=True)
    assert tree_hash(backed.path / "images" / "he_genes") == expected
    assert not (backed.path / ".pixnet").exists()


def test_a_full_disk_leaves_no_debris(backed, model, monkeypatch):
    px.tl.predict(backed, model, tile_size=64)
    expected = tree_hash(backed.path)
    original, count = zarr.Array.__setitem__, []

    def full_disk(self, key, value):
        count.append(1)
        if len(count) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full_disk)
        with pytest.raises(OSError, match=r"disk of .* is full.*deleted.*out_mpp") as caught:
            px.tl.predict(backed, model, tile_size=64, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert tree_hash(backed.path) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting needs root on Linux")
def test_a_really_full_disk(tmp_path, model):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        slide().write(disk / "s.zarr")
        sdata = sd.read_zarr(disk / "s.zarr")
        before = tree_hash(sdata.path)
        big = px.models.PixNet([f"g{i}" for i in range(200)], mpp=0.5, pretrained=False, window=64, halo=64)
        with pytest.raises(OSError, match="disk of .* is full"):
            px.tl.predict(sdata, big, mask_key=False)
        assert tree_hash(sdata.path) == before
        assert "he" in sd.read_zarr(disk / "s.zarr")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_two_readers(backed, model):
    px.tl.predict(backed, model)
    other = sd.read_zarr(backed.path)
    px.tl.predict(backed, model, overwrite=True)
    np.testing.assert_array_equal(full(other).values, full(backed).values)
    px.tl.predict(other, model, key_added="b")
    assert {"he", "he_genes", "b"} == set(sd.read_zarr(backed.path).images)


def test_progress_goes_to_stderr(sdata, model, capfd):
    px.settings.progress = True
    px.tl.predict(sdata, model)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tile" in err
    assert "Mpx/s" in err
    assert "'he_genes': 4 channels, 125 x 155 px at 2 µm/px" in err
