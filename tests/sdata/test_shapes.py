from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Affine, MapAxis, Scale, Sequence, Translation

from pixnet._core.coverage import coverage
from pixnet._sdata.shapes import pixel_shapes, read_shapes
from pixnet._sdata.transforms import affine_to_pixels


def image(transformations=None, shape=(1, 20, 30), **kwargs):
    return Image2DModel.parse(
        np.zeros(shape, np.float32), dims=("c", "y", "x"), transformations=transformations, **kwargs
    )


def shapes(geometries, index=None, radius=None, transformations=None):
    frame = gpd.GeoDataFrame({"geometry": geometries}, index=index)
    if radius is not None:
        frame["radius"] = radius
    return ShapesModel.parse(frame, transformations=transformations)


def unchecked(frame):
    """A shapes element that spatialdata's own checks would refuse, as one edited by hand may be."""
    element = shapes([shapely.box(0, 0, 1, 1)])
    frame.attrs = element.attrs
    return frame


def put_unchecked(sdata, key, frame):
    sdata.shapes.data[key] = unchecked(frame)


def test_affine_between_coordinate_systems():
    to_a = Affine([[0, -2.0, 5], [2.0, 0, 7], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    sdata = SpatialData(
        images={"im": image({"a": to_a, "b": Scale([2.0, 4.0], axes=("x", "y"))})},
        shapes={
            "s": shapes(
                [shapely.box(0, 0, 1, 1)],
                transformations={"a": Translation([5.0, 7.0], axes=("x", "y")), "b": Scale([3.0], axes=("x",))},
            )
        },
    )
    np.testing.assert_allclose(affine_to_pixels(sdata, "s", "im"), [[0, 0.5, 0], [-0.5, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(affine_to_pixels(sdata, "s", "im", "b"), np.diag([1.5, 0.25, 1]))
    with pytest.raises(ValueError, match="'c'.*'a', 'b'"):
        affine_to_pixels(sdata, "s", "im", "c")


def test_global_is_preferred_to_the_first_shared_system():
    both = {"first": Scale([2.0], axes=("x",)), "global": Scale([5.0], axes=("x",))}
    sdata = SpatialData(images={"im": image()}, shapes={"s": shapes([shapely.box(0, 0, 1, 1)], transformations=both)})
    assert affine_to_pixels(sdata, "s", "im")[0, 0] == 5


def test_axes_may_be_exchanged():
    swap = Sequence([MapAxis({"x": "y", "y": "x"}), Scale([3.0, 1.0], axes=("x", "y"))])
    sdata = SpatialData(
        images={"im": image()}, shapes={"s": shapes([shapely.box(1, 2, 3, 5)], transformations={"global": swap})}
    )
    packed = pixel_shapes(sdata, "s", "im")
    np.testing.assert_allclose(packed.bounds, [[6, 1, 15, 3]])
    assert packed.area.tolist() == [18]


def test_no_shared_system_is_an_error():
    sdata = SpatialData(
        images={"im": image({"a": Scale([2.0], axes=("x",))})}, shapes={"s": shapes([shapely.box(0, 0, 1, 1)])}
    )
    with pytest.raises(ValueError, match="share no coordinate system"):
        pixel_shapes(sdata, "s", "im")


def test_a_singular_transformation_is_an_error():
    sdata = SpatialData(
        images={"im": image({"global": Scale([0.0], axes=("x",))})}, shapes={"s": shapes([shapely.box(0, 0, 1, 1)])}
    )
    with pytest.raises(ValueError, match="'im' to 'global' cannot be inverted"):
        pixel_shapes(sdata, "s", "im")


def test_a_transformation_that_is_not_affine_is_an_error(monkeypatch):
    class Warp(Scale):
        def to_affine_matrix(self, input_axes, output_axes):
            raise NotImplementedError

    def transformation(*_, get_all=False, **__):
        warp = Warp([1.0], axes=("x",))
        return {"global": warp} if get_all else warp

    sdata = SpatialData(images={"im": image()}, shapes={"s": shapes([shapely.box(0, 0, 1, 1)])})
    monkeypatch.setattr("pixnet._sdata.transforms.get_transformation", transformation)
    with pytest.raises(ValueError, match="not affine .Warp"):
        pixel_shapes(sdata, "s", "im")


def test_circles_and_order():
    index = ["b", "a", "c"]
    element = shapes(shapely.points([[3, 4], [1, 1], [8, 8]]), index, [1.0, 2.0, 3.0])
    sdata = SpatialData(images={"im": image(scale_factors=[2])}, shapes={"s": element})
    found = read_shapes(sdata, "s", "im")
    assert found.ids.tolist() == index
    assert found.geometries.is_ellipse.all()
    np.testing.assert_allclose(found.geometries.area, np.pi * np.array([1, 4, 9]))
    assert sdata["s"].index.tolist() == index


def test_labels_are_unions_of_their_pixels_under_any_affine():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 6, (5, 6)), np.ones((3, 3), int)) * 7
    labels[4, 4] = 9
    matrix = np.array([[1.2, 0.5, 1], [-0.4, 0.9, 6], [0, 0, 1]])
    element = Labels2DModel.parse(
        labels, dims=("y", "x"), chunks=(4, 5), transformations={"global": Affine(matrix, ("x", "y"), ("x", "y"))}
    )
    sdata = SpatialData(images={"im": image(shape=(1, 40, 40))}, labels={"l": element})
    found = read_shapes(sdata, "l", "im")
    ids = np.unique(labels)[1:]
    assert found.ids.tolist() == ids.tolist()
    dense = coverage(found.geometries, (0, 0, 40, 40)).toarray()
    for row, label in zip(dense, ids):
        y, x = np.nonzero(labels == label)
        union = shapely.transform(
            shapely.union_all(shapely.box(x, y, x + 1, y + 1)), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]
        )
        gy, gx = np.mgrid[:40, :40]
        expected = shapely.area(shapely.intersection(shapely.box(gx, gy, gx + 1, gy + 1), union)).ravel()
        np.testing.assert_allclose(row, expected, atol=1e-9)


def test_labels_of_background_only():
    sdata = SpatialData(
        images={"im": image()}, labels={"l": Labels2DModel.parse(np.zeros((5, 5), int), dims=("y", "x"))}
    )
    assert len(pixel_shapes(sdata, "l", "im")) == 0


BOW_TIE = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
SQUARE = shapely.box(0, 0, 1, 1)


@pytest.mark.parametrize(
    ("geometries", "index", "error", "message"),
    [
        ([SQUARE, BOW_TIE], ["fine", "bad"], ValueError, r"invalid \(the first: Self-intersection.*'bad'.*make_valid"),
        ([SQUARE, shapely.Polygon([(0, 0), (3, 0), (0, 3), (3, 3), (0, 1)])], [4, 5], ValueError, "invalid.*5;"),
        ([SQUARE, SQUARE], ["a", "a"], ValueError, "duplicate ids: 'a'"),
        ([SQUARE, None], [3, 4], ValueError, "missing: 4"),
        ([SQUARE, shapely.Polygon()], [3, 4], ValueError, "empty: 4"),
        ([SQUARE, shapely.force_3d(SQUARE, 1)], ["a", "flat"], ValueError, "z coordinates: 'flat'.*force_2d"),
        ([SQUARE, shapely.LineString([(0, 0), (1, 1)])], ["a", "line"], TypeError, "'line'"),
        ([SQUARE, shapely.Polygon([(0, 0), (np.inf, 0), (1, 1)])], ["a", "far"], ValueError, "finite: 'far'"),
        ([shapely.Point(1, 1)], [0], ValueError, "radius"),
        ([SQUARE], [0.5], TypeError, "integers or text"),
    ],
)
def test_bad_geometries_are_named_by_id(geometries, index, error, message):
    sdata = SpatialData(images={"im": image()})
    put_unchecked(sdata, "s", gpd.GeoDataFrame({"geometry": geometries}, index=index))
    with pytest.raises(error, match=message):
        pixel_shapes(sdata, "s", "im")


def test_bad_radii_are_named_by_id():
    sdata = SpatialData(images={"im": image()})
    frame = gpd.GeoDataFrame({"geometry": shapely.points([[1, 1], [2, 2]]), "radius": [1, -1]}, index=["a", "b"])
    put_unchecked(sdata, "s", frame)
    with pytest.raises(ValueError, match="positive radius: 'b'"):
        pixel_shapes(sdata, "s", "im")


def test_an_image_is_not_a_shapes_element():
    sdata = SpatialData(images={"im": image()})
    with pytest.raises(ValueError, match="neither a shapes nor a labels"):
        pixel_shapes(sdata, "im", "im")
