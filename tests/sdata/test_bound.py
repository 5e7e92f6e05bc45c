"""Pixels on disk that are gone, or others than when the object was read, are refused and never read as fill values."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Identity

import pixnet as px
from pixnet._core.stored import check_stored, stored_arrays
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.store.element_store import put
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import MapWriter


def write_map(sdata, genes=("A", "B"), value=1.0, key="he_genes", shape=(64, 64)):
    """A gene map as pixnet stores it, with one empty corner."""
    spec = MapSpec([*genes, "__total__"], shape, 16, (), {"global": Identity()})
    job = {"genes": list(genes), "value": value}
    writer = MapWriter.open(sdata, key, spec, job, overwrite=True)
    for i in range(4):
        for j in range(4):
            if (i, j) != (3, 3):
                writer.arrays[0][:, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16] = value
                writer.mark(i, j)
    writer.finish(sdata)


def slide(size=64):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 250, (3, size, size), dtype=np.uint8)
    chunks = (3, 32, 32)
    return SpatialData(
        images={"he": Image2DModel.parse(da.from_array(pixels, chunks), dims=("c", "y", "x"))},
        labels={"he_tissue": Labels2DModel.parse(np.ones((size, size), np.uint8), dims=("y", "x"))},
        shapes={"spots": ShapesModel.parse(np.array([[20.0, 20.0], [40.0, 30.0]]), geometry=0, radius=9.0)},
    )


@pytest.fixture
def backed(tmp_path):
    slide().write(tmp_path / "s.zarr")
    sdata = sd.read_zarr(tmp_path / "s.zarr")
    px.pp.set_mpp(sdata, "he", 0.5)
    write_map(sdata)
    return sdata


@pytest.fixture(scope="module")
def model():
    return px.models.PixNet(["A", "B"], mpp=0.5, pretrained=False, window=64, halo=64)


def what_reads(model):
    """Every function that reads pixels, as a call on an object."""
    return {
        "predict": lambda s: px.tl.predict(s, model, key_added="new"),
        "lazy": lambda s: px.tl.predict(s, model, inplace=False),
        "aggregate": lambda s: px.tl.aggregate(s, "spots", inplace=False),
        "aggregate labels": lambda s: px.tl.aggregate(s, "he_tissue", inplace=False),
        "tissue_mask": lambda s: px.pp.tissue_mask(s, inplace=False),
        "make_grid": lambda s: px.pp.make_grid(s, 8, inplace=False),
        "gene_map": lambda s: px.pl.gene_map(s, "A"),
    }


CALLS = list(what_reads(None))
MAP_CALLS = ["aggregate", "aggregate labels", "gene_map"]


def refused(call, sdata, match, error=(FileNotFoundError, RuntimeError)):
    with pytest.raises(error, match=match):
        call(sdata)


@pytest.mark.parametrize("how", ["moved", "deleted"])
@pytest.mark.parametrize("name", CALLS)
def test_a_store_that_is_gone(backed, model, name, how):
    crop = backed.subset(["he", "he_tissue", "spots", "he_genes"])  # in memory, bound to the store
    if how == "moved":
        backed.path.rename(backed.path.with_name("elsewhere.zarr"))
    else:
        shutil.rmtree(backed.path)
    for sdata in (backed, crop):
        refused(what_reads(model)[name], sdata, "gone|no longer at .*moved or deleted.*read_zarr", FileNotFoundError)
    assert not backed.path.exists()


@pytest.mark.parametrize("name", MAP_CALLS)
@pytest.mark.parametrize(
    "other", [{"genes": ("C", "A")}, {"genes": ("A", "B", "C")}, {"value": 2.0}, {"shape": (64, 80)}], ids=str
)
def test_a_map_that_another_process_replaced(backed, model, name, other):
    write_map(sd.read_zarr(backed.path), **other)
    refused(what_reads(model)[name], backed, "'he_genes' was replaced at .*read_zarr", RuntimeError)
    what_reads(model)[name](sd.read_zarr(backed.path)) if "A" in other.get("genes", "A") else None


@pytest.mark.parametrize("name", MAP_CALLS)
def test_a_map_that_spatialdata_replaced(backed, model, name):
    other = sd.read_zarr(backed.path)
    image = Image2DModel.parse(np.ones((3, 64, 64), np.float32), dims=("c", "y", "x"), c_coords=["C", "D", "__total__"])
    del other["he_genes"]
    other.delete_element_from_disk("he_genes")
    other["he_genes"] = image
    other.write_element("he_genes")
    refused(what_reads(model)[name], backed, "'he_genes' was replaced", RuntimeError)


def test_the_same_map_again_is_the_same(backed, model):
    write_map(sd.read_zarr(backed.path))
    px.tl.aggregate(backed, "spots")


@pytest.mark.parametrize("name", CALLS)
def test_an_image_that_another_process_replaced(backed, model, name):
    other = sd.read_zarr(backed.path)
    for key, element in (("he", slide(96)["he"]), ("he_tissue", slide(96)["he_tissue"])):
        put(other, key, element, overwrite=True)
    if name not in ("aggregate", "gene_map"):  # which do not look at the slide, or draw it where it lies
        refused(what_reads(model)[name], backed, "was replaced at .*shape", RuntimeError)


def test_channels_of_an_image(backed):
    image = Image2DModel.parse(np.ones((2, 8, 8), np.float32), dims=("c", "y", "x"), c_coords=["p", "q"])
    backed["stains"] = image
    backed.write_element("stains")
    mine = sd.read_zarr(backed.path)
    check_bound(mine["stains"], "x")
    other = sd.read_zarr(backed.path)
    other["stains"] = other["stains"].assign_coords(c=["r", "p"])
    other.write_channel_names("stains")
    refused(
        lambda s: px.tl.aggregate(s, "spots", image_key="stains", inplace=False), mine, "has channels 'p', 'q' in this"
    )
    with pytest.raises(RuntimeError, match=r"sdata\.write_channel_names"):
        check_bound(mine["stains"], "image 'stains'")
    check_bound(mine["stains"].isel(c=[0]) + 1, "derived")  # names of what was made of it are its own


@pytest.mark.parametrize("name", MAP_CALLS)
def test_a_map_that_lost_chunks(backed, model, name):
    """As a copy that was cut short leaves it: the missing values would read as background."""
    chunk = backed.path / "images" / "he_genes" / "s0" / "c" / "0" / "1" / "1"
    chunk.unlink()
    for sdata in (backed, sd.read_zarr(backed.path)):
        refused(what_reads(model)[name], sdata, "lacks 1 of the 15 chunks.*overwrite=True", FileNotFoundError)


def test_it_is_gone_while_it_is_read(backed, model, monkeypatch):
    from pixnet.tl import _aggregate

    original = _aggregate.zonal_statistics

    def during(*args, **kwargs):
        found = original(*args, **kwargs)
        shutil.rmtree(backed.path / "images" / "he_genes")
        return found

    monkeypatch.setattr(_aggregate, "zonal_statistics", during)
    refused(lambda s: px.tl.aggregate(s, "spots"), backed, "no longer at", FileNotFoundError)
    assert "spots_genes" not in backed


def test_a_lazy_map_of_a_slide_that_is_gone(backed, model):
    lazy = px.tl.predict(backed, model, inplace=False)
    travelled = pickle.loads(pickle.dumps(lazy.data))
    lazy.values  # noqa: B018
    backed.path.rename(backed.path.with_name("elsewhere.zarr"))
    for data in (lazy.data, travelled):
        with pytest.raises(FileNotFoundError, match="image 'he' is no longer at"):
            data.compute(scheduler="synchronous")


def test_a_slide_that_goes_while_it_is_predicted(backed, model, monkeypatch):
    from pixnet._core.slide.reader import SlideReader

    original = SlideReader.check

    def check(self):
        if backed.path.exists():
            backed.path.rename(backed.path.with_name("elsewhere.zarr"))
        original(self)

    monkeypatch.setattr(SlideReader, "check", check)
    with pytest.raises(FileNotFoundError, match="no longer at"):
        px.tl.predict(backed, model, key_added="new")
    assert not backed.path.exists()  # nothing is left where it was


def test_what_is_checked_and_what_is_not(tmp_path):
    pixels = np.ones((3, 8, 8), np.uint8)
    check_stored(pixels, "x")
    check_stored(da.from_array(pixels), "x")
    memory = zarr.create_array(zarr.storage.MemoryStore(), data=pixels)
    check_stored(da.from_zarr(memory), "x")
    stored = zarr.create_array(tmp_path / "a.zarr", data=pixels, fill_value=np.nan if pixels.dtype.kind == "f" else 0)
    lazy = da.from_zarr(stored)
    for derived in (lazy, lazy + 1, lazy[:, 2:5], lazy.rechunk((1, 4, 4)), da.concatenate([lazy, lazy])):
        assert stored_arrays(derived) == [stored], "dask names the layers of from_zarr otherwise: see stored_arrays"
        check_stored(derived, "x")


# scratch --------------------------------------------------------------------------------------------------------------


CHILD = """
import pickle, sys
import numpy as np
import pixnet as px
from multiprocessing import get_context
sys.path.insert(0, sys.argv[1])
import test_bound as t

def predict():
    sdata = t.slide()
    px.pp.set_mpp(sdata, "he", 0.5)
    t.write_map(sdata)
    return sdata

if __name__ == "__main__":
    with get_context(sys.argv[2]).Pool(1) as pool:
        sdata = pool.apply(predict)
        pool.close()
        pool.join()
    for call in (
        lambda: np.nanmean(sdata["he_genes"].values) == 1.0,
        lambda: px.tl.aggregate(sdata, "spots", inplace=False).X[0, 0] == 1e4,
    ):
        try:
            print("right" if call() else "WRONG")
        except FileNotFoundError as error:
            print("goes with the process" in str(error) or "moved or deleted" in str(error))
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_map_made_in_a_child_process(tmp_path, method):
    if method == "fork" and sys.platform == "win32":
        pytest.skip("needs fork")
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    env = os.environ | {"PIXNET_SCRATCH_DIR": str(tmp_path / "scratch")}
    done = subprocess.run(
        [sys.executable, str(script), os.path.dirname(__file__), method], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"right", "True"}, done.stdout  # never a wrong number
    assert len(done.stdout.split()) == 2


def test_scratch_that_cannot_be_used(tmp_path, monkeypatch):
    from pixnet._core import scratch

    monkeypatch.setattr(scratch, "_scratch", None)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setattr(px.settings, "scratch_dir", folder)
        with pytest.raises(OSError, match=r"settings\.scratch_dir.*PIXNET_SCRATCH_DIR"):
            write_map(slide())
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_scratch_without_permission(tmp_path, monkeypatch):
    from pixnet._core import scratch

    monkeypatch.setattr(scratch, "_scratch", None)
    monkeypatch.setattr(px.settings, "scratch_dir", tmp_path / "x")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match=r"settings\.scratch_dir"):
            write_map(slide())
    finally:
        tmp_path.chmod(0o755)
