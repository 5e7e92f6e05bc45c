"""What is said of a slide that looks unlike those of training."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pixnet as px
from pixnet._core.slide.grid import choose_grid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader
from pixnet._core.slide.stain import differences, optical_density, sample, statistics

PURPLE = np.array([140.0, 110.0, 165.0])


def pixels_of(colour=PURPLE, sd=25, side=1024, seed=0):
    """A field of one colour with blobs of 8 px and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, sd, (side // 8, side // 8)).repeat(8, 0).repeat(8, 1)
    noise = rng.normal(0, sd / 3, (3, side, side))
    return np.clip(colour[:, None, None] + coarse + noise, 0, 255).astype(np.uint8)


def look(pixels, mask=None):
    grid = choose_grid([(1.0, 1.0)], [pixels.shape[1:]], 0.5, 0.5, 4)
    mask = TissueMask.everywhere(grid.out_shape) if mask is None else mask
    return statistics(sample(SlideReader(pixels, grid), mask), mask.masked)


def paler(pixels, factor):
    return np.rint(255 * 10 ** (-factor * optical_density(pixels))).astype(np.uint8)


def test_statistics_are_those_of_the_tissue():
    pixels = np.full((3, 2048, 2048), 240, np.uint8)
    pixels[:, 512:1536, 512:1536] = pixels_of()
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    found = look(pixels, TissueMask(mask, np.diag([1 / 16, 1 / 16, 1])))
    density = optical_density(pixels_of())
    np.testing.assert_allclose(found["od_mean"], density.mean(axis=(1, 2)), rtol=0.02)
    np.testing.assert_allclose(found["od_sd"], density.std(axis=(1, 2)), rtol=0.05)
    assert found["masked"]
    assert json.loads(json.dumps(found)) == found


def test_specks_of_tissue_are_found_and_none_is_none():
    pixels, mask = pixels_of(), np.zeros((256, 256), bool)
    assert look(pixels, TissueMask(mask, np.eye(3))) is None
    mask[100:110, 30:40] = True
    found = look(pixels, TissueMask(mask, np.eye(3)))
    here = optical_density(pixels[:, 400:440, 120:160])
    np.testing.assert_allclose(found["od_mean"], here.mean(axis=(1, 2)), atol=1e-3)


def test_windows_are_few_and_spread():
    grid = choose_grid([(1.0, 1.0)], [(100_000, 60_000)], 0.5, 0.5, 4)

    class Reader(SlideReader):
        def read(self, y0, x0, height, width):
            seen.append((y0, x0))
            return np.full((3, height, width), 128, np.uint8)

    seen: list[tuple[int, int]] = []
    mask = np.ones((500, 300), bool)
    sample(Reader(None, grid), TissueMask(mask, np.diag([1 / 50, 1 / 50, 1])))
    rows = sorted(y for y, _ in seen)
    assert len(seen) == 16
    assert rows[0] < 1000
    assert rows[-1] > 99_000
    assert max(np.diff(rows)) < 10_000


@pytest.fixture(scope="module")
def training():
    return [look(pixels_of(seed=seed)) for seed in (0, 1)]


def test_the_same_stain_says_nothing(training):
    assert differences(look(pixels_of(seed=2)), training) == []
    assert differences(look(pixels_of(PURPLE - 10, seed=2)), training) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: paler(p, 0.3), "its mean optical density in green is 0.1"),
        (lambda p: paler(p, 0.3), "its optical density in red varies by 0.0"),
        (lambda p: p[[2, 0, 1]], "blue makes up 4"),
        (lambda p: p[:, ::8, ::8].repeat(8, 1).repeat(8, 2), "less fine detail (0.00 of its contrast"),
        (lambda p: p[:, ::4, ::4], "more fine detail"),
    ],
)
def test_what_differs_is_named(training, change, says):
    assert any(says in line for line in differences(look(change(pixels_of(seed=2))), training))


def test_slides_without_a_mask_are_compared_with_their_like():
    pixels = pixels_of()
    masked = look(pixels, TissueMask(np.ones((256, 256), bool), np.eye(3)))
    other = look(paler(pixels, 0.3))
    assert not other["masked"]
    assert differences(other, [masked]) == []
    assert differences(other, [look(pixels)])
    old = {key: value for key, value in masked.items() if key.startswith("od")}  # as earlier versions recorded it
    assert differences(masked, [old]) == []
    assert differences({**masked, "od_mean": [0.0, 0.0, 0.0]}, [old])


def test_real_slides(shared_data):
    """The shipped model knows its own study's section, and names what differs elsewhere."""
    training = px.models.load("her2st").stain

    def windows(sdata, key, mpp):
        from pixnet._sdata.slide import Slide
        from pixnet._sdata.tissue import open_mask

        slide = Slide.open(sdata, key)
        grid = slide.grid(mpp, 4)
        return sample(slide.reader(grid), open_mask(slide, grid.out_px))

    section = windows(px.datasets.her2st("C5", path=shared_data / "her2st"), "he", 0.688)
    assert differences(statistics(section), training) == []
    pale = [(paler(pixels, 0.3), tissue) for pixels, tissue in section]
    assert any("mean optical density in red" in line for line in differences(statistics(pale), training))
    turned = [(pixels[[2, 0, 1]], tissue) for pixels, tissue in section]
    assert any("blue makes up" in line for line in differences(statistics(turned), training))
    other = px.io.slide(shared_data / "wsi" / "CMU-1-Small-Region.svs")
    lines = differences(statistics(windows(other, "he", 0.688)), training)
    assert len(lines) == 1
    assert "red makes up 25% of its optical density" in lines[0]
