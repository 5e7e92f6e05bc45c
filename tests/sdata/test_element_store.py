"""Elements go into stores without a moment in which the store does not open."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale, set_transformation

import pixnet as px
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.pixel_size import PIXNET_UM, get_mpp
from pixnet._sdata.record import FORMAT
from pixnet._sdata.store import commit as commits
from pixnet._sdata.store import element_store
from pixnet._sdata.store import workspace as work
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.store.commit import CommittedError
from pixnet._sdata.store.element_store import (
    heal,
    put,
    record_entries,
    update_element_attrs,
    write_mpp,
)
from pixnet._sdata.store.workspace import WORK, write_json
from pixnet._sdata.target import local_store


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
    SpatialData(images=dict(memory.images)).write(path)
    return sd.read_zarr(path)


def leftovers(sdata):
    return list(Path(sdata.path).rglob(WORK)) + list(Path(sdata.path).rglob("*.partial"))


@pytest.mark.parametrize(("key", "make"), [("mask", labels), ("spots", spots), ("counts", table)])
def test_put_sets_and_stores(memory, backed, key, make):
    for sdata in (memory, backed):
        put(sdata, key, make(), entries={"masks": {"he": {"n": 1}}})
        assert key in sdata
        assert sdata.attrs["pixnet"]["masks"] == {"he": {"n": 1}}
    again = sd.read_zarr(backed.path)
    assert {name for _, name, _ in again.gen_elements()} == {"he", key}
    assert again.attrs["pixnet"]["masks"] == {"he": {"n": 1}}
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
    with work.work_folder(Path(backed.path), "x") as folder:
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

    def spy(path, content, through=None):
        seen[path.name] = json.loads(json.dumps(content))
        return write_json(path, content, through)

    monkeypatch.setattr(commits, "write_json", spy)
    put(backed, "mask", labels(), entries={"masks": {"he": "mask"}})
    journal = seen["commit.json"]
    assert set(journal) == {"kind", "key", "entries", "consolidated", "replaces", "new", "companions"}
    assert (journal["kind"], journal["key"], journal["entries"]) == ("labels", "mask", {"masks": {"he": "mask"}})
    assert (journal["consolidated"], journal["replaces"]) == (True, {})


# two objects, and what others do meanwhile --------------------------------------------------------------------------


def test_what_another_object_recorded_stays(backed):
    other = sd.read_zarr(backed.path)
    put(backed, "a", labels(), entries={"masks": {"he": "a"}})
    record_entries(other, {"images": {"a": {"n": 2}}})
    third = sd.read_zarr(backed.path)
    third.attrs["user's"] = 1
    third.write_attrs()
    put(backed, "b", labels(), entries={"images": {"b": {"n": 1}}})
    record_entries(other, {"defaults": {"image_key": "he"}})
    again = sd.read_zarr(backed.path)
    assert set(again.labels) == {"a", "b"}
    assert again.attrs["user's"] == 1
    assert again.attrs["pixnet"] == {
        "format": FORMAT,
        "masks": {"he": "a"},
        "images": {"a": {"n": 2}, "b": {"n": 1}},
        "defaults": {"image_key": "he"},
    }  # fmt: skip


def test_entries_go_with_the_element(backed):
    put(backed, "mask", labels(1), entries={"images": {"mask": {"n": 1}}, "defaults": {"mask": "a name"}})
    put(backed, "mask", labels(2), overwrite=True)
    for sdata in (backed, sd.read_zarr(backed.path)):
        found = {role: part for role, part in sdata.attrs["pixnet"].items() if part}
        assert found == {"format": FORMAT, "defaults": {"mask": "a name"}}


def test_a_crop_keeps_its_own_record(backed):
    crop = backed.subset(["he"])
    put(backed, "mask", labels(), entries={"masks": {"he": "mask"}})
    assert "pixnet" not in crop.attrs


def test_an_element_that_another_object_wrote_is_not_replaced_unasked(backed):
    other = sd.read_zarr(backed.path)
    put(backed, "mask", labels(1))
    with pytest.raises(ValueError, match="exists in .*not in this object.*overwrite=True"):
        put(other, "mask", labels(2))
    assert (sd.read_zarr(backed.path)["mask"].values == 1).all()
    put(other, "mask", labels(2), overwrite=True)
    assert (sd.read_zarr(backed.path)["mask"].values == 2).all()


@pytest.fixture
def interrupted(backed, monkeypatch):
    """A store in which the new mask (2) was committed and is not in its place; the old one is 1."""
    put(backed, "mask", labels(1), entries={"images": {"mask": {"n": 1}}})
    write_mpp(backed, "he", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(commits, "complete", lambda root, work: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(CommittedError, match="the new 'mask' is whole.*completes it"):
            put(backed, "mask", labels(2), overwrite=True, entries={"images": {"mask": {"n": 2}}})
    assert len(work.work_folders(backed.path)) == 1
    return sd.read_zarr(backed.path)


def found(path):
    sdata = sd.read_zarr(path)
    return sdata["mask"].values.max(), sdata.attrs["pixnet"]["images"]["mask"]["n"], get_mpp(sdata, "he")


def test_it_is_completed_by_whoever_looks_first(interrupted):
    assert (interrupted["mask"].values == 1).all()
    check_sdata(interrupted)
    assert (interrupted["mask"].values == 2).all()
    stored = sd.read_zarr(interrupted.path).attrs["pixnet"]
    assert {k: v for k, v in interrupted.attrs["pixnet"].items() if v} == {k: v for k, v in stored.items() if v}
    assert found(interrupted.path) == (2, 2, 0.5)
    assert leftovers(interrupted) == []


@pytest.mark.parametrize("by_hand", [True, False])
def test_healing_does_not_undo_a_corrected_pixel_size(interrupted, by_hand):
    other = sd.read_zarr(interrupted.path)
    other.attrs["user's"] = 1
    other.write_attrs()
    if by_hand:  # before anything is healed
        set_transformation(other["he"], Scale([0.25, 0.25], ("x", "y")), PIXNET_UM, write_to_sdata=other)
        assert heal(interrupted) == ["mask"]
    else:
        px.pp.set_mpp(other, "he", 0.25)
    assert heal(interrupted) == []
    assert found(interrupted.path) == (2, 2, 0.25)
    assert sd.read_zarr(interrupted.path).attrs["user's"] == 1


def test_healing_does_not_undo_what_replaced_the_element_meanwhile(interrupted):
    del interrupted["mask"]
    interrupted.delete_element_from_disk("mask")
    interrupted["mask"] = labels(3, n=4)
    interrupted.write_element("mask")
    assert heal(interrupted) == []
    assert found(interrupted.path) == (3, 1, 0.5)
    assert leftovers(interrupted) == []
    assert interrupted.has_consolidated_metadata()


def test_an_interrupted_change_is_completed_before_the_next_of_that_name(interrupted):
    put(interrupted, "mask", labels(4), overwrite=True, entries={"images": {"mask": {"n": 4}}})
    heal(interrupted)
    assert found(interrupted.path) == (4, 4, 0.5)


def test_what_must_be_completed_and_cannot_be_is_refused(interrupted, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(work, "_open_lock", refuse)
    with pytest.raises(PermissionError, match="interrupted and has to be completed first.*read-only"):
        check_sdata(interrupted)
    for folder in work.work_folders(interrupted.path):
        (folder / "commit.json").unlink()
    check_sdata(interrupted)  # only debris: a store that is read is left as it is


def test_an_element_is_bound_before_another_process_can_replace_it(backed, monkeypatch):
    other, original = sd.read_zarr(backed.path), element_store.store_lock

    @contextlib.contextmanager
    def lock(root):
        with original(root):
            yield
        monkeypatch.undo()
        put(other, "mask", labels(2), overwrite=True)

    monkeypatch.setattr(element_store, "store_lock", lock)
    put(backed, "mask", labels(1), entries={"images": {"mask": {"n": 1}}})
    assert (other["mask"].values == 2).all()
    with pytest.raises(RuntimeError, match="replaced"):  # not the other's, under our entry
        check_bound(backed["mask"], "labels 'mask'")


def test_the_pixel_size_of_an_image_that_is_being_replaced_is_stored(backed):
    """In the middle of a replacement there is no image on disk."""
    element, aside = backed.path / "images" / "he", backed.path / "aside"
    with ThreadPoolExecutor(1) as pool:
        with work.store_lock(backed.path):
            element.rename(aside)
            done = pool.submit(write_mpp, backed, "he", 0.25)
            time.sleep(0.1)
            aside.rename(element)
        done.result(timeout=30)
    assert get_mpp(sd.read_zarr(backed.path), "he") == 0.25


@pytest.mark.skipif(work.fcntl is None, reason="no locks there")
def test_a_child_that_was_forked_meanwhile_does_not_keep_a_lock(tmp_path, monkeypatch):
    """A duplicate of the open file is what a child has."""
    original, duplicates = work._flock, []

    def flock(handle, wait):
        original(handle, wait)
        duplicates.append(os.dup(handle.fileno()))

    monkeypatch.setattr(work, "_flock", flock)

    def take():
        with work.store_lock(tmp_path):
            return "taken"

    try:
        with ThreadPoolExecutor(1) as pool:
            with work.store_lock(tmp_path):
                waiting = pool.submit(take)
                time.sleep(0.1)
            try:
                assert waiting.result(timeout=10) == "taken"
            finally:
                for duplicate in duplicates:  # else the thread waits forever
                    os.close(duplicate)
    finally:
        assert not (tmp_path / WORK).exists()


def test_what_another_wrote_between_the_moves_of_a_change_stays(interrupted):
    """Killed when the old mask was out and the new one not in; then written anew without pixnet."""
    (folder,) = work.work_folders(interrupted.path)
    (folder / "old" / "labels").mkdir(parents=True)
    (interrupted.path / "labels" / "mask").rename(folder / "old" / "labels" / "mask")
    del interrupted["mask"]
    interrupted["mask"] = labels(3, n=4)
    interrupted.write_element("mask")
    assert heal(interrupted) == []
    assert found(interrupted.path) == (3, 1, 0.5)
    assert leftovers(interrupted) == []


# attributes of elements -----------------------------------------------------------------------------------------------


def test_attributes_of_an_element(backed):
    stale = sd.read_zarr(backed.path)
    update_element_attrs(backed, "images", "he", lambda attrs: {**attrs, "a": 1})
    update_element_attrs(stale, "images", "he", lambda attrs: {**attrs, "b": attrs["a"] + 1})
    for group in (zarr.open_group(backed.path)["images/he"], zarr.open_group(backed.path / "images" / "he")):
        assert (group.attrs["a"], group.attrs["b"]) == (1, 2)
    assert "he" in sd.read_zarr(backed.path)
    assert backed.has_consolidated_metadata()
    with pytest.raises(FileNotFoundError, match="holds no 'x' among its images"):
        update_element_attrs(backed, "images", "x", dict)


def test_a_store_that_is_not_consolidated_stays_so(memory, tmp_path):
    memory.write(tmp_path / "s.zarr", consolidate_metadata=False)
    put(memory, "mask", labels())
    update_element_attrs(memory, "images", "he", lambda attrs: {**attrs, "a": 1})
    record_entries(memory, {"images": {"he": {"n": 1}}})
    assert not memory.has_consolidated_metadata()
    assert set(sd.read_zarr(memory.path).labels) == {"mask"}
