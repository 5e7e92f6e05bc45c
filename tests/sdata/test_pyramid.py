"""Pyramids: exact means, exact scales, lazy as well as in memory."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from spatialdata.transformations import Identity, Scale, get_transformation

from pixnet._core.slide.pyramid import halve
from pixnet._sdata.rasters import pyramid, raster_element


@pytest.mark.parametrize("shape", [(3, 10, 12), (3, 11, 13), (2, 1, 9), (3, 1301, 2047)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_halve(shape, dtype):
    array = (np.random.default_rng(0).random(shape) * 250).astype(dtype)
    h, w = shape[1] // 2, shape[2] // 2
    expected = array[:, : 2 * h, : 2 * w].reshape(shape[0], h, 2, w, 2).astype(float).mean(axis=(2, 4))
    if dtype != "float32":
        expected = np.floor(expected + 0.5)
    for found in (halve(array), halve(da.from_array(array, chunks=(shape[0], 301, 256))).compute()):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_levels_keep_their_exact_scale():
    array = np.zeros((3, 1301, 2047), dtype=np.uint8)
    levels, scales = pyramid(array)
    assert [level.shape[1:] for level in levels] == [(1301, 2047), (650, 1023)]
    tree = raster_element(levels, scales, transformations={"global": Identity(), "um": Scale([0.5, 0.5], ("x", "y"))})
    small = tree["scale1"]["image"]
    matrix = get_transformation(small, "um").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, np.diag([1.0, 1.0, 1.0]))
    np.testing.assert_allclose(small.coords["x"][:2], [1.0, 3.0])


def test_a_small_image_has_two_levels():
    levels, _ = pyramid(np.zeros((3, 20, 30), dtype=np.uint8))
    assert [level.shape for level in levels] == [(3, 20, 30), (3, 10, 15)]
