"""Stages on their own windows: the same map as one pass over the whole slide."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pixnet._core.parallel import in_threads
from pixnet._core.predict.map_grid import choose_map_grid
from pixnet._core.predict.portable_model import PortableModel
from pixnet._core.predict.staged import margins
from pixnet._core.predict.tile_runner import TileRunner, lazy_map
from pixnet._core.slide.grid import choose_grid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader
from pixnet.models import PixNet

SHAPE = (300, 460)
MARGIN = 512  # further than any encoder here reaches


class Small(nn.Module):
    """Three stages that reach less far than those of the default encoder."""

    strides, channels = (4, 8, 16), (6, 8, 10)

    def __init__(self, reach=None, kernel=3):
        super().__init__()
        self.reach = {4: 5, 8: 12, 16: 24} if reach is None else reach
        sizes = ((3, 6, 6, 4), (6, 8, 4, 2), (8, 10, 4, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, d, k, s, padding=1),
                nn.BatchNorm2d(d),
                nn.ReLU(),
                nn.Conv2d(d, d, kernel, padding=kernel // 2),
            )
            for c, d, k, s in sizes
        )

    def forward(self, image):
        maps = []
        for k in range(3):
            maps += self.stage(k, maps[-1] if maps else image)
        return maps

    def stage(self, k, x):
        return [self.stages[k](x)]


@pytest.fixture(autouse=True)
def _alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(**settings) -> PixNet:
    torch.manual_seed(0)
    settings = {"window": 64, "halo": 64, "encoder": Small()} | settings
    model = PixNet(["A", "B", "C"], mpp=0.5, pretrained=False, **settings).eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # features that differ from place to place, deep ones too
            nn.init.uniform_(module.weight, 1, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(model.members[0].last.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


def one_pass(model, pixels):
    """The map of one forward pass over a slide, white around it."""
    bottom, right = (-n % 64 for n in pixels.shape[1:])
    margin = MARGIN // model.config.zoom
    image = np.pad(pixels, [(0, 0), (margin, margin + bottom), (margin, margin + right)], constant_values=255)
    with torch.inference_mode():
        found = model(torch.from_numpy(image)[None].float() / 255, None, margin // model.stride)[0].numpy()
    height, width = (-(-n // model.stride) for n in pixels.shape[1:])
    return found[:, :height, :width]


@pytest.fixture(scope="module")
def truth(model, pixels):
    return one_pass(model, pixels)


def make_runner(model, pixels, mask=None, tile_size=None, out_mpp=None, batch=1):
    grid = choose_grid([(1.0, 1.0)], [pixels.shape[1:]], 0.5, 0.5, model.stride)
    tiles = choose_map_grid(grid, model.window, model.halo, out_mpp, tile_size, reach=model.reach)
    mask = mask or TissueMask.everywhere((pixels.shape[1] / model.stride, pixels.shape[2] / model.stride))
    portable = PortableModel(model)
    return TileRunner(SlideReader(pixels, grid), mask, portable, tiles, channels=None, n_channels=4, batch=batch)


def slanted(stride=4):
    mask = np.zeros((30, 46), bool)
    mask[4:17, 3:20] = True
    mask[21:24, 36:43] = True
    return TissueMask(mask, np.diag([stride / 10, stride / 10, 1.0]))


def whole(runner, ahead=map):
    found = np.full((4, *runner.grid.shape), np.nan, np.float32)
    for tile in runner.predict(runner.tiles(), ahead):
        if tile.values is not None:
            found[:, *tile.box.slices] = tile.values
    return found


def test_staged_maps_are_those_of_one_pass(model, pixels, truth):
    assert truth.std() / truth.mean() > 0.1
    found = whole(make_runner(model, pixels))
    np.testing.assert_allclose(found, truth, rtol=2e-4)
    assert np.quantile(np.abs(found / truth - 1), 0.99) < 1e-4  # 1e-6 as a rule; 9e-5 was seen once


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "efficientnet_lite0", "window": 128},
        {"encoder": "efficientnet_lite0", "zoom": 2},
        {"zoom": 2},
        {"zoom": 4},
        {"stride": 2},
        {"stride": 1, "members": 2},
    ],
)
def test_other_models_too(pixels, settings):
    own, part = make_model(**settings), pixels[:, :200, :300]
    assert own.reach is not None
    np.testing.assert_allclose(whole(make_runner(own, part)), one_pass(own, part), rtol=5e-4)


@pytest.mark.parametrize(("tile_size", "batch"), [(1, 1), (128, 3), (192, 1), (256, 2), (300, 1), (2000, 4)])
def test_tiles_and_batches_do_not_matter(model, pixels, truth, tile_size, batch):
    mask = slanted()
    found = whole(make_runner(model, pixels, mask, tile_size=tile_size, batch=batch))
    tissue = mask.window(0, 0, *found.shape[1:])
    assert np.array_equal(~np.isnan(found[0]), tissue)
    expected = whole(make_runner(model, pixels, mask))
    np.testing.assert_allclose(found[:, tissue], expected[:, tissue], rtol=1e-6)
    np.testing.assert_allclose(found[:, tissue], truth[:, tissue], rtol=2e-4)


@pytest.mark.parametrize("out_mpp", [4.0, 10.0, 5.3])
def test_coarser_maps_are_means(model, pixels, out_mpp):
    mask = slanted()
    fine = whole(make_runner(model, pixels, mask))
    runner = make_runner(model, pixels, mask, out_mpp=out_mpp)
    found, ratio = whole(runner), out_mpp / 2
    there = np.argwhere(~np.isnan(found[0]))
    assert len(there)
    weights = np.arange(max(fine.shape[1:]))
    for i, j in there[:: max(len(there) // 20, 1)]:
        y, x = (
            np.clip(np.minimum(weights + 1, (k + 1) * ratio) - np.maximum(weights, k * ratio), 0, None) for k in (i, j)
        )
        w = (y[: fine.shape[1], None] * x[None, : fine.shape[2]]) * ~np.isnan(fine[0])
        np.testing.assert_allclose(found[:, i, j], (np.nan_to_num(fine) * w).sum(axis=(1, 2)) / w.sum(), rtol=1e-4)


def test_lazy_tiles_are_the_stored_ones_and_share_their_units(model, pixels, monkeypatch):
    mask = slanted()
    runner = make_runner(model, pixels, mask)
    sent = pickle.dumps(runner)
    stored = whole(runner, lambda f, items: in_threads(f, items, 2))
    units, original = [], runner.source.features

    def features(unit, *arguments):
        units.append(unit)
        return original(unit, *arguments)

    monkeypatch.setattr(runner.source, "features", features)
    lazy = lazy_map(runner, "a")
    assert not units
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), stored)
    assert len(units) == len(set(units)) == 4
    lazy[:, 20:30, 20:30].compute(scheduler="synchronous")
    assert len(units) == len(set(units))  # kept
    again = lazy_map(pickle.loads(sent), "b")[:, 10:60, 20:90]
    np.testing.assert_array_equal(again.compute(scheduler="synchronous"), stored[:, 10:60, 20:90])


def test_glass_out_of_reach_does_not_run(model, pixels):
    mask = np.zeros((30, 46), bool)
    mask[4:5, 4:5] = mask[14:15, 22:23] = True
    runner = make_runner(model, pixels, TissueMask(mask, np.diag([0.4, 0.4, 1.0])))
    seen, read = [], runner.reader.read
    runner.reader.read = lambda *box: seen.append(box) or read(*box)
    whole(runner)
    height, width = (n + 2 * margins(model.reach)[0] for n in SHAPE)
    assert 0 < sum(box[2] * box[3] for box in seen) < 0.6 * height * width


def test_margins_add_up():
    assert margins({8: 33, 16: 136, 32: 256}) == [448, 288, 32]
    assert margins({4: 5}) == [4]


def test_what_two_units_need_is_computed_once(model, pixels):
    runner = make_runner(model, pixels)
    source, ran = runner.source, []
    encoder = runner.placed.model.ready(torch.device("cpu")).encoder
    stage = encoder.stage
    encoder.stage = lambda k, x: ran.append(k) or stage(k, x)
    whole(runner)
    encoder.stage = stage
    units = {unit for place in runner.tiles() for unit in runner.units(*place)}
    boxes = [window.box for unit in units for window in source.windows(0, unit, source.grid.unit_box(*unit))]
    assert ran.count(0) == len(set(boxes)) < len(boxes)
    cells = [(y, x) for b in set(boxes) for y in range(b.y, b.y + b.height, 16) for x in range(b.x, b.x + b.width, 16)]
    assert len(cells) == len(set(cells))  # each place once


def test_a_wrong_reach_is_refused(pixels):
    assert make_model(encoder=Small(), decoder="paper").reach is None
    with pytest.raises(ValueError, match="stage 0 sees more than 5 px"):
        make_model(encoder=Small(kernel=5))
    with pytest.raises(ValueError, match="stage 2 sees more than 16 px"):
        make_model(encoder=Small({4: 5, 8: 12, 16: 16}))
    with pytest.raises(
        ValueError, match=r"reach for strides \(4, 8\); rising strides of its maps up to the last \(16\)"
    ):
        make_model(encoder=Small({4: 5, 8: 12}))
    with pytest.raises(ValueError, match=r"stage 0 gives maps of \[6\] channels; \[6, 8\] are needed"):
        make_model(encoder=Small({8: 5, 16: 12}))


@pytest.mark.parametrize("fuses", [True, False])
def test_a_model_that_travels_is_the_same_function(monkeypatch, fuses):
    """Norms are folded and convolutions clamp in one pass; another machine may lack the operator for that."""
    from pixnet._core.predict import portable_model

    torch.manual_seed(0)
    model = PixNet(["A", "B"], pretrained=False).eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.members[0].last.weight, std=0.5)
    sent = pickle.dumps(PortableModel(model))
    monkeypatch.setattr(portable_model, "_fuses", lambda: fuses)
    if not fuses:
        monkeypatch.setattr(portable_model, "_clamped_conv", None)
    portable_model.clear_cache()
    image = torch.rand(1, 3, 128, 128).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = pickle.loads(sent).ready(torch.device("cpu"))(image)
        torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-3)
    portable_model.clear_cache()
