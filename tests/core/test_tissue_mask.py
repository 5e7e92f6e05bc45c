"""Which output pixels are tissue: at least half of their sample points, for any place and scale of the mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet._core.slide.mask import TissueMask

SCALES = st.sampled_from([0.125, 0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0, 4.0]) | st.floats(0.05, 6)


@given(
    seed=st.integers(0, 1000),
    scales=st.tuples(SCALES, SCALES),
    flipped=st.booleans(),
    shift=st.tuples(st.floats(-20, 60), st.floats(-20, 60)),
    window=st.tuples(st.integers(-30, 30), st.integers(-30, 30), st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=80, deadline=None)
def test_rows_and_columns_give_what_points_give(seed, scales, flipped, shift, window):
    """The tiniest rotation makes the mask be looked up point by point; without one, rows and columns are multiplied."""
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 50, 2)) > 0.5
    upright = np.diag([-scales[0] if flipped else scales[0], scales[1], 1.0])
    upright[:2, 2] = shift
    turned = upright.copy()
    turned[0, 1] = 1e-30
    assert (TissueMask(mask, upright).window(*window) == TissueMask(mask, turned).window(*window)).all()


@pytest.mark.parametrize(("share", "expected"), [(7, False), (8, True), (9, True)])
def test_half_of_a_pixel_is_enough(share, expected):
    mask = np.zeros((4, 4), bool)
    mask.flat[:share] = True
    assert TissueMask(mask, np.diag([4.0, 4.0, 1.0])).window(0, 0, 1, 1).item() is expected


def test_outside_the_mask_is_glass():
    found = TissueMask(np.ones((2, 3), bool), np.eye(3)).window(-1, -1, 4, 5)
    assert found[1:3, 1:4].all()
    assert found.sum() == 6
