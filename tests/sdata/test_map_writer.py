"""Stored maps: their levels, and that no pixel of the pyramid is off."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, get_channel_names
from spatialdata.transformations import Identity, Scale, get_transformation

from pixnet._core.parallel import run
from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.tile import TileCost
from pixnet._core.predict.tile_runner import _write
from pixnet._sdata.store import commit as commits
from pixnet._sdata.store import map_writer
from pixnet._sdata.store.commit import CommittedError
from pixnet._sdata.store.element_store import heal
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import MapWriter, store_level
from pixnet._sdata.store.workspace import WORK, Workspace, store_lock, work_folders


def spec_of(shape, chunk=16, factors=(2, 2), channels=("a", "b", "__total__")):
    return MapSpec(list(channels), shape, chunk, factors, {"global": Scale([4, 4], ("x", "y")), "um": Identity()})


@pytest.fixture
def sdata(tmp_path):
    image = Image2DModel.parse(np.zeros((3, 16, 16), np.uint8), dims=("c", "y", "x"))
    SpatialData(images={"he": image}).write(tmp_path / "s.zarr")
    return sd.read_zarr(tmp_path / "s.zarr")


def write(sdata, values, spec, tile=32, key="map"):
    stream = MapWriter.open(sdata, key, spec, {"n": 1}, resume=False)
    rows, cols = -(-spec.shape[0] // tile), -(-spec.shape[1] // tile)
    written = []
    for i in range(rows):
        for j in range(cols):
            part = values[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
            if not np.isnan(part).all():
                stream.arrays[0][:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = part
                stream.mark(i, j)
                written.append((i, j))
    scale = 1
    for level, factor in enumerate(spec.scale_factors, 1):
        scale *= factor
        tasks = stream.level_tasks(level, scale, written, tile)
        list(run(store_level, [stream.arrays[level - 1], stream.arrays[level], factor], tasks))
    stream.finish(sdata)
    return sdata[key]


def nan_mean(below, factor=2):
    """Means of blocks, one by one."""
    channels, height, width = (n // f for n, f in zip(below.shape, (1, factor, factor)))
    out = np.full((channels, height, width), np.nan)
    for c, i, j in np.ndindex(out.shape):
        block = below[c, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        if not np.isnan(block).all():
            out[c, i, j] = np.nanmean(block, dtype=float)
    return out


@pytest.mark.parametrize(("shape", "factors"), [((64, 96), (2, 2)), ((75, 103), (2, 2)), ((17, 200), (3, 4))])
def test_levels_are_means_without_nan(sdata, shape, factors):
    rng = np.random.default_rng(0)
    values = rng.random((3, *shape)).astype(np.float32) * 1e4
    values[:, rng.random(shape) < 0.3] = np.nan
    values[:, : shape[0] // 2, 40:80] = np.nan
    found = write(sdata, values, spec_of(shape, factors=factors))
    arrays = [found[level]["image"].values for level in ("scale0", "scale1", "scale2")]
    np.testing.assert_array_equal(arrays[0], values)
    for factor, below, level in zip(factors, arrays, arrays[1:]):
        np.testing.assert_allclose(level, nan_mean(below, factor), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "factors", "with_tiles"), [((150, 206), (2, 2), 2), ((1, 140), (2, 2), 2), ((128, 190), (2, 3), 1)]
)
def test_levels_written_with_their_tiles(sdata, shape, factors, with_tiles):
    rng = np.random.default_rng(0)
    values = rng.random((3, *shape)).astype(np.float32)
    values[:, rng.random(shape) < 0.3] = np.nan
    stream = MapWriter.open(sdata, "map", spec_of(shape, chunk=64, factors=factors), {"n": 1})
    assert stream.levels_of_tiles(64) == with_tiles
    coarser = list(zip(stream.arrays[1:], factors))[:with_tiles]
    for i, j in np.ndindex(*(-(-n // 64) for n in shape)):
        part = values[:, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
        box = Box(i * 64, j * 64, *part.shape[1:])
        _write(stream.arrays[0], coarser, SimpleNamespace(values=part, box=box, i=i, j=j, novelty=[], cost=TileCost()))
    arrays = [array[:] for array in stream.arrays]
    stream.discard()
    np.testing.assert_array_equal(arrays[0], values)
    for factor, below, level in list(zip(factors, arrays, arrays[1:]))[:with_tiles]:
        rows = below.repeat(factor, axis=1) if shape[0] == 1 else below  # an axis shorter than a block is one pixel
        np.testing.assert_allclose(level, nan_mean(rows, factor), rtol=1e-5)


def test_the_element_is_what_spatialdata_reads(sdata):
    values = np.ones((3, 50, 40), np.float32)
    found = write(sdata, values, spec_of((50, 40)))
    again = sd.read_zarr(sdata.path)
    assert list(get_channel_names(again["map"])) == ["a", "b", "__total__"] == list(get_channel_names(found))
    assert set(get_transformation(again["map"], get_all=True)) == {"global", "um"}
    matrix = get_transformation(again["map"], "global").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_array_equal(matrix, np.diag([4, 4, 1]))
    extent = sd.get_extent(again["map"])
    assert (extent["x"], extent["y"]) == ((0, 160), (0, 200))
    assert sdata.is_self_contained("map")
    ome = zarr.open_group(sdata.path / "images" / "map").attrs["ome"]
    scales = [d["coordinateTransformations"][0]["scale"] for d in ome["multiscales"][0]["datasets"]]
    np.testing.assert_allclose(scales, [[1, 1, 1], [1, 2, 2], [1, 4, 4]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 1)])
def test_an_axis_that_is_shorter_than_a_block_becomes_one_pixel(sdata, shape):
    values = np.arange(3 * shape[0] * shape[1], dtype=np.float32).reshape(3, *shape)
    spec = spec_of(shape, factors=(2, 4))
    assert all(scale <= size for scales in spec.scales for scale, size in zip(scales, shape))
    found = write(sdata, values, spec)
    assert found["scale1"]["image"].shape[1:] == tuple(max(1, n // 2) for n in shape)
    assert not np.isnan(found["scale2"]["image"].values).any()
    extent = sd.get_extent(sd.read_zarr(sdata.path)["map"])
    assert (extent["x"], extent["y"]) == ((0, 4 * shape[1]), (0, 4 * shape[0]))


@pytest.mark.parametrize("factors", [(), (2,), (3, 2)])
def test_scale_factors(sdata, factors):
    found = write(sdata, np.ones((3, 50, 40), np.float32), spec_of((50, 40), factors=factors))
    if not factors:
        assert found.shape == (3, 50, 40)
        return
    sizes = [found[f"scale{k}"]["image"].shape[1:] for k in range(len(factors) + 1)]
    expected = [(50, 40)]
    for f in factors:
        expected.append((expected[-1][0] // f, expected[-1][1] // f))
    assert sizes == expected


def test_background_is_not_stored(sdata):
    values = np.full((3, 128, 128), np.nan, np.float32)
    values[:, :10, :10] = 1
    write(sdata, values, spec_of((128, 128), chunk=32))
    level = sdata.path / "images" / "map" / "s0"
    files = [p for p in (sdata.path / "images" / "map").rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert zarr.open_array(level).shape == (3, 128, 128)
    assert len(files) == 3  # one chunk at each level


def test_chunks_hold_few_channels_and_share_them_evenly():
    spec = MapSpec([str(i) for i in range(251)], (1000, 1000), 256, (2, 2), {})
    assert spec.chunks == (23, 256, 256)


def test_maps_of_objects_in_memory_stream_to_scratch(tmp_path, monkeypatch):
    from pixnet import settings
    from pixnet._core import scratch

    monkeypatch.setattr(scratch, "_scratch", None)
    monkeypatch.setattr(settings, "scratch_dir", tmp_path)
    image = Image2DModel.parse(np.zeros((3, 16, 16), np.uint8), dims=("c", "y", "x"))
    sdata = SpatialData(images={"he": image})
    found = write(sdata, np.ones((3, 50, 40), np.float32), spec_of((50, 40)))
    assert not sdata.is_backed()
    assert (found["scale0"]["image"].values == 1).all()
    root = scratch.scratch_root()
    assert root.parent == tmp_path
    scratch._clear_scratch(root, -1)  # a forked child
    assert root.exists()
    scratch._clear_scratch(root, os.getpid())
    assert not root.exists()
    with pytest.raises(FileNotFoundError, match="goes with the process that predicted the map"):
        found["scale0"]["image"].values.any()  # not NaN


# interrupted maps, and other processes ---------------------------------------------------------------------------------


def test_an_interrupted_map_that_another_process_looks_at_is_resumed(sdata, monkeypatch):
    monkeypatch.setattr(map_writer, "heal", lambda sdata: [])  # the other comes just after it
    spec = spec_of((32, 32))
    MapWriter.open(sdata, "map", spec, {"n": 1}).interrupt()
    (folder,) = work_folders(sdata.path)
    with ThreadPoolExecutor(1) as pool:
        with store_lock(sdata.path):
            looking = Workspace.adopt(folder)
            resumed = pool.submit(MapWriter.open, sdata, "map", spec, {"n": 1}, resume=True)
            time.sleep(0.1)
            looking.release()
        resumed.result(timeout=30).discard()
    assert not (sdata.path / WORK).exists()


def test_a_map_that_was_committed_is_not_cleared_as_an_interrupted_one(sdata, monkeypatch):
    spec, values = spec_of((32, 32)), np.ones((3, 32, 32), np.float32)

    def fail(root, work):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(commits, "complete", fail)
        with pytest.raises(CommittedError, match="the new 'map' is whole"):
            write(sdata, values, spec)
    monkeypatch.setattr(map_writer, "heal", lambda sdata: [])  # it failed just after we looked
    MapWriter.open(sdata, "map", spec, {"n": 2}).discard()
    assert (sd.read_zarr(sdata.path).images.keys()) == {"he"}
    assert heal(sdata) == ["map"]
    assert (sd.read_zarr(sdata.path)["map"]["scale0"]["image"].values == 1).all()
