"""Features on disk: what they are, that they are found again, and what goes wrong with disks and slides."""

from __future__ import annotations

import errno
import shutil

import dask
import numpy as np
import pytest
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

import pixnet as px
from pixnet._core.predict.map_grid import Box
from pixnet._core.train import feature_store
from pixnet._core.train.augment import Version, turn, turn_back
from pixnet._core.train.encoder_stages import StageRunner
from pixnet._core.train.feature_maps import FeatureMaps
from pixnet._core.train.feature_store import Wanted, forget_features, slide_features
from pixnet._core.train.trainer import Trainer
from pixnet._sdata.slide import Slide

from .conftest import QUICK, coloured_slide

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(autouse=True)
def _nothing_is_there_yet():
    forget_features()
    yield
    forget_features()


def train(*slides, **options):
    return px.tl.train(list(slides) if len(slides) > 1 else slides[0], **QUICK | {"max_epochs": 1} | options)


@pytest.fixture
def runs(monkeypatch):
    """Windows in which an encoder runs."""
    seen = []
    original = StageRunner.run

    def run(self, stage, version, window, pixels):
        seen.append(window)
        return original(self, stage, version, window, pixels)

    monkeypatch.setattr(StageRunner, "run", run)
    return seen


def state(model):
    return model.members.state_dict()


def assert_same(one, other):
    for (name, a), b in zip(state(one).items(), state(other).values()):
        assert torch.equal(a, b), name


# what they are -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return px.models.PixNet(["A"]).encoder.eval()


@pytest.mark.parametrize(("number", "scheduler"), [(0, "synchronous"), (3, "threads")])
def test_they_are_those_of_one_pass_over_the_slide(encoder, number, scheduler):
    """By stages, in small windows, asked for in two parts, here or by tasks of dask."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 320, 256)).astype(np.uint8)
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))})
    px.pp.set_mpp(sdata, "he", 0.5)
    slide = Slide.open(sdata)
    version = Version(number, 0.0)
    with dask.config.set(scheduler=scheduler):
        for box in (Box(0, 0, 128, 100), Box(0, 0, 320, 256)):
            wanted = Wanted(slide.reader(slide.grid(0.5, 4)), [box], [version])
            (found,) = slide_features([wanted], encoder, [1, 2, 3, 4], window=128, halo=64, device="cpu")
    edge = 448  # as much white as any pixel sees
    image = np.pad(pixels, ((0, 0), (edge, edge), (edge, edge)), constant_values=255)
    image = turn(torch.from_numpy(image).float()[None] / 255, version.symmetry)
    with torch.inference_mode():
        expected = [turn_back(f, version.symmetry)[0] for f in encoder(image)]
    for level, stride in enumerate(encoder.strides):
        if level:
            own = found.maps[version].read(level, Box(0, 0, 320, 256)).transpose(2, 0, 1)
            whole = expected[level][:, edge // stride : -edge // stride, edge // stride : -edge // stride].numpy()
            np.testing.assert_allclose(own, whole, rtol=5e-3, atol=5e-3 * np.abs(whole).max())


def test_stain_varies_smoothly_and_does_not_depend_on_the_window():
    pixels = np.full((3, 600, 700), 150, np.uint8)
    version = Version(1, 0.2)
    whole = version.restained(pixels, Box(-64, 100, 600, 700))
    part = version.restained(pixels[:, 50:150, 200:500], Box(-14, 300, 100, 300))
    np.testing.assert_array_equal(part, whole[:, 50:150, 200:500])
    assert whole.std() > 3
    assert np.abs(np.diff(whole.astype(int), axis=2)).max() <= 2
    assert (version.restained(np.full_like(pixels, 255), Box(0, 0, 600, 700)) > 200).all()


def test_maps_are_written_in_parts_and_repeat_their_edge(tmp_path):
    maps = FeatureMaps(tmp_path / "maps", Box(-64, -64, 256, 192), {0: 16}, {0: 3})
    values = np.arange(8 * 4 * 3, dtype=np.float16).reshape(8, 4, 3)
    maps.write(0, Box(64, 0, 128, 64), values)
    np.testing.assert_array_equal(maps.read(0, Box(64, 0, 128, 64)), values)
    np.testing.assert_array_equal(maps.read(0, Box(96, 32, 32, 16)), values[2:4, 2:3])
    maps.forget()
    beyond = maps.read(0, Box(160, 0, 96, 64))
    np.testing.assert_array_equal(beyond, values[[6, 7, 7, 7, 7, 7]])
    assert maps.intact()
    maps.remove()
    assert not maps.intact()


# found again -----------------------------------------------------------------------------------------------------------


def test_a_second_training_finds_them_and_gives_what_one_that_computes_them_gives(runs):
    one, two = coloured_slide(1), coloured_slide(2)
    train(one, two)
    assert runs
    runs.clear()
    other = train(one, two, seed=1)
    fine_tuned = train(one, two, model=other, **dict.fromkeys(("encoder", "hidden", "window", "halo")))
    assert fine_tuned.history[-1]["run"] == 2
    assert not runs
    forget_features()
    assert_same(train(one, two, seed=1), other)
    assert runs


def test_every_fold_of_a_cross_validation_finds_them(runs):
    slides = [coloured_slide(seed) for seed in (1, 2, 3)]
    options = QUICK | {"max_epochs": 1, "refit": False}
    px.tl.cross_validate(slides, groups=["a", "b", "c"], **options)
    assert len(runs) == len(set(runs)) * 3  # each slide once


def test_a_slide_that_changed_is_computed_again(runs):
    slide = coloured_slide(1)
    pixels = np.asarray(slide["he"].data).copy()
    read = dask.delayed(pixels.copy, pure=False)()
    slide["he"].data = dask.array.from_delayed(read, pixels.shape, pixels.dtype, name="changed-in-place")
    train(slide)
    n = len(runs)
    pixels[:, 300:310, 300:310] = 0
    train(slide)
    assert len(runs) == 2 * n


def test_files_that_another_process_removed_are_computed_again(runs):
    slide = coloured_slide(1)
    first = train(slide)
    n = len(runs)
    for folder in px.settings.scratch_dir.glob("pixnet-*/features-*"):
        shutil.rmtree(folder)
    assert_same(train(slide), first)
    assert len(runs) == 2 * n


# disks -----------------------------------------------------------------------------------------------------------------


def test_a_disk_that_cannot_hold_them_is_refused_before_anything_is_computed(runs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"take 0\.\d MB.*scratch_dir.*PIXNET_SCRATCH_DIR.*variants=1") as caught:
        train(coloured_slide(1))
    assert caught.value.errno == errno.ENOSPC
    assert not runs


def test_room_is_made_by_deleting_what_was_asked_for_longest_ago(monkeypatch):
    train(coloured_slide(1))
    train(coloured_slide(2))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, int(feature_store.SPARE) + 10_000)
    )
    train(coloured_slide(2), variants=2)
    assert len(feature_store._FEATURES) == 1


def test_a_disk_that_fills_up_is_an_error_that_tells_what_to_do(monkeypatch):
    write = FeatureMaps.write

    def full(self, level, part, values):
        if level:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, level, part, values)

    slide = coloured_slide(1)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureMaps, "write", full)
        with pytest.raises(OSError, match="set it to a folder with more room"):
            train(slide)
    train(slide)


def test_a_scratch_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(px.settings, "scratch_dir", tmp_path / "file" / "scratch")
    with pytest.raises(OSError, match="no folder can be made in settings.scratch_dir"):
        train(coloured_slide(1))


# interruptions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [2, 5])
def test_an_interrupted_training_goes_on_to_the_same_weights(passes, monkeypatch, caplog):
    """In the run with held-out shapes, and in the one on everything."""
    monkeypatch.setattr("pixnet._logging.logger.propagate", True)
    slide, options = coloured_slide(1), {"max_epochs": 3, "patience": 3, "variants": 2, "lr": 3e-3}
    expected = train(slide, **options)
    assert expected.provenance["epochs"] == 3
    epoch, made = Trainer._epoch, []

    def interrupted(self, number):
        if len(made) == passes:
            raise KeyboardInterrupt
        made.append(number)
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(slide, **options)
    assert "the same call with resume=True goes on" in caplog.text
    left = list((px.settings.scratch_dir / "pixnet-training").iterdir())
    assert len(left) == 1
    rest = []
    monkeypatch.setattr(Trainer, "_epoch", lambda self, number: rest.append(number) or epoch(self, number))
    found = train(slide, resume=True, **options)
    assert len(made) + len(rest) == len(expected.history) + expected.provenance["epochs"]
    assert_same(found, expected)
    assert found.history == expected.history
    assert found.evidence == expected.evidence
    assert not (px.settings.scratch_dir / "pixnet-training").exists()
    rest.clear()
    assert_same(train(slide, resume=True, **options), expected)  # there is nothing to go on with
    assert rest[0] == 1
