from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest
import shapely
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.stored import stored_array
from pixnet._core.zonal import VALID_NAMES, find_statistic, zonal_statistics
from pixnet._core.zonal.index import TileIndex
from pixnet._core.zonal.reader import ImageReader

C, H, W = 5, 90, 110
ALL = ("mean", "sum", "std", "min", "max", "median", "q10", "q97.5")
arrays = ShapeArrays.from_geometries


def compute(image, shapes, names=("mean",), channels=range(C), **options):
    """Statistics of these names."""
    found = zonal_statistics(image, shapes, channels=channels, statistics=list(map(find_statistic, names)), **options)
    assert list(found.values) == list(names)
    assert all(values.dtype == np.float32 for values in found.values.values())
    return found


def means(image, shapes, channels=range(C), **options):
    return compute(image, shapes, ("mean",), channels, **options).values["mean"]


def assert_same_bits(found, expected):
    assert found.area.tobytes() == expected.area.tobytes()
    for name, values in expected.values.items():
        assert found.values[name].tobytes() == values.tobytes(), name


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
    return arrays(found)


def plainly(image, shapes, weights="area", validity=None):
    """The same statistics, the slow way."""
    cover = coverage(shapes, (0, 0, *image.shape[1:]), weights).toarray()
    flat = image.reshape(len(image), -1).astype(np.float64)
    valid = ~np.isnan(flat) if validity is None else np.broadcast_to(~np.isnan(flat[validity]), flat.shape)
    out = {name: np.full((len(shapes), len(image)), np.nan) for name in ALL}
    for i, row in enumerate(cover):
        for c, plane in enumerate(flat):
            inside = (row > 0) & valid[c]
            if inside.any():
                values, areas = plane[inside], row[inside]
                mean = (areas * values).sum() / areas.sum()
                out["mean"][i, c], out["sum"][i, c] = mean, (areas * values).sum()
                out["std"][i, c] = np.sqrt((areas * (values - mean) ** 2).sum() / areas.sum())
                out["min"][i, c], out["max"][i, c] = values.min(), values.max()
                for name, share in (("median", 0.5), ("q10", 0.1), ("q97.5", 0.975)):
                    out[name][i, c] = weighted_quantile(values, areas, share)
    return cover @ valid.any(axis=0), out


def weighted_quantile(values, areas, share):
    order = np.argsort(values)
    up_to = np.cumsum(areas[order]) / areas.sum()
    # Where the share falls between two pixels (equal areas), both count.
    return values[order][[np.argmax(up_to >= share - 1e-9), np.argmax(up_to >= share + 1e-9)]].mean()


def kinds_of(image, tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=image.shape, dtype=image.dtype, chunks=(2, 32, 17))
    stored[:] = image
    sharded = zarr.create_array(
        tmp_path / "s.zarr", shape=image.shape, dtype=image.dtype, chunks=(2, 16, 16), shards=(4, 64, 64)
    )
    sharded[:] = image
    memory = zarr.create_array(zarr.storage.MemoryStore(), shape=image.shape, dtype=image.dtype, chunks=(2, 32, 17))
    memory[:] = image
    return {
        "numpy": image,
        "zarr": stored,
        "zarr in memory": memory,
        "sharded": sharded,
        "dask of zarr": da.from_zarr(tmp_path / "a.zarr"),
        "dask": da.from_array(image, chunks=(3, 40, (1, 60, 49))),
        "lazy": da.from_zarr(tmp_path / "a.zarr") + np.float32(0),
        "one chunk": da.from_array(image, chunks=-1),
    }


@pytest.mark.parametrize("side", [16, 512])
@pytest.mark.parametrize("weights", ["area", "center"])
def test_every_source_gives_the_plain_result(image, shapes, tmp_path, side, weights):
    area, expected = plainly(image, shapes, weights)
    for name, source in kinds_of(image, tmp_path).items():
        found = compute(source, shapes, ALL, weights=weights, tile_px=side)
        np.testing.assert_allclose(found.area, area, atol=1e-9, err_msg=name)
        for statistic, values in found.values.items():
            np.testing.assert_allclose(values, expected[statistic], rtol=3e-6, atol=3e-5, err_msg=f"{name} {statistic}")


@pytest.mark.parametrize("validity", [None, 2])
@pytest.mark.parametrize("side", [16, 512])
def test_missing_pixels_of_each_channel_or_of_all(image, shapes, validity, side):
    image = image.copy()
    image[1, 60:70, 60:70] = np.nan
    area, expected = plainly(image, shapes, validity=validity)
    found = compute(image, shapes, ALL, validity=validity, tile_px=side)
    np.testing.assert_allclose(found.area, area, atol=1e-9)
    channels = [0, 2, 3, 4] if validity is not None else range(C)
    for name, values in found.values.items():
        np.testing.assert_allclose(values[:, channels], expected[name][:, channels], rtol=3e-6, atol=3e-5)
    if validity is not None:
        # A gap in one channel alone of a gene map is a fault of the map, and shows.
        touched = coverage(shapes, (0, 0, H, W)).toarray().reshape(-1, H, W)[:, 60:70, 60:70].sum((1, 2)) > 0
        for name in ("mean", "sum", "std", "median"):
            assert np.isnan(found.values[name][touched, 1]).all()


def test_a_pixel_that_any_channel_has_counts_as_area():
    image = np.full((2, 4, 4), np.nan, np.float32)
    image[0, :2], image[1, 1:3] = 1, 2
    found = compute(image, arrays([shapely.box(0, 0, 4, 4), shapely.box(0, 3, 4, 4)]), ("mean", "sum"), range(2))
    assert found.area.tolist() == [12, 0]
    np.testing.assert_array_equal(found.values["mean"], [[1, 2], [np.nan, np.nan]])
    np.testing.assert_array_equal(found.values["sum"], [[8, 16], [np.nan, np.nan]])


def test_subsets_of_channels_in_any_order(image, shapes, tmp_path):
    whole = means(image, shapes)
    for name, source in kinds_of(image, tmp_path).items():
        found = means(source, shapes, [4, 0, 3], validity=2)
        np.testing.assert_allclose(found, whole[:, [4, 0, 3]], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64, np.float16, bool])
def test_dtypes(shapes, dtype):
    data = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, (2, H, W)).astype(dtype)
    _, expected = plainly(data.astype(np.float64), shapes)
    found = compute(data, shapes, ALL, [0, 1])
    for name, values in found.values.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-5)


def test_large_integers_are_not_rounded_first():
    data = np.full((1, H, W), 2**30 + 1, np.int32)
    data[0, ::2] -= 2
    assert means(data, arrays([shapely.box(0, 0, 10, 1)]), [0]) == np.float32(2**30 - 1)


def test_order_and_company_do_not_matter(image, shapes):
    alone = compute(image, shapes, ALL)
    order = np.random.default_rng(2).permutation(len(shapes))
    shuffled = compute(image, shapes.take(order), ALL)
    few = compute(image, shapes.take([3, 90, 100]), ALL)
    for name, values in alone.values.items():
        np.testing.assert_array_equal(shuffled.values[name], values[order])
        np.testing.assert_array_equal(few.values[name], values[[3, 90, 100]])


def test_runs_are_equal_to_the_bit(image, shapes, tmp_path):
    source = kinds_of(image, tmp_path)["zarr"]
    first = compute(source, shapes, ALL, tile_px=16)
    for _ in range(3):
        assert_same_bits(compute(source, shapes, ALL, tile_px=16), first)


@pytest.mark.parametrize("side", [32, 512])
def test_small_batches_give_the_same(image, shapes, tmp_path, side):
    source = kinds_of(image, tmp_path)["zarr"]
    for validity in (None, 0):
        expected = compute(source, shapes, ALL, validity=validity, tile_px=side)
        # A few shapes and two channels at a time.
        found = compute(source, shapes, ALL, validity=validity, tile_px=side, batch_px=500, block_bytes=2 * 4 * side**2)
        assert_same_bits(found, expected)


def test_a_statistic_is_found_by_its_name():
    for name in (*ALL, "q1", "q05", "q99.9"):
        assert find_statistic(name).name == name
    for name in ("", "average", "Mean", "q", "q0", "q100", "q-5", "0.9", "q0.5.5", "q1e1", " median", "quantile"):
        assert find_statistic(name) is None
    assert VALID_NAMES == "'mean', 'sum', 'std', 'min', 'max', 'median', 'q90' (any percentage)"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_quantiles_of_whole_pixels_are_those_of_numpy(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 9, (2, 30, 40)).astype(np.float32)  # with ties
    low = rng.integers(0, 25, (20, 2))
    high = low + rng.integers(1, [16, 6], (20, 2))
    # Bins that a transformation moved by rounding have slivers of the pixels beside them, which count for nothing.
    noise = rng.choice([0, 1e-10], (20, 2))
    names = {"median": 0.5, "q25": 0.25, "q90": 0.9, "q12.5": 0.125}
    found = compute(image, arrays(shapely.box(*low.T, *(high + noise).T)), tuple(names), range(2), tile_px=16)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(low, high)):
        pixels = image[:, y0:y1, x0:x1].reshape(2, -1)
        np.testing.assert_array_equal(found.values["median"][i], np.median(pixels, axis=1))
        for name, share in names.items():
            expected = np.quantile(pixels, share, axis=1, method="averaged_inverted_cdf")
            np.testing.assert_array_equal(found.values[name][i], expected)


def test_quantiles_that_need_too_much_memory_are_refused_before_any_pixel_is_read():
    def refuse(_):
        raise AssertionError("a pixel was read")

    lazy = da.zeros((3, 64, 64), chunks=(3, 32, 32), dtype=np.float32).map_blocks(refuse, meta=np.zeros((0, 0, 0)))
    inside = arrays([shapely.box(1, 1, 31, 31)])
    across = arrays([shapely.box(16, 16, 48, 48)])
    with pytest.raises(ValueError, match="'median' of 3 channels would keep .* fewer channels at a time"):
        compute(lazy, across, ("mean", "median"), range(3), tile_px=32, held_bytes=3 * 4 * 32**2 - 1)
    image = np.ones((3, 64, 64), np.float32)
    assert compute(image, inside, ("median",), range(3), tile_px=32, held_bytes=1).values["median"].tolist() == [
        [1] * 3
    ]
    assert compute(image, across, ("mean",), range(3), tile_px=32, held_bytes=1).values["mean"].tolist() == [[1] * 3]
    enough = compute(image, across, ("median",), range(3), tile_px=32, held_bytes=3 * 4 * 40**2)
    assert enough.values["median"].tolist() == [[1] * 3]


def test_pixels_are_held_until_the_last_tile_of_their_shapes():
    edges = (np.arange(0, 81, 10),) * 2
    bands = arrays([shapely.box(0, y - 1, 80, y + 1) for y in range(10, 80, 10)])  # each over two rows of tiles
    band = TileIndex(bands.take([0]), edges).most_held(bands.take([0]))
    held = TileIndex(bands, edges).most_held(bands)
    assert band >= 80 * 2
    assert band <= held <= 3 * band


def test_the_spread_of_a_constant_is_zero():
    image = np.full((1, 64, 64), 12345.678, np.float32)
    lazy = da.from_array(image, chunks=(1, 16, 16))
    spot = arrays([shapely.Point(30, 30).buffer(20)])
    assert compute(lazy, spot, ("std",), [0], tile_px=16).values["std"] < 1e-3


def test_lazy_blocks_are_computed_once_and_only_where_shapes_are():
    calls = []

    def block(block_info=None):
        calls.append(tuple(block_info[None]["chunk-location"]))
        return np.full(block_info[None]["chunk-shape"], 1.0, np.float32)

    lazy = da.map_blocks(
        block, chunks=((7,), (64,) * 8, (64,) * 8), dtype=np.float32, meta=np.zeros((0, 0, 0), np.float32)
    )
    rechunked = lazy.rechunk((2, 64, 64))  # a map that is computed whole, and offered in pieces
    shapes = arrays([shapely.box(3, 3, 60, 60), shapely.box(70, 70, 100, 250), shapely.Point(100, 100).buffer(20)])
    assert (means(rechunked, shapes, range(7), validity=6, tile_px=128) == 1).all()
    assert len(calls) == 8
    assert sorted(calls) == sorted(set(calls))


def test_tiles_without_shapes_are_not_read(monkeypatch, tmp_path):
    stored = zarr.create_array(
        tmp_path / "a.zarr", shape=(1, 2048, 2048), dtype="f4", chunks=(1, 512, 512), fill_value=1
    )
    windows = []
    blocks = ImageReader.blocks
    monkeypatch.setattr(
        ImageReader, "blocks", lambda self, window, first: windows.append(window) or blocks(self, window, first)
    )
    means(stored, arrays([shapely.box(5, 5, 9, 9), shapely.box(600, 600, 700, 1200)]), [0])
    assert sorted(windows) == [(0, 0, 512, 512), (512, 512, 512, 512), (1024, 512, 512, 512)]


def test_tiles_know_their_shapes():
    edges = (np.array([0, 10, 20]), np.array([0, 10, 15]))
    shapes = arrays(
        [shapely.box(0, 0, 10, 10), shapely.box(5, 5, 12, 12), shapely.box(15, 0, 18, 5), shapely.box(-5, -5, 0, 0)]
    )
    tiles = TileIndex(shapes, edges)
    assert tiles.counts.tolist() == [1, 4, 0, 0]
    found = {window: (rows.tolist(), n_inner) for window, rows, n_inner in tiles}
    assert found == {
        (0, 0, 10, 10): ([0, 1], 1),
        (0, 10, 10, 5): ([1], 0),
        (10, 0, 10, 10): ([1], 0),
        (10, 10, 10, 5): ([1], 0),
    }


def test_a_stored_array_is_read_from_its_store(tmp_path):
    """Fails if dask names the layers of from_zarr otherwise: aggregation is right then, and slower; see stored_array."""
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(2, 8, 8), dtype="f4", chunks=(1, 8, 8))
    stored[:] = 3
    plain = da.from_zarr(tmp_path / "a.zarr")
    assert isinstance(stored_array(plain), zarr.Array), f"dask {dask.__version__} has layers {list(plain.dask.layers)}"
    for changed in (plain + 1, plain[:, :4], plain.astype("f8"), plain.rechunk(4), plain[::-1]):
        assert stored_array(changed) is None


def test_zarr_reads_into_memory_that_is_there(tmp_path):
    """Fails if zarr moves or changes the buffer that ImageReader reads into."""
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(2, 8, 8), dtype="f4", chunks=(1, 4, 8))
    stored[:] = np.arange(128).reshape(2, 8, 8)
    reader = ImageReader(stored, [0, 1])
    first, second = (next(reader.blocks((y, 0, 4, 8)))[1] for y in (0, 4))
    assert np.shares_memory(first, second), f"zarr {zarr.__version__} does not read into the given buffer"
    np.testing.assert_array_equal(second, stored[:, 4:])


@pytest.fixture
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as found,
    ):
        yield found


def test_a_distributed_client_gives_the_same(image, shapes, tmp_path, client):
    for name, source in kinds_of(image, tmp_path).items():
        options = {"names": ALL, "channels": [4, 0, 3], "validity": 0, "tile_px": 32}
        with dask.config.set(scheduler="threads"):
            expected = compute(source, shapes, **options)
        before = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
        assert_same_bits(compute(source, shapes, **options), expected)
        after = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
        assert after > before, name


def test_a_scheduler_that_is_set_keeps_tasks_off_the_client_in_scope(image, shapes, tmp_path, client):
    before = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
    for source in kinds_of(image, tmp_path).values():
        with dask.config.set(scheduler="threads"):
            means(source, shapes)
    assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter) == before


def test_no_shape_in_the_image(image):
    found = compute(image, arrays([shapely.box(500, 500, 501, 501)]), ALL)
    assert all(np.isnan(values).all() for values in found.values.values())
    assert (found.area == 0).all()
