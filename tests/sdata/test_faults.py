"""Writing fails at every single step, with an error of the disk or a kill: old or new is there whole, and nothing else.

A step is a call that changes the file system: open for writing, write, sync, rename, link, mkdir, unlink, rmdir.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, TableModel
from spatialdata.transformations import Identity

from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.tile import NoveltyPatch
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.novelty import NoveltySpec
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import full_resolution
from pixnet._sdata.store.commit import CommittedError
from pixnet._sdata.store.element_store import put, record_entries, write_mpp
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import MapWriter, store_level
from pixnet._sdata.store.workspace import DONE, JOURNAL, WORK

OS = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "fsync", "open")
FREEING = ("unlink", "remove", "rmdir")  # what a full disk does not hinder
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Counts the steps below a folder while it is entered, and fails at one of them.

    Parameters
    ----------
    folder
        Steps elsewhere do not count.
    at
        The step to fail at, from 0; None: none.
    kill
        End the process there, else raise that the disk is full.
    lasting
        The disk stays full.
    """

    def __init__(self, folder: Path, at: int | None = None, kill: bool = False, lasting: bool = False) -> None:
        self.folder, self.at, self.kill, self.lasting = str(folder), at, kill, lasting
        self.steps: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Faults:
        self._saved = [(os, name, getattr(os, name)) for name in OS]
        self._saved += [(module, "open", module.open) for module in (io, builtins)]
        for name in OS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        for module in (io, builtins):
            module.open = self._opener(module.open)
        return self

    def __exit__(self, *_) -> None:
        for module, name, original in self._saved:
            setattr(module, name, original)

    def step(self, what: str, path: object, halfway=lambda: None) -> None:
        with self._lock:
            k = len(self.steps)
            self.steps.append(f"{what} {path}")
            hit = self.at is not None and (k == self.at or (self.lasting and k > self.at and what not in FREEING))
        if hit:
            halfway()
            if self.kill:
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")

    def _wrapped(self, name, original):
        @functools.wraps(original)
        def call(path, *args, **kwargs):
            inside = isinstance(path, int) or kwargs.get("dir_fd") is not None or str(path).startswith(self.folder)
            if inside and not (name == "open" and not args[0] & WRITING):
                self.step(name, path)
            return original(path, *args, **kwargs)

        return call

    def _opener(self, original):
        @functools.wraps(original)
        def call(path, mode="r", *args, **kwargs):
            if not str(path).startswith(self.folder) or not set(mode) & set("wax+"):
                return original(path, mode, *args, **kwargs)
            self.step("create", path)
            return _File(original(path, mode, *args, **kwargs), self, path)

        return call


class _File:
    """A file whose writes are steps; a write that fails leaves half of itself."""

    def __init__(self, file, faults, path) -> None:
        self._file, self._faults, self._path = file, faults, path

    def write(self, data):
        self._faults.step("write", self._path, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._file, name)


# what is written -------------------------------------------------------------------------------------------------------


def table(value):
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 2), "instance_id": [0, 1]}, index=["a", "b"])
    data = ad.AnnData(np.full((2, 1), value, np.float32), obs=obs)
    return TableModel.parse(data, region="spots", region_key="region", instance_key="instance_id")


def put_table(sdata, value):
    put(sdata, "counts", table(value), overwrite=True, entries={"tables": {"counts": {"value": value}}})


def put_mask(sdata, value):
    labels = Labels2DModel.parse(np.full((8, 8), value, np.uint8), dims=("y", "x"))
    put(sdata, "mask", labels, overwrite=True, entries={"masks": {"he": "mask"}, "images": {"mask": {"value": value}}})


def write_map_and_others(sdata, value):
    """With a table and an image of novelty, which go with the map."""
    write_map(sdata, value, {"beside": table(value)}, NoveltySpec("novelty", (2, 2), dict(IDENTITY)))


def write_map(sdata, value, tables=None, novelty=None):
    spec = MapSpec(["a", "__total__"], (16, 16), 8, (2,), dict(IDENTITY), novelty)
    writer = MapWriter.open(sdata, "map", spec, {"value": value}, overwrite=True)
    try:
        for i, j in ((0, 0), (1, 1)):
            writer.arrays[0][:, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8] = value
            writer.mark(i, j, [NoveltyPatch(Box(i, j, 1, 1), np.full((1, 1), value, np.float32))])
        for i, j in writer.level_tasks(1, 2, [(0, 0), (1, 1)], 8):
            store_level(*writer.arrays, 2, i, j)
        writer.finish(sdata, {"images": {"map": {"value": value}}}, tables)
    except OSError:
        if not writer.committed:
            writer.discard()
        raise


def discard_map(sdata, value):
    """Write a map but for its end, and give it up, as on a full disk."""
    writer = MapWriter.open(sdata, "map", MapSpec(["a"], (32, 8), 8, (), dict(IDENTITY)), {"value": value}, resume=True)
    for i in range(4):
        writer.arrays[0][:, i * 8 : i * 8 + 8] = value
        writer.mark(i, 0)
    writer.discard()


def write_pixel_size(sdata, value):
    write_mpp(sdata, "he", value / 10)


def write_record(sdata, value):
    record_entries(sdata, {"images": {"he": {"value": value}}})


IDENTITY = {"global": Identity()}
WRITERS = {
    "table": ("counts", put_table),
    "mask": ("mask", put_mask),
    "map": ("map", write_map),
    "map and others": ("map", write_map_and_others),
    "pixel size": (None, write_pixel_size),
    "record": (None, write_record),
}


def state(sdata, key):
    """What an object holds of an element, and what is recorded of it."""
    record = sdata.attrs.get("pixnet", {})
    recorded = [record.get(role, {}).get(key or "he") for role in ("tables", "images")]
    recorded.append(float(sdata["beside"].X[0, 0]) if "beside" in sdata else None)  # the map's table goes with it
    recorded.append(float(np.nanmax(sdata["novelty"])) if "novelty" in sdata else None)  # and its novelty
    if key is None or key not in sdata:
        return (None, *recorded)
    element = sdata[key]
    values = np.asarray(element.X if isinstance(element, ad.AnnData) else full_resolution(element).values)
    (value,) = np.unique(values[~np.isnan(values)]).tolist()  # never a mixture
    if key == "map":
        assert np.isnan(values).sum() == 2 * 128
        assert np.nanmax(element["scale1"]["image"].values) == value
    return (value, *recorded)


def stored_state(path, key):
    """The same of a store as anybody opens it, and what else it must agree on."""
    sdata = sd.read_zarr(path)
    assert sdata.attrs["mine"] == 1
    assert {"he"} <= set(sdata.images) <= {"he", "map", "novelty"}
    ome, repeated = (
        group.attrs.get("ome") for group in (zarr.open_group(path / "images/he"), zarr.open_group(path)["images/he"])
    )
    assert ome == repeated  # the consolidated metadata
    assert zarr.open_group(path).metadata.consolidated_metadata is not None
    return (*state(sdata, key), find_mpp(sdata, "he"))


def leftovers(path):
    return [p for pattern in (WORK, "*.partial") for p in path.rglob(pattern)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores with the image, and with or without an old element to replace; and with the new one."""

    @functools.cache
    def make(what, *values):
        path = tmp_path_factory.mktemp("base") / "s.zarr"
        image = Image2DModel.parse(np.ones((3, 16, 16), np.uint8), dims=("c", "y", "x"))
        SpatialData(images={"he": image}, attrs={"mine": 1}).write(path)
        for value in values:
            WRITERS[what][1](sd.read_zarr(path), value)
        return path

    return make


class Trial:
    """One kind of write to a store with the value 1 (or without one): it brings the value 2."""

    def __init__(self, stores, tmp_path, what, before):
        self.what, (self.key, self.write) = what, WRITERS[what]
        self.base, self.folder = stores(what, *before), tmp_path
        self.old, self.new = stored_state(self.base, self.key), stored_state(stores(what, *before, 2), self.key)
        assert self.old != self.new
        path = self.copy("dry")
        with Faults(path) as faults:
            self.write(sd.read_zarr(path), 2)
        self.steps = faults.steps
        journal = [k for k, step in enumerate(self.steps) if JOURNAL in step]
        self.critical = range(journal[0], journal[-1] + 2) if journal else range(len(self.steps))

    def copy(self, name):
        path = self.folder / f"{name}.zarr"
        shutil.copytree(self.base, path)
        return path

    @property
    def chosen(self):
        """The steps from the journal on, and a few before and after."""
        others = [k for k in range(len(self.steps)) if k not in self.critical]
        return sorted([*self.critical, *others[:: max(1, len(others) // 4)]])

    def check(self, path, sdata):
        """Ask whether the new element is there, and that it or the old one is whole and on record, and that nothing is left over."""
        check_sdata(sdata)  # what any pixnet function does first
        found = stored_state(path, self.key)
        assert found in (self.old, self.new)
        if self.key is not None:
            assert state(sdata, self.key) == found[:-1]
        assert leftovers(path) == []
        shutil.rmtree(path)
        return found == self.new


CASES = [(what, before) for what in WRITERS for before in ((), (1,))]
QUICK = {("mask", (1,)), ("pixel size", ())}
QUICK_KILLS = {("map and others", (1,)), ("table", ()), ("pixel size", ())}


def marked(quick):
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in CASES]


def fail_with_full_disk(trial, steps, lasting):
    outcomes = set()
    for k in steps:
        path = trial.copy(k)
        sdata, raised = sd.read_zarr(path), None
        with Faults(path, at=k, lasting=lasting):
            try:
                trial.write(sdata, 2)
            except OSError as error:
                raised = error
        sd.read_zarr(path)  # it opens in any case
        is_new = trial.check(path, sdata)
        told = raised is None or isinstance(raised, CommittedError)
        assert is_new == told, (trial.steps[k], raised)  # the message tells the truth
        outcomes.add(is_new)
    assert outcomes == {False, True}


@pytest.mark.parametrize(("what", "before"), marked(QUICK))
def test_a_full_disk_at_any_step(stores, tmp_path, what, before):
    trial = Trial(stores, tmp_path, what, before)
    fail_with_full_disk(trial, trial.chosen, lasting=True)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "before"), CASES)
def test_an_error_at_really_any_step(stores, tmp_path, what, before):
    trial = Trial(stores, tmp_path, what, before)
    fail_with_full_disk(trial, range(len(trial.steps)), lasting=False)


@pytest.fixture(scope="module")
def writer():
    """A process that has imported everything and used nothing, so that it can fork: see the end of this file."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def write(what, path, at):
            process.stdin.write(f"{what}\t{path}\t{at}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ended\n"

        yield write
        process.stdin.close()


def serve():
    """Write as asked for, each time in a process of its own that is killed at a step."""
    for line in sys.stdin:
        what, path, at = line.rstrip("\n").split("\t")
        if os.fork() == 0:
            try:
                sdata = sd.read_zarr(path)
                with Faults(Path(path), at=int(at), kill=True):
                    (discard_map if what == "discarded map" else WRITERS[what][1])(sdata, 2)
            finally:
                os._exit(0)
        os.wait()
        print("ended", flush=True)


def kill(trial, writer, steps):
    outcomes = set()
    for k in steps:
        path = trial.copy(k)
        writer(trial.what, path, k)
        opened = sd.read_zarr(path)
        if trial.key == "map":  # what is not committed waits for resume=True, until the map is asked for again
            for folder in (path / WORK).glob("*/"):
                if not (folder / JOURNAL).exists():
                    (folder / DONE).unlink(missing_ok=True)
        outcomes.add(trial.check(path, opened))
    assert outcomes == {False, True}


@pytest.mark.parametrize(("what", "before"), marked(QUICK_KILLS))
def test_a_kill_at_any_step(stores, writer, tmp_path, what, before):
    trial = Trial(stores, tmp_path, what, before)
    # between two of these a kill leaves the same files, but for a half-written one in the work folder
    telling = ("rename", "replace", "mkdir", "unlink")
    kill(
        trial,
        writer,
        [k for k in trial.chosen if trial.steps[k].startswith(telling) or k not in trial.critical],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("what", "before"), CASES)
def test_a_kill_at_really_any_step(stores, writer, tmp_path, what, before):
    trial = Trial(stores, tmp_path, what, before)
    kill(trial, writer, range(len(trial.steps)))


def test_a_kill_while_a_map_is_discarded(stores, writer, tmp_path):
    """What is half deleted is not resumed: it would have holes."""
    base, path = stores("map"), tmp_path / "dry.zarr"
    shutil.copytree(base, path)
    with Faults(path) as faults:
        discard_map(sd.read_zarr(path), 2)
    (end,) = [k for k, step in enumerate(faults.steps) if step.startswith("unlink") and step.endswith(DONE)]
    resumed = 0
    for k in range(end, len(faults.steps)):
        path = tmp_path / f"{k}.zarr"
        shutil.copytree(base, path)
        writer("discarded map", path, k)
        again = MapWriter.open(
            sd.read_zarr(path), "map", MapSpec(["a"], (32, 8), 8, (), dict(IDENTITY)), {"value": 2}, resume=True
        )
        for i, _ in again.done:
            assert (again.arrays[0][:, i * 8 : i * 8 + 8] == 2).all()
        resumed += bool(again.done)
        again.discard()
        assert leftovers(path) == []
    assert resumed == 1  # killed before anything was deleted


# models ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "kill"])
def test_a_model_file_is_old_or_new(tmp_path, monkeypatch, how):
    """Safetensors writes the file itself: that it cannot, or half of it, is a step as well."""
    import safetensors.torch

    from pixnet.models import PixNet

    model = PixNet(["OLD"], mpp=0.5, pretrained=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    path, original = folder / "m.safetensors", safetensors.torch.save_file

    def save_file(tensors, filename, metadata):
        original(tensors, filename, metadata=metadata)
        active.step("write", filename, lambda: os.truncate(filename, 100))

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with Faults(folder) as active:
        model.save(path)
    steps, old = len(active.steps), path.read_bytes()
    model.history.append({"epoch": 1})
    with Faults(folder) as active:
        model.save(path, overwrite=True)
    new, found = path.read_bytes(), set()
    assert old != new
    for k in range(steps):
        path.write_bytes(old)
        if how == "full":
            with Faults(folder, at=k) as active, contextlib.suppress(OSError):
                model.save(path, overwrite=True)
        elif hasattr(os, "fork"):
            if os.fork() == 0:
                try:
                    with Faults(folder, at=k, kill=True) as active:
                        model.save(path, overwrite=True)
                finally:
                    os._exit(0)
            os.wait()
        found.add(path.read_bytes())
        with Faults(folder) as active:  # whatever is left beside it goes with the next save
            model.save(path, overwrite=True)
        assert list(folder.iterdir()) == [path]
    assert old in found
    assert found <= {old, new}


if __name__ == "__main__":
    serve()
