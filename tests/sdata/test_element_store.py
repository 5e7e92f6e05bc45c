"""Elements go into stores without a moment in which the store does not open."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel

from pixnet._sdata.store import element_store as store
from pixnet._sdata.store import workspace as work
from pixnet._sdata.store.element_store import (
    heal,
    local_store,
    put,
)
from pixnet._sdata.store.workspace import WORK


def labels(value=1, n=16):
    return Labels2DModel.parse(np.full((n, n), value, np.uint8), dims=("y", "x"))


def spots():
    return ShapesModel.parse(np.array([[5.0, 5.0], [9.0, 9.0]]), geometry=0, radius=2.0)


def table(value=1.0):
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 2), "instance_id": [0, 1]}, index=["a", "b"])
    data = ad.AnnData(np.full((2, 3), value, np.float32), obs=obs)
    return TableModel.parse(data, region="spots", region_key="region", instance_key="instance_id")


@pytest.fixture
def memory():
    image = Image2DModel.parse(np.zeros((3, 16, 16), np.uint8), dims=("c", "y", "x"))
    return SpatialData(images={"he": image})


@pytest.fixture
def backed(memory, tmp_path):
    path = tmp_path / "s.zarr"
    memory.write(path)
    return sd.read_zarr(path)


def leftovers(sdata):
    return list(Path(sdata.path).rglob(WORK)) + list(Path(sdata.path).rglob("*.partial"))


@pytest.mark.parametrize(("key", "make"), [("mask", labels), ("spots", spots), ("counts", table)])
def test_put_sets_and_stores(memory, backed, key, make):
    for sdata in (memory, backed):
        put(sdata, key, make(), entries={"mpp": {"he": 0.5}})
        assert key in sdata
        assert sdata.attrs["pixnet"] == {"mpp": {"he": 0.5}}
    again = sd.read_zarr(backed.path)
    assert {name for _, name, _ in again.gen_elements()} == {"he", key}
    assert again.attrs["pixnet"] == {"mpp": {"he": 0.5}}
    assert backed.has_consolidated_metadata()
    assert backed.elements_paths_on_disk() == again.elements_paths_in_memory()
    assert leftovers(backed) == []


def test_a_taken_key_needs_overwrite(backed):
    put(backed, "mask", labels(1))
    with pytest.raises(ValueError, match="'mask' exists.*overwrite=True"):
        put(backed, "mask", labels(2))
    put(backed, "mask", labels(2, n=8), overwrite=True)
    assert (backed["mask"].values == 2).all()
    assert sd.read_zarr(backed.path)["mask"].shape == (8, 8)


def test_overwrite_replaces_an_element_of_another_type(backed):
    put(backed, "thing", labels())
    put(backed, "thing", spots(), overwrite=True)
    again = sd.read_zarr(backed.path)
    assert "thing" in again.shapes
    assert "thing" not in again.labels
    assert zarr.open_group(backed.path)["labels"].attrs["ome"]["labels"] == []


def test_rasters_are_bound_to_what_was_stored(backed):
    import dask.array as da

    calls = []

    def block(block_info=None):
        calls.append(1)
        return np.ones((16, 16), np.uint8)

    lazy = da.map_blocks(block, chunks=((16,), (16,)), dtype=np.uint8, meta=np.empty((0, 0), np.uint8))
    put(backed, "mask", Labels2DModel.parse(lazy, dims=("y", "x")))
    n = len(calls)
    assert (backed["mask"].values == 1).all()
    assert len(calls) == n
    assert backed.is_self_contained("mask")


def test_an_element_can_be_made_of_the_one_it_replaces(backed):
    put(backed, "mask", labels(1))
    doubled = Labels2DModel.parse(backed["mask"].data * 2, dims=("y", "x"))
    put(backed, "mask", doubled, overwrite=True)
    assert (sd.read_zarr(backed.path)["mask"].values == 2).all()


def test_a_failed_write_leaves_the_old_element_and_no_debris(backed, monkeypatch):
    put(backed, "mask", labels(1))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SpatialData, "write", full)
    with pytest.raises(OSError, match="No space left"):
        put(backed, "mask", labels(2), overwrite=True)
    monkeypatch.undo()
    assert (sd.read_zarr(backed.path)["mask"].values == 1).all()
    assert (backed["mask"].values == 1).all()
    assert leftovers(backed) == []


def test_the_work_of_a_live_process_is_left_alone(backed):
    with work.work_folder(Path(backed.path), {"key": "x", "resumable": False}) as folder:
        heal(backed)
        assert folder.path.exists()
        put(backed, "mask", labels())
        assert folder.path.exists()
        sd.read_zarr(backed.path)
    assert leftovers(backed) == []


def test_two_readers_see_old_or_new(backed):
    put(backed, "mask", labels(1))
    other = sd.read_zarr(backed.path)
    put(backed, "mask", labels(2), overwrite=True)
    assert (sd.read_zarr(backed.path)["mask"].values == 2).all()
    put(other, "spots", spots())  # another object writes: what it does not know of is not lost
    assert set(sd.read_zarr(backed.path).labels) == {"mask"}


def test_read_only_stores_are_refused(backed, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        put(backed, "mask", labels())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_stores_without_permission_are_refused(backed):
    backed.path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            put(backed, "mask", labels())
    finally:
        backed.path.chmod(0o755)


def test_remote_gone_and_old_stores_are_refused(backed, memory, tmp_path):
    memory.path = "s3://bucket/s.zarr"
    with pytest.raises(ValueError, match="remote"):
        put(memory, "mask", labels())
    memory.path = tmp_path / "gone.zarr"
    with pytest.raises(FileNotFoundError, match=r"gone.zarr"):
        put(memory, "mask", labels())
    zarr.create_group(tmp_path / "old.zarr", zarr_format=2)
    memory.path = tmp_path / "old.zarr"
    with pytest.raises(ValueError, match="old format"):
        local_store(memory)


def test_bad_keys_are_refused(backed):
    with pytest.raises(ValueError, match="letters"):
        put(backed, "a/b", labels())
    with pytest.raises(TypeError, match="name"):
        put(backed, 3, labels())


def test_tables_do_not_warn_about_their_region(backed):
    put(backed, "spots", spots())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not present in the SpatialData object.*")
        put(backed, "spots_counts", table())


def test_the_journal_is_json(backed, monkeypatch):
    """What a later version must be able to read."""
    seen = {}
    original = store.write_json

    def spy(path, content):
        seen[path.name] = json.loads(json.dumps(content))
        original(path, content)

    monkeypatch.setattr(store, "write_json", spy)
    put(backed, "mask", labels())
    assert seen["commit.json"] == {"kind": "labels", "key": "mask", "consolidated": True, "pixnet": {}}
