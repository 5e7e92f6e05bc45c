"""The pixel size: stated, and measured on arrays of spots and bins."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
import spatialdata
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation
from spatialdata.transformations import Sequence as TransformSequence

import pixnet as px
from pixnet._sdata.pixel_size import find_mpp, get_mpp


def make(geometries, radius=None, transform=None):
    columns = {"geometry": geometries} | ({} if radius is None else {"radius": radius})
    shapes = ShapesModel.parse(geopandas.GeoDataFrame(columns), transformations={"global": transform or Identity()})
    image = Image2DModel.parse(np.zeros((3, 64, 64), dtype=np.uint8), dims=("c", "y", "x"))
    return SpatialData(images={"he": image}, shapes={"spots": shapes})


def hexagonal(pitch, n=12):
    row, col = (index.ravel() for index in np.indices((n, n)))
    return (col + 0.5 * (row % 2)) * pitch, row * pitch * np.sqrt(3) / 2


def test_set_mpp_records_and_checks():
    sdata = make(shapely.points([[1, 1]]), [1.0])
    px.pp.set_mpp(sdata, "he", np.float32(0.25))
    assert get_mpp(sdata, "he") == 0.25
    with pytest.raises(KeyError, match="no image 'h&e'.*'he'"):
        px.pp.set_mpp(sdata, "h&e", 0.5)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive, finite"):
            px.pp.set_mpp(sdata, "he", wrong)
    for wrong in ("0.5", None, True):
        with pytest.raises(TypeError, match="a number"):
            px.pp.set_mpp(sdata, "he", wrong)
    with pytest.raises(TypeError, match="SpatialData"):
        px.pp.set_mpp({}, "he", 0.5)


def test_impossible_pixel_sizes_are_refused(caplog):
    sdata = make(shapely.points([[1, 1]]), [1.0])
    for wrong, hint in (
        (0.0005, r"\(in mm\? That would be 0.5 µm/px\)"),
        (500, r"\(in nm\?"),
        (5e-7, r"\(in m\?"),
        (1e9, ""),
    ):
        with pytest.raises(ValueError, match=f"µm/px{'' if not hint else ' ' + hint}.*0.02 to 200 is possible"):
            px.pp.set_mpp(sdata, "he", wrong)
    assert find_mpp(sdata, "he") is None
    px.pp.set_mpp(sdata, "he", 120)  # a thumbnail
    assert find_mpp(sdata, "he") == 120


def test_a_measured_size_that_contradicts_the_recorded_one_is_refused():
    sdata = make(shapely.points(*hexagonal(137.0)), 20.0)
    px.pp.set_mpp(sdata, "he", 0.25)
    with pytest.raises(ValueError, match="0.25 µm/px as recorded, and 0.7299 as measured.*overwrite=True"):
        px.pp.infer_mpp(sdata, "spots", pitch_um=100)
    assert get_mpp(sdata, "he") == 0.25
    px.pp.infer_mpp(sdata, "spots", pitch_um=100, overwrite=True)
    assert get_mpp(sdata, "he") == pytest.approx(100 / 137)
    px.pp.infer_mpp(sdata, "spots", pitch_um=104)  # close enough
    assert get_mpp(sdata, "he") == pytest.approx(104 / 137)


def test_set_mpp_reaches_the_store(tmp_path):
    sdata = make(shapely.points([[1, 1]]), [1.0])
    sdata.write(tmp_path / "a.zarr")
    px.pp.set_mpp(sdata, "he", 0.5)
    assert get_mpp(spatialdata.read_zarr(tmp_path / "a.zarr"), "he") == 0.5


def test_pitch_of_hexagonal_array():
    sdata = make(shapely.points(*hexagonal(137.0)), 20.0)
    assert px.pp.infer_mpp(sdata, "spots", pitch_um=100) == pytest.approx(100 / 137)
    assert get_mpp(sdata, "he") == pytest.approx(100 / 137)


def test_pitch_of_square_array_with_measured_centres():
    rng = np.random.default_rng(0)
    x, y = (index.ravel() * 290.0 + rng.normal(0, 12, 400) for index in np.indices((20, 20)))
    sdata = make(shapely.points(x, y), 70.0)
    # the distance to the nearest neighbour alone would be 6 % short
    assert px.pp.infer_mpp(sdata, "spots", pitch_um=200) == pytest.approx(200 / 290, rel=0.01)


def test_diameter_through_a_transformation():
    turn = np.deg2rad(30)
    rotated = Affine(
        np.array([[2 * np.cos(turn), -2 * np.sin(turn), 5], [2 * np.sin(turn), 2 * np.cos(turn), 9], [0, 0, 1]]),
        input_axes=("x", "y"),
        output_axes=("x", "y"),
    )
    sdata = make(shapely.points(*hexagonal(50.0)), 13.75, rotated)
    assert px.pp.infer_mpp(sdata, "spots", diameter_um=55) == pytest.approx(0.5 * 2)
    assert px.pp.infer_mpp(sdata, "spots", pitch_um=100) == pytest.approx(1.0)


@pytest.mark.parametrize("as_circles", [False, True])
def test_edge_of_bins(as_circles):
    row, col = (index.ravel() for index in np.indices((9, 9)))
    if as_circles:
        sdata = make(shapely.points(col * 29.0, row * 29.0), 14.5)
    else:
        boxes = shapely.box(col * 29.0, row * 29.0, (col + 1) * 29.0, (row + 1) * 29.0)
        turn = np.array([[0.8, -0.6], [0.6, 0.8]])
        sdata = make(shapely.transform(boxes, lambda xy: xy @ turn.T))
    assert px.pp.infer_mpp(sdata, "spots", edge_um=8) == pytest.approx(8 / 29)


def test_image_with_its_own_scale():
    sdata = make(shapely.points(*hexagonal(100.0)), 27.5)  # shapes in um
    set_transformation(
        sdata["he"], TransformSequence([Scale([0.4, 0.4], ("x", "y")), Translation([3, 4], ("x", "y"))]), "global"
    )
    assert px.pp.infer_mpp(sdata, "spots", pitch_um=100) == pytest.approx(0.4)


def test_shapes_in_um_of_any_size():
    mixed = make(
        shapely.points(np.random.default_rng(0).random((9, 2)) * 50), np.arange(1.0, 10.0), Scale([4, 4], ("x", "y"))
    )
    set_transformation(mixed["he"], Scale([0.5, 0.5], ("x", "y")), "global")
    assert px.pp.infer_mpp(mixed, "spots", unit_um=1) == pytest.approx(0.5 / 4)


@pytest.mark.parametrize(
    "matrix",
    [[[1, 0, 0], [0, 1.05, 0], [0, 0, 1]], [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]]],
    ids=["anisotropic", "sheared"],
)
def test_distorted_transformations_are_refused(matrix):
    distorted = Affine(np.array(matrix, dtype=float), input_axes=("x", "y"), output_axes=("x", "y"))
    sdata = make(shapely.points(*hexagonal(50.0)), 10.0, distorted)
    with pytest.raises(ValueError, match="stretches one direction .*set_mpp"):
        px.pp.infer_mpp(sdata, "spots", pitch_um=100)
    assert find_mpp(sdata, "he") is None


def test_refusals():
    sdata = make(shapely.points(*hexagonal(50.0)), 10.0)
    with pytest.raises(ValueError, match="exactly one of pitch_um, diameter_um, edge_um and unit_um"):
        px.pp.infer_mpp(sdata, "spots")
    with pytest.raises(ValueError, match="exactly one"):
        px.pp.infer_mpp(sdata, "spots", pitch_um=100, diameter_um=55)
    with pytest.raises(ValueError, match="pitch_um is -1"):
        px.pp.infer_mpp(sdata, "spots", pitch_um=-1)
    with pytest.raises(KeyError, match="'cells'.*'spots'"):
        px.pp.infer_mpp(sdata, "cells", pitch_um=100)
    scattered = make(shapely.points(np.random.default_rng(0).random((200, 2)) * 500), 3.0)
    with pytest.raises(ValueError, match="do not form a regular array"):
        px.pp.infer_mpp(scattered, "spots", pitch_um=100)
    mixed = make(shapely.points(*hexagonal(50.0)), np.random.default_rng(0).uniform(3, 20, 144))
    with pytest.raises(ValueError, match="differ in size"):
        px.pp.infer_mpp(mixed, "spots", diameter_um=55)
    few = make(shapely.points([[1, 1], [2, 2]]), 1.0)
    with pytest.raises(ValueError, match="at least 4"):
        px.pp.infer_mpp(few, "spots", pitch_um=100)
