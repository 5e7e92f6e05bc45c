"""What an element is: levels of a pyramid."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Identity, Scale, set_transformation

from pixnet._sdata.raster_element import extend, raster_element
from pixnet._sdata.rasters import full_resolution, levels


def scanned(scales, transformations=None, height=4641, width=3001):
    """An image whose levels leave out odd rows and columns, as scanners and halving do."""
    arrays = [da.zeros((3, int(height / s), int(width / s)), chunks=512, dtype=np.uint8) for s in scales]
    return raster_element(arrays, [(s, s) for s in scales], transformations=transformations)


AFFINE = Affine([[0.0, 0.5, 7.0], [-0.5, 0.0, 11.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))


@pytest.mark.parametrize(
    "transformations", [None, {"um": Scale([0.5, 0.5], axes=("y", "x"))}, {"a": AFFINE, "b": Identity()}]
)
def test_each_level_states_its_own_scale(transformations):
    image = scanned([1, 2, 4], transformations)
    found = levels(image)
    assert [level.data.shape[1:] for level in found] == [(4641, 3001), (2320, 1500), (1160, 750)]
    np.testing.assert_allclose([level.scale for level in found], [(1, 1), (2, 2), (4, 4)], rtol=1e-9)
    assert full_resolution(image).shape == (3, 4641, 3001)


def test_a_level_that_is_not_a_whole_fraction():
    # 8.0037 is what a scanner states; 4641 // 579 px would tell 8.0155.
    found = levels(scanned([1, 8.0037]))
    assert found[1].data.shape[1:] == (579, 374)
    np.testing.assert_allclose(found[1].scale, (8.0037, 8.0037), rtol=1e-9)


def test_after_a_store_no_place_is_off_by_a_pixel(tmp_path):
    # SpatialData (0.7.3) reads a stored pyramid with scales from the ratio of the shapes.
    sd.SpatialData(images={"he": scanned([1, 2, 4], height=463, width=301)}).write(tmp_path / "a.zarr")
    found = levels(sd.read_zarr(tmp_path / "a.zarr")["he"])
    for level, exact in zip(found, (1, 2, 4)):
        for size, scale in zip(level.data.shape[1:], level.scale):
            assert abs(scale - exact) * size < exact


def test_pyramids_of_spatialdata():
    image = Image2DModel.parse(np.zeros((3, 130, 97), np.uint8), dims=("c", "y", "x"), scale_factors=[2, 2])
    found = levels(image)
    assert found[2].data.shape[1:] == (32, 24)
    # Its levels are stretched over the whole picture, and say so.
    np.testing.assert_allclose(found[2].scale, (130 / 32, 97 / 24))
    set_transformation(image, Scale([3.0, 3.0], axes=("y", "x")), "um", set_all=False)
    np.testing.assert_allclose(levels(image)[2].scale, (130 / 32, 97 / 24))


def test_a_transform_that_is_not_the_levels_own():
    arrays, _ = extend([np.zeros((3, 400, 600), np.uint8)], [(1.0, 1.0)], 150)
    image = raster_element(arrays, [(1.0, 1.0)] * len(arrays))  # every level repeats that of the finest
    np.testing.assert_allclose([level.scale for level in levels(image)], [(1, 1), (2, 2), (4, 4)])
