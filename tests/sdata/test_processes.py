"""Two processes write to one store at the same time: nothing is lost, and no number is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel

import pixnet as px
from pixnet._sdata.pixel_size import get_mpp
from pixnet._sdata.store.workspace import WORK, store_lock

SIZE = 128


def make_slide():
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (3, SIZE, SIZE), dtype=np.uint8)
    pixels[:, : SIZE // 4] = 245
    images = {name: Image2DModel.parse(pixels, dims=("c", "y", "x")) for name in ("he", "a", "b")}
    xy = rng.uniform(20, SIZE - 20, (12, 2))
    return SpatialData(images=images, shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=9.0)})


class MeanColour(torch.nn.Module):
    """An encoder of mean colours: quick."""

    strides, channels = (4, 8), (3, 3)

    def forward(self, image):
        fine = torch.nn.functional.avg_pool2d(image, 4)
        return [fine, torch.nn.functional.avg_pool2d(fine, 2)]


def make_model():
    torch.manual_seed(0)
    return px.models.PixNet(["A", "B"], encoder=MeanColour(), mpp=0.5, window=64, halo=64)


def expected():
    """The table of a map in memory."""
    sdata = make_slide()
    px.pp.set_mpp(sdata, "he", 0.5)
    px.tl.predict(sdata, make_model(), image_key="he", mask_key=False)
    px.tl.aggregate(sdata, "spots", image_key="he_genes")
    return sdata["spots_genes"].X


def work(path, who, rounds):
    """Mixed calls on one object that was read at the start; each process has names of its own, and one they share."""
    torch.set_num_threads(1)
    px.settings.progress = False
    sdata, model, right = sd.read_zarr(path), make_model(), np.load(Path(path).parent / "right.npy")
    px.pp.set_mpp(sdata, "he", 0.5)
    for n in range(int(rounds)):
        px.pp.set_mpp(sdata, who, 0.5 + n / 100)
        if n % 2 == 0:
            px.tl.predict(sdata, model, image_key="he", mask_key=False, key_added=f"{who}_map", overwrite=True)
        px.tl.aggregate(sdata, "spots", image_key=f"{who}_map", key_added=f"{who}_table_{n}")
        np.testing.assert_array_equal(sdata[f"{who}_table_{n}"].X, right)
        px.pp.tissue_mask(sdata, "he", key_added=f"{who}_mask", overwrite=True)
        # one name for both: the other's map may be in its place, which is refused, or is the right one
        try:
            px.tl.predict(sdata, model, image_key="he", mask_key=False, key_added="map", overwrite=True)
            table = px.tl.aggregate(sdata, "spots", image_key="map", inplace=False)
            np.testing.assert_array_equal(table.X, right)
        except RuntimeError as error:
            if "another process is writing" not in str(error):
                raise
    print("done")


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_rounds_of_mixed_calls(tmp_path, rounds):
    path = tmp_path / "s.zarr"
    make_slide().write(path)
    np.save(tmp_path / "right.npy", expected())
    env = os.environ | {"OMP_NUM_THREADS": "1", "PIXNET_SCRATCH_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", __file__, str(path)]
    both = [
        subprocess.Popen(
            [*command, who, str(rounds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for who in ("a", "b")
    ]
    for process in both:
        out, err = process.communicate(timeout=60 + 60 * rounds)
        assert (process.returncode, out) == (0, "done\n"), err[-3000:]
    sdata, right = sd.read_zarr(path), np.load(tmp_path / "right.npy")
    assert set(sdata.images) == {"he", "a", "b", "a_map", "b_map", "map"}
    assert set(sdata.labels) == {"a_mask", "b_mask"}
    assert set(sdata.tables) == {f"{who}_table_{n}" for who in "ab" for n in range(rounds)}
    for table in sdata.tables.values():
        np.testing.assert_array_equal(table.X, right)
    assert [get_mpp(sdata, key) for key in ("he", "a", "b")] == [0.5, *[0.5 + (rounds - 1) / 100] * 2]
    record = sdata.attrs["pixnet"]
    assert set(record["images"]) >= {"a_map", "b_map", "map"}
    px.tl.aggregate(sdata, "spots", image_key="map", key_added="last")
    np.testing.assert_array_equal(sdata["last"].X, right)
    assert not (path / WORK).exists()
    assert not list(path.rglob("*.partial"))


LOCKING = """
import sys
from pathlib import Path
from pixnet._sdata.store.workspace import store_lock
file = Path(sys.argv[1]) / "count"
for _ in range(300):
    with store_lock(Path(sys.argv[1])):
        file.write_text(str(int(file.read_text()) + 1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_the_lock_lets_one_in(tmp_path):
    (tmp_path / "count").write_text("0")
    with store_lock(tmp_path):
        both = [subprocess.Popen([sys.executable, "-c", LOCKING, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in both] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "900"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


if __name__ == "__main__":
    work(*sys.argv[1:])
