"""tl.predict, and the features of tl.train, on the workers of a real cluster of two processes."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import cloudpickle
import dask
import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from torch import nn

import pixnet as px
from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.portable_model import clear_cache
from pixnet._core.train.augment import Version
from pixnet._core.train.feature_maps import FeatureMaps
from pixnet._core.train.feature_store import Wanted, forget_features, slide_features
from pixnet._sdata.slide import Slide

distributed = pytest.importorskip("distributed")

GENES = ["A", "B", "C"]


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import this module


class TwoStages(nn.Module):
    """An encoder that reaches a few pixels, so that a slide of 80 windows has several units."""

    strides, channels, reach = (4, 8), (6, 8), MappingProxyType({4: 5, 8: 12})

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 6, 6, 4, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.coarse = nn.Sequential(nn.Conv2d(6, 8, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, image):
        fine = self.fine(image)
        return [fine, self.coarse(fine)]

    def stage(self, k, x):
        return [self.coarse(x)] if k else [self.fine(x)]


@pytest.fixture(scope="module", params=["whole", "staged"])
def model(request):
    torch.manual_seed(0)
    encoder = TwoStages()
    if request.param == "whole":
        encoder.reach = None
    net = px.models.PixNet(GENES, mpp=0.5, encoder=encoder, window=64, halo=64)
    torch.nn.init.normal_(net.members[0].last.weight, std=0.5)
    return net.eval()


@pytest.fixture
def backed(tmp_path):
    pixels = np.random.default_rng(1).integers(90, 220, (3, 500, 620), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=(2,), chunks=(3, 128, 128))
    sdata = SpatialData(images={"he": image})
    px.pp.set_mpp(sdata, "he", 0.5)
    sdata.write(tmp_path / "s.zarr")
    return sd.read_zarr(tmp_path / "s.zarr")


def tree_hash(path):
    """Names and bytes of all chunks (the metadata holds the map's name)."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name != "zarr.json"):
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()


def locally(sdata, model, **kwargs):
    """The bytes of a run on this process's threads, with as many torch threads as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with dask.config.set(scheduler="threads"):
            px.tl.predict(sdata, model, mask_key=False, key_added="local", **kwargs)
    finally:
        torch.set_num_threads(threads)
    return tree_hash(sdata.path / "images" / "local")


def _loaded():
    from pixnet._core.predict.portable_model import n_cached

    return os.getpid(), n_cached()


def test_workers_write_the_same_bytes(client, backed, model):
    expected = locally(backed, model, tile_size=64)
    client.run(torch.set_num_threads, 1)
    client.run(clear_cache)  # other tests leave models and encoders on the workers
    px.tl.predict(backed, model, mask_key=False, tile_size=64)
    assert tree_hash(backed.path / "images" / "he_genes") == expected
    held = client.run(_loaded)
    assert len({pid for pid, _ in held.values()} - {os.getpid()}) == 2
    assert max(models for _, models in held.values()) == 1  # one model on each worker that ran


def test_a_lazy_map_computes_on_workers(client, backed, model):
    px.tl.predict(backed, model, mask_key=False)
    lazy = px.tl.predict(backed, model, mask_key=False, inplace=False)
    np.testing.assert_allclose(lazy.compute().values, backed["he_genes"]["scale0"]["image"].values, rtol=1e-3)


def test_an_error_on_a_worker_is_the_callers(client, backed, model):
    chunk = next(p for p in (backed.path / "images" / "he" / "s0").rglob("c/0/1/3") if p.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:50])
    with pytest.raises(RuntimeError, match="of image 'he' could not be read"):
        px.tl.predict(backed, model, mask_key=False, tile_size=64)
    chunk.write_bytes(whole)
    px.tl.predict(backed, model, mask_key=False, tile_size=64, resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_worker_does_not_lose_the_run(client, backed, model):
    expected = locally(backed, model, tile_size=64)
    client.run(torch.set_num_threads, 1)
    victim = next(iter(client.run(os.getpid).values()))
    killed = []

    def kill():
        while (
            not (logs := list((backed.path / ".pixnet").glob("*/done.txt"))) or not logs[0].read_text().count("\n") > 3
        ):
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        killed.append(logs[0].read_text().count("\n"))

    thread = threading.Thread(target=kill)
    thread.start()
    px.tl.predict(backed, model, mask_key=False, tile_size=64)
    thread.join()
    assert killed
    assert killed[0] < 80  # of 80 tiles: it died in the middle
    assert tree_hash(backed.path / "images" / "he_genes") == expected
    assert victim not in client.run(os.getpid).values()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("model", ["staged"], indirect=True)
def test_workers_compute_features_also_when_one_dies(client, backed, model, monkeypatch):
    slide, versions = Slide.open(backed), Version.numbered(2, 0.1)
    wanted = Wanted(slide.reader(slide.grid(0.5, 4)), [Box(0, 0, 500, 620)], versions)

    def features():
        forget_features()
        (found,) = slide_features([wanted], model.encoder, [0, 1], window=64, halo=64, device="cpu")
        return [found.maps[version].array(level).copy() for version in versions for level in (0, 1)]

    with dask.config.set(scheduler="threads"):
        expected = features()
    client.run(torch.set_num_threads, 1)
    victim, write, written = next(iter(client.run(os.getpid).values())), FeatureMaps.write, []

    def counted(self, *args):
        written.append(args)
        if len(written) == 5:
            os.kill(victim, signal.SIGKILL)
        write(self, *args)

    monkeypatch.setattr(FeatureMaps, "write", counted)
    for own, other in zip(features(), expected):
        np.testing.assert_allclose(own, other, rtol=2e-3, atol=1e-3)
    assert victim not in client.run(os.getpid).values()
    forget_features()
