from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import shapely
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.zonal import reader as pixels
from pixnet._core.zonal import zonal as zonal_module
from pixnet._core.zonal.index import TileIndex
from pixnet._core.zonal.reader import ImageReader
from pixnet._core.zonal.zonal import zonal_statistics

C, H, W = 5, 90, 110


@pytest.fixture(scope="module")
def image():
    data = np.random.default_rng(0).normal(100, 3, (C, H, W)).astype(np.float32)
    data[:, 20:50, 30:60] = np.nan
    return data


@pytest.fixture(scope="module")
def shapes():
    rng = np.random.default_rng(1)
    centres = rng.uniform(-5, 115, (60, 2))
    found = [shapely.Point(p).buffer(r, 4) for p, r in zip(centres, 10 ** rng.uniform(-1, 1.5, 60))]
    found += [
        shapely.box(x, y, x + w, y + w)
        for x, y, w in zip(*rng.uniform(-4, 100, (2, 40)), 10 ** rng.uniform(-1, 1.5, 40))
    ]
    found += [shapely.box(-10, -10, 200, 200), shapely.box(32, 22, 40, 40), shapely.box(300, 300, 310, 310)]
    return ShapeArrays.from_geometries(found)


def plainly(image, shapes, weights="area", validity=None):
    """The same statistics, the slow way."""
    cover = coverage(shapes, (0, 0, *image.shape[1:]), weights).toarray()
    flat = image.reshape(len(image), -1).astype(np.float64)
    valid = ~np.isnan(flat) if validity is None else np.broadcast_to(~np.isnan(flat[validity]), flat.shape)
    weight = cover @ valid.T
    filled = np.where(valid, flat, 0)
    out = {"weight": weight}
    with np.errstate(invalid="ignore", divide="ignore"):
        out["mean"] = cover @ filled.T / weight
        out["std"] = np.sqrt(
            np.stack([(cover * valid[c] * (filled[c] - out["mean"][:, [c]]) ** 2).sum(1) for c in range(len(flat))], 1)
            / weight
        )
    for name, start, function in (("min", np.inf, np.min), ("max", -np.inf, np.max)):
        value = np.stack(
            [function(np.where((cover > 0) & valid[c], filled[c], start), axis=1) for c in range(len(flat))], 1
        )
        out[name] = np.where(weight > 0, value, np.nan)
    return out


def kinds_of(image, tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=image.shape, dtype=image.dtype, chunks=(2, 32, 17))
    stored[:] = image
    sharded = zarr.create_array(
        tmp_path / "s.zarr", shape=image.shape, dtype=image.dtype, chunks=(2, 16, 16), shards=(4, 64, 64)
    )
    sharded[:] = image
    return {
        "numpy": image,
        "zarr": stored,
        "sharded": sharded,
        "dask of zarr": da.from_zarr(tmp_path / "a.zarr"),
        "dask": da.from_array(image, chunks=(3, 40, (1, 60, 49))),
        "lazy": da.from_zarr(tmp_path / "a.zarr") + np.float32(0),
        "one chunk": da.from_array(image, chunks=-1),
    }


@pytest.mark.parametrize("side", [16, 512])
@pytest.mark.parametrize("weights", ["area", "center"])
@pytest.mark.parametrize("statistics", [("mean",), ("mean", "std", "min", "max")])
def test_every_source_gives_the_plain_result(image, shapes, tmp_path, monkeypatch, side, weights, statistics):
    monkeypatch.setattr(pixels, "_TILE_SIDE", side)
    expected = plainly(image, shapes, weights)
    for name, source in kinds_of(image, tmp_path).items():
        found = zonal_statistics(source, shapes, channels=range(C), statistics=statistics, weights=weights)
        np.testing.assert_allclose(
            found.weight,
            np.broadcast_to(expected["weight"], (len(shapes), found.weight.shape[1])),
            atol=1e-9,
            err_msg=name,
        )
        for statistic in statistics:
            value = getattr(found, statistic)
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, expected[statistic], rtol=3e-6, atol=3e-5, err_msg=f"{name} {statistic}")


@pytest.mark.parametrize("validity", [None, 2])
def test_missing_pixels_of_each_channel_or_of_all(image, shapes, validity):
    image = image.copy()
    image[1, 60:70, 60:70] = np.nan
    expected = plainly(np.nan_to_num(image, nan=np.nan), shapes, validity=validity)
    found = zonal_statistics(
        image, shapes, channels=range(C), validity=validity, statistics=("mean", "std", "min", "max")
    )
    assert found.weight.shape == (len(shapes), C if validity is None else 1)
    channels = [0, 2, 3, 4] if validity is not None else range(C)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(getattr(found, name)[:, channels], expected[name][:, channels], rtol=3e-6, atol=3e-5)
    if validity is not None:
        # A gap in one channel alone of a gene map is a fault of the map, and shows.
        touched = coverage(shapes, (0, 0, H, W)).toarray().reshape(-1, H, W)[:, 60:70, 60:70].sum((1, 2)) > 0
        assert np.isnan(found.mean[touched, 1]).all()


def test_one_weight_serves_all_channels_until_one_has_a_gap(image, shapes, monkeypatch):
    whole = np.nan_to_num(image, nan=7.0)
    monkeypatch.setattr(pixels, "_TILE_SIDE", 32)
    monkeypatch.setattr(zonal_module, "TILE_BYTES", 2 * 32 * 32 * 4)  # two channels at a time
    assert zonal_statistics(whole, shapes, channels=range(C)).weight.shape == (len(shapes), 1)
    gap = whole.copy()
    gap[3, 64:80, 70:] = np.nan
    found, expected = zonal_statistics(gap, shapes, channels=range(C), statistics=("mean", "std")), plainly(gap, shapes)
    assert found.weight.shape == (len(shapes), C)
    np.testing.assert_allclose(found.weight, expected["weight"], atol=1e-9)
    np.testing.assert_allclose(found.mean, expected["mean"], rtol=3e-6)
    np.testing.assert_allclose(found.std, expected["std"], rtol=3e-6, atol=3e-5)


def test_subsets_of_channels_in_any_order(image, shapes, tmp_path):
    whole = zonal_statistics(image, shapes, channels=range(C))
    for name, source in kinds_of(image, tmp_path).items():
        found = zonal_statistics(source, shapes, channels=[4, 0, 3], validity=2)
        np.testing.assert_allclose(found.mean, whole.mean[:, [4, 0, 3]], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64, np.float16, bool])
def test_dtypes(shapes, dtype):
    data = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, (2, H, W)).astype(dtype)
    expected = plainly(data.astype(np.float64), shapes)
    np.testing.assert_allclose(zonal_statistics(data, shapes, channels=[0, 1]).mean, expected["mean"], rtol=1e-6)


def test_large_integers_are_not_rounded_first(shapes):
    data = np.full((1, H, W), 2**30 + 1, np.int32)
    data[0, ::2] -= 2
    found = zonal_statistics(data, ShapeArrays.from_geometries([shapely.box(0, 0, 10, 1)]), channels=[0])
    assert found.mean[0, 0] == np.float32(2**30 - 1)


def test_order_and_company_do_not_matter(image, shapes):
    alone = zonal_statistics(image, shapes, channels=range(C))
    order = np.random.default_rng(2).permutation(len(shapes))
    shuffled = zonal_statistics(image, shapes.take(order), channels=range(C))
    np.testing.assert_array_equal(shuffled.mean, alone.mean[order])
    few = zonal_statistics(image, shapes.take([3, 90, 100]), channels=range(C))
    np.testing.assert_array_equal(few.mean, alone.mean[[3, 90, 100]])


def test_runs_are_equal_to_the_bit(image, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_TILE_SIDE", 16)
    source = kinds_of(image, tmp_path)["zarr"]
    first = zonal_statistics(source, shapes, channels=range(C), statistics=("mean", "std"))
    for _ in range(3):
        again = zonal_statistics(source, shapes, channels=range(C), statistics=("mean", "std"))
        assert again.mean.tobytes() == first.mean.tobytes()
        assert again.std.tobytes() == first.std.tobytes()


def test_small_batches_give_the_same(image, shapes, monkeypatch):
    expected = zonal_statistics(image, shapes, channels=range(C), validity=0, statistics=("mean", "std", "max"))
    monkeypatch.setattr(zonal_module, "_BATCH_PIXELS", 500)
    monkeypatch.setattr(zonal_module, "TILE_BYTES", 90 * 110 * 4)
    found = zonal_statistics(image, shapes, channels=range(C), validity=0, statistics=("mean", "std", "max"))
    for name in ("mean", "std", "max", "weight"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_blocks_and_coverage_give_the_same(seed):
    rng = np.random.default_rng(seed)
    image = rng.random((2, 30, 40)).astype(np.float32)
    image[:, rng.random((30, 40)) < 0.1] = np.nan
    corner = rng.uniform(-3, 40, (50, 2))
    corner[::3] = np.round(corner[::3])
    size = 10 ** rng.uniform(-2, 1.3, (50, 2))
    size[::2] = np.ceil(size[::2])
    boxes = shapely.box(*corner.T, *(corner + size).T)
    # One more vertex on a side makes the same square a polygon like any other.
    polygons = [
        shapely.Polygon([*b.exterior.coords[:-1], b.exterior.interpolate(b.length - size[i, 0] / 2)])
        for i, b in enumerate(boxes)
    ]
    by_block, by_coverage = ShapeArrays.from_geometries(boxes), pack(polygons)
    assert (by_block.kinds != by_coverage.kinds).all()
    a = zonal_statistics(image, by_block, channels=[0, 1])
    b = zonal_statistics(image, by_coverage, channels=[0, 1])
    np.testing.assert_allclose(a.weight, b.weight, atol=1e-9)
    seen = a.weight[:, 0] > 1e-6
    np.testing.assert_allclose(a.mean[seen], b.mean[seen], rtol=1e-5)


def test_the_spread_of_a_constant_is_zero():
    image = np.full((1, 64, 64), 12345.678, np.float32)
    found = zonal_statistics(
        da.from_array(image, chunks=(1, 16, 16)),
        ShapeArrays.from_geometries([shapely.Point(30, 30).buffer(20)]),
        channels=[0],
        statistics=("std",),
    )
    assert found.std[0, 0] < 1e-3


def test_lazy_blocks_are_computed_once_and_only_where_shapes_are(monkeypatch):
    monkeypatch.setattr(pixels, "_TILE_SIDE", 128)
    calls = []

    def block(block_info=None):
        calls.append(tuple(block_info[None]["chunk-location"]))
        return np.full(block_info[None]["chunk-shape"], 1.0, np.float32)

    lazy = da.map_blocks(
        block, chunks=((7,), (64,) * 8, (64,) * 8), dtype=np.float32, meta=np.zeros((0, 0, 0), np.float32)
    )
    rechunked = lazy.rechunk((2, 64, 64))  # a map that is computed whole, and offered in pieces
    shapes = ShapeArrays.from_geometries(
        [shapely.box(3, 3, 60, 60), shapely.box(70, 70, 100, 250), shapely.Point(100, 100).buffer(20)]
    )
    found = zonal_statistics(rechunked, shapes, channels=range(7), validity=6)
    assert (found.mean == 1).all()
    assert len(calls) == 8
    assert sorted(calls) == sorted(set(calls))


def test_tiles_without_shapes_are_not_read(monkeypatch, tmp_path):
    stored = zarr.create_array(
        tmp_path / "a.zarr", shape=(1, 2048, 2048), dtype="f4", chunks=(1, 512, 512), fill_value=1
    )
    windows = []
    read = ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda self, block, window: windows.append(window) or read(self, block, window)
    )
    zonal_statistics(
        stored, ShapeArrays.from_geometries([shapely.box(5, 5, 9, 9), shapely.box(600, 600, 700, 1200)]), channels=[0]
    )
    assert sorted(windows) == [(0, 0, 512, 512), (512, 512, 512, 512), (1024, 512, 512, 512)]


def test_tiles_know_their_shapes():
    edges = (np.array([0, 10, 20]), np.array([0, 10, 15]))
    shapes = ShapeArrays.from_geometries(
        [shapely.box(0, 0, 10, 10), shapely.box(5, 5, 12, 12), shapely.box(15, 0, 18, 5), shapely.box(-5, -5, 0, 0)]
    )
    tiles = TileIndex(shapes, edges)
    assert tiles.counts.tolist() == [1, 4, 0, 0]
    found = {window: members.tolist() for window, members in tiles}
    assert found == {(0, 0, 10, 10): [0, 1], (0, 10, 10, 5): [1], (10, 0, 10, 10): [1], (10, 10, 10, 5): [1]}


def test_a_stored_array_is_read_from_its_store(tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(2, 8, 8), dtype="f4", chunks=(1, 8, 8))
    stored[:] = 3
    plain = da.from_zarr(tmp_path / "a.zarr")
    assert isinstance(ImageReader(plain, [0]).source, zarr.Array)
    for changed in (plain + 1, plain[:, :4], plain.astype("f8"), plain.rechunk(4), plain[::-1]):
        assert ImageReader(changed, [0]).lazy


def test_a_distributed_client_gives_the_same(image, shapes, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(pixels, "_TILE_SIDE", 32)
    sources = {name: source for name, source in kinds_of(image, tmp_path).items() if name in {"numpy", "zarr", "lazy"}}
    statistics = ("mean", "std", "min", "max")
    expected = {
        name: zonal_statistics(source, shapes, channels=[4, 0, 3], validity=0, statistics=statistics)
        for name, source in sources.items()
    }
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        for name, source in sources.items():
            found = zonal_statistics(source, shapes, channels=[4, 0, 3], validity=0, statistics=statistics)
            for statistic in statistics:
                assert getattr(found, statistic).tobytes() == getattr(expected[name], statistic).tobytes(), name


def test_no_shape_in_the_image(image):
    found = zonal_statistics(image, ShapeArrays.from_geometries([shapely.box(500, 500, 501, 501)]), channels=range(C))
    assert np.isnan(found.mean).all()
    assert (found.weight == 0).all()
