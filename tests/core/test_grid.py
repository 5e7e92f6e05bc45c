import dask.array as da
import numpy as np
import pytest

from pixnet._core.slide.grid import choose_grid, snap
from pixnet._core.slide.reader import SlideReader, resample_weights


def grid_for(shape, slide_mpp, model_mpp, stride=4):
    return choose_grid([(1.0, 1.0)], [shape], slide_mpp, model_mpp, stride)


def test_level_choice_takes_the_coarsest_level_that_is_fine_enough():
    scales = [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]
    shapes = [(4000, 4000), (2000, 2000), (1000, 1000)]
    grid = choose_grid(scales, shapes, 0.25, 0.5, 4)
    assert (grid.level, grid.factor, grid.px, grid.shape) == (1, (1.0, 1.0), (2.0, 2.0), (2000, 2000))
    grid = choose_grid(scales, shapes, 0.25, 0.7, 4)
    assert grid.level == 1
    assert grid.factor == pytest.approx((1.4, 1.4))
    assert grid.out_shape == (358, 358)


def test_a_slide_close_to_the_model_is_used_as_it_is():
    grid = grid_for((100, 120), 0.69, 0.6845)
    assert grid.factor == (1.0, 1.0)
    assert grid.mpp == pytest.approx(0.69)
    assert snap(2.03) == 2.0
    assert snap(2.06) == 2.06
    assert snap(0.5) == 0.5


def test_too_coarse_is_refused_and_up_to_twice_enlarged():
    assert grid_for((100, 100), 1.0, 0.5).enlarged
    with pytest.raises(ValueError, match="set_mpp"):
        grid_for((100, 100), 1.1, 0.5)


@pytest.mark.parametrize("factor", [1.0, 1.37, 2.0, 3.61, 0.5, 0.77])
def test_windows_read_alike_however_they_are_cut(factor):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 211, 173), dtype=np.uint8)
    grid = grid_for(image.shape[1:], 1.0, factor, 1)
    reader = SlideReader(da.from_array(image, chunks=(3, 50, 60)), grid)
    height, width = grid.shape
    whole = reader.read(0, 0, height, width)
    part = reader.read(height // 3, width // 4, height // 2, width // 2)
    expected = whole[:, height // 3 : height // 3 + height // 2, width // 4 : width // 4 + width // 2]
    np.testing.assert_array_equal(part, expected)
    beyond = reader.read(-5, -7, height + 9, width + 12)
    np.testing.assert_array_equal(beyond[:, 5 : 5 + height, 7 : 7 + width], whole)
    assert (beyond[:, :5] == 255).all()
    assert (beyond[:, :, 7 + width :] == 255).all()


def test_reducing_takes_area_means():
    image = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    reader = SlideReader(image, grid_for((8, 8), 0.5, 1.0, 1))
    expected = np.rint(image.reshape(3, 4, 2, 4, 2).mean(axis=(2, 4)))
    np.testing.assert_array_equal(reader.read(0, 0, 4, 4), expected)


@pytest.mark.parametrize("factor", [1.0, 1.3, 2.5, 0.6])
def test_weights_add_up_to_one_and_keep_a_ramp(factor):
    size = 97
    n = int(np.ceil(size / factor - 1e-6))
    first, last, weights = resample_weights(0, n, factor, size)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    centres = weights @ (np.arange(first, last) + 0.5)
    np.testing.assert_allclose(centres[2:-2], ((np.arange(n) + 0.5) * factor)[2:-2], atol=0.25 if factor % 1 else 1e-4)
