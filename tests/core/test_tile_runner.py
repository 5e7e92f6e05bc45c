"""The tile runner: what it computes must not depend on how it is cut up."""

from __future__ import annotations

import pickle
import time

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn

from pixnet._core.predict.device import resolve_device, resolve_precision
from pixnet._core.predict.map_grid import choose_map_grid
from pixnet._core.predict.portable_model import PortableModel, clear_cache, fold_norms
from pixnet._core.predict.tile import TileCost
from pixnet._core.predict.tile_runner import TileRunner, lazy_map, store_tiles
from pixnet._core.slide.grid import choose_grid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import ReadError, SlideReader

WINDOW, HALO, STRIDE = 64, 64, 4


class Means(nn.Module):
    """Block means of red and green, and of the image shifted by half a halo: needs its surroundings, is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen = 0

    def forward(self, image, channels=None, crop=0):
        self.calls += 1
        self.seen += len(image)
        shifted = torch.roll(image[:, :1], (HALO // 2, -HALO // 2), (2, 3))
        out = nn.functional.avg_pool2d(torch.cat([image[:, :2], shifted], dim=1), STRIDE)
        if channels is not None:
            out = out[:, channels]
        return out[..., crop:-crop, crop:-crop]


def truth(pixels: np.ndarray) -> np.ndarray:
    """What Means gives on the whole slide, white around it."""
    h, w = pixels.shape[1:]
    pad = [(0, 0), (HALO, HALO + -h % STRIDE), (HALO, HALO + -w % STRIDE)]
    image = np.pad(pixels, pad, constant_values=255).astype(np.float64) / 255
    d = HALO // 2
    inner = (slice(HALO, image.shape[1] - HALO), slice(HALO, image.shape[2] - HALO))
    shifted = np.roll(image[:1], (d, -d), (1, 2))
    stack = np.concatenate([image[:2], shifted])[:, inner[0], inner[1]]
    c, y, x = stack.shape
    return stack.reshape(c, y // STRIDE, STRIDE, x // STRIDE, STRIDE).mean(axis=(2, 4))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 303, 419), dtype=np.uint8)


def make_runner(pixels, mask=None, *, tile_size=None, out_mpp=None, model=None, channels=None, array=None, batch=1):
    grid = choose_grid([(1.0, 1.0)], [pixels.shape[1:]], 0.5, 0.5, STRIDE)
    tiles = choose_map_grid(grid, WINDOW, HALO, out_mpp, tile_size)
    if mask is None:
        mask = TissueMask.everywhere((pixels.shape[1] / STRIDE, pixels.shape[2] / STRIDE))
    reader = SlideReader(pixels if array is None else array, grid)
    packed = model if isinstance(model, PortableModel) else PortableModel(model or Means())
    n = 3 if channels is None else len(channels)
    return TileRunner(reader, mask, packed, tiles, channels=channels, n_channels=n, batch=batch)


@pytest.fixture(autouse=True)
def _alone():
    """No model left by another test, and one thread: these arrays are too small for more."""
    clear_cache()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def half_mask(pixels):
    """A mask at a third of the slide's resolution, with a slanted edge."""
    h, w = -(-pixels.shape[1] // 3), -(-pixels.shape[2] // 3)
    mask = np.add.outer(np.arange(h), np.arange(w)) < 90
    return TissueMask(mask, np.diag([STRIDE / 3, STRIDE / 3, 1.0]))


def whole(runner):
    return lazy_map(runner, str(id(runner))).compute(scheduler="synchronous")


def test_map_is_the_models_on_the_whole_slide(pixels):
    np.testing.assert_allclose(whole(make_runner(pixels)), truth(pixels), atol=2e-6)


@pytest.mark.parametrize(("tile_size", "batch"), [(1, 1), (65, 1), (200, 3), (256, 1), (10_000, 4)])
def test_tile_size_and_batch_do_not_matter(pixels, tile_size, batch):
    mask = half_mask(pixels)
    expected = whole(make_runner(pixels, mask, tile_size=64))
    found = whole(make_runner(pixels, mask, tile_size=tile_size, batch=batch))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nan_is_exactly_the_background(pixels):
    mask = half_mask(pixels)
    found = whole(make_runner(pixels, mask, tile_size=128))
    tissue = mask.window(0, 0, *found.shape[1:])
    assert 0 < tissue.mean() < 1
    assert (np.isnan(found) == ~tissue).all()


def test_background_windows_do_not_run(pixels):
    mask = half_mask(pixels)
    packed = PortableModel(Means())
    runner = make_runner(pixels, mask, tile_size=256, model=packed)
    whole(runner)
    model = packed.ready(torch.device("cpu"))
    core = WINDOW // STRIDE
    tissue = mask.window(0, 0, *runner.grid.shape)
    expected = sum(
        tissue[y : y + core, x : x + core].any()
        for y in range(0, tissue.shape[0], core)
        for x in range(0, tissue.shape[1], core)
    )
    assert model.seen == expected < 35


@pytest.mark.parametrize(("out_mpp", "tile_size"), [(4.0, 64), (8.0, None), (5.3, 64), (5.3, 192), (37.0, None)])
def test_coarser_maps_are_area_means_of_tissue(pixels, out_mpp, tile_size):
    mask = half_mask(pixels)
    fine = whole(make_runner(pixels, mask))
    runner = make_runner(pixels, mask, out_mpp=out_mpp, tile_size=tile_size)
    found = whole(runner)
    r, (rows, cols) = out_mpp / 2.0, found.shape[1:]
    assert (rows, cols) == (np.ceil(303 / 4 / r), np.ceil(419 / 4 / r))

    def shares(n, size, extent):
        lo, hi = np.arange(n)[:, None] * r, (np.arange(n)[:, None] + 1) * r
        return np.clip(
            np.minimum(np.minimum(np.arange(size) + 1, extent), hi) - np.maximum(np.arange(size), lo), 0, None
        )

    wy, wx = shares(rows, fine.shape[1], 303 / 4), shares(cols, fine.shape[2], 419 / 4)
    valid = ~np.isnan(fine[0])
    expected = (wy @ np.where(valid, fine, 0) @ wx.T) / np.maximum(wy @ valid @ wx.T, 1e-12)
    there = ~np.isnan(found[0])
    np.testing.assert_allclose(found[:, there], expected[:, there], rtol=2e-5)
    coarse = TissueMask(mask.mask, mask.to_mask @ np.diag([r, r, 1])).window(0, 0, rows, cols)
    np.testing.assert_array_equal(there, coarse)


def test_batches_that_do_not_fit_are_halved(pixels):
    class Narrow(Means):
        def forward(self, image, channels=None, crop=0):
            if len(image) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(image, channels, crop)

    runner = make_runner(pixels, tile_size=256, model=Narrow(), batch=4)
    np.testing.assert_allclose(whole(runner), truth(pixels), atol=2e-6)
    assert runner.placed.batch == 1

    class Full(Means):
        def forward(self, image, channels=None, crop=0):
            raise torch.OutOfMemoryError("CUDA out of memory")

    clear_cache()  # these models have no weights to tell them apart by
    with pytest.raises(RuntimeError, match="does not hold one window.*192 x 192.*device='cpu'"):
        make_runner(pixels, model=Full(), batch=4).tile(0, 0)


def test_finer_than_the_model_is_refused(pixels):
    with pytest.raises(ValueError, match="cannot be finer"):
        make_runner(pixels, out_mpp=1.0)


def test_channels_are_picked(pixels):
    np.testing.assert_allclose(whole(make_runner(pixels, channels=[2, 0])), truth(pixels)[[2, 0]], atol=2e-6)


def test_a_part_that_cannot_be_read_is_named(pixels):
    class Broken:
        shape = pixels.shape

        def __getitem__(self, key):
            if key[2].start > 200:
                raise OSError("bad chunk")
            return pixels[key]

    runner = make_runner(pixels, array=Broken())
    with pytest.raises(ReadError, match=r"x 256 to 419 of image 'image' could not be read \(OSError: bad chunk\)"):
        runner.tile(0, 0)


def test_a_model_is_unpacked_once_in_a_process():
    packed = PortableModel(Means())
    one, two = pickle.loads(pickle.dumps(packed)), pickle.loads(pickle.dumps(packed))
    clear_cache()
    assert one.ready(torch.device("cpu")) is two.ready(torch.device("cpu"))
    assert one.hash == packed.hash


def test_the_users_model_is_left_alone(pixels):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    PortableModel(model).ready(torch.device("cpu"))
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_folding_norms_keeps_the_function():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2))
    )
    model(torch.randn(4, 3, 16, 16))  # moves the running statistics
    model.eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(image)
        folded = fold_norms(model)
        torch.testing.assert_close(folded(image), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_graph_of_a_huge_slide_is_built_at_once_and_not_run():
    side = 100_000
    slide = da.zeros((3, side, side), chunks=(3, 4096, 4096), dtype=np.uint8)
    mask = np.zeros((1250, 1250), bool)
    mask[100:900, 200:800] = True
    grid = choose_grid([(1.0, 1.0)], [(side, side)], 0.5, 0.5, STRIDE)
    tiles = choose_map_grid(grid, 1024, 192, None, None)
    packed = PortableModel(Means())
    start = time.perf_counter()
    to_mask = np.diag([1250 / 25_000, 1250 / 25_000, 1.0])
    runner = TileRunner(
        SlideReader(slide, grid), TissueMask(mask, to_mask), packed, tiles, channels=None, n_channels=251
    )
    array = lazy_map(runner, "huge")
    seconds = time.perf_counter() - start
    assert array.shape == (251, 25_000, 25_000)
    assert len(array.dask) <= 5 * array.npartitions
    assert seconds < 30
    assert packed.ready(torch.device("cpu")).calls == 0


@pytest.mark.parametrize("scheduler", [None, "threads", "synchronous"])
def test_stored_tiles_are_the_lazy_ones(pixels, scheduler):
    runner = make_runner(pixels, half_mask(pixels), tile_size=128)
    target = np.full((3, *runner.grid.shape), np.nan, np.float32)
    rows, cols = runner.grid.tiles
    total, places = TileCost(), []
    with dask.config.set({} if scheduler is None else {"scheduler": scheduler}):
        for place, cost, _ in store_tiles(runner, target, runner.tiles()):
            total.add(cost)
            places.append(place)
    assert places == runner.tiles()
    assert 0 < len(places) < rows * cols
    np.testing.assert_array_equal(target, whole(runner))
    assert total.pixels == (~np.isnan(target[0])).sum()


def test_only_a_few_tiles_are_held_at_once(pixels):
    """What bounds the memory: the model waits where writing is slower."""
    written, held = [], []

    class SlowTarget:
        def __setitem__(self, key, value):
            time.sleep(0.02)
            written.append(1)

    class Counting(Means):
        def forward(self, image, channels=None, crop=0):
            held.append(len(held) + 1 - len(written))
            return super().forward(image, channels, crop)

        def __deepcopy__(self, memo):
            return self

    runner = make_runner(pixels, model=Counting(), tile_size=64)
    assert len(list(store_tiles(runner, SlowTarget(), runner.tiles()))) == len(held) == 35
    assert max(held) <= 3


def test_device_and_precision_are_checked():
    with pytest.raises(ValueError, match="device is 'gpu'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="0 CUDA devices"):
            resolve_device("cuda")
    cpu = torch.device("cpu")
    assert resolve_precision(None, cpu) in {"bfloat16", "float32"}
    with pytest.raises(ValueError, match="precision is 'half'"):
        resolve_precision("half", cpu)
    with pytest.raises(ValueError, match="float16"):
        resolve_precision("float16", cpu)
