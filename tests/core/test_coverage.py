from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

import pixnet
from pixnet._core.coverage import ShapeArrays, coverage

arrays = ShapeArrays.from_geometries

H, W = 24, 30


def dense(geometries, window=(0, 0, H, W), weights="area"):
    return coverage(geometries, window, weights).toarray().reshape(len(geometries), window[2], window[3])


def by_shapely(geometry, window=(0, 0, H, W)):
    y0, x0, h, w = window
    y, x = np.mgrid[y0 : y0 + h, x0 : x0 + w]
    return shapely.area(shapely.intersection(shapely.box(x, y, x + 1, y + 1), geometry))


@st.composite
def polygons(draw):
    """Star-shaped polygons with any number of holes, some reaching outside the window."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n = draw(st.integers(3, 40))
    centre = rng.uniform([-3, -3], [W + 3, H + 3])
    radius = 10 ** rng.uniform(-2, 1.2)
    angles = np.sort(rng.uniform(0, 2 * np.pi, n))
    points = centre + radius * rng.uniform(0.2, 1, n)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    if draw(st.booleans()):
        points = np.round(points * 2) / 2  # vertices and edges on pixel borders
    polygon = shapely.make_valid(shapely.Polygon(points))
    for _ in range(draw(st.integers(0, 3))):
        hole = shapely.Point(centre + rng.uniform(-0.3, 0.3, 2) * radius).buffer(radius * rng.uniform(0.05, 0.3), 4)
        polygon = shapely.difference(polygon, hole)
    parts = [p for p in shapely.get_parts(polygon) if p.geom_type == "Polygon" and p.area > 1e-9]
    return shapely.MultiPolygon(parts) if len(parts) > 1 else (parts[0] if parts else shapely.box(1, 1, 2, 2))


@settings(max_examples=150, deadline=None)
@given(polygons())
def test_polygons_with_holes_equal_exact_intersections(polygon):
    np.testing.assert_allclose(dense(arrays([polygon]))[0], by_shapely(polygon), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(polygons(), st.integers(0, 2**32 - 1))
def test_windows_cut_one_and_the_same_coverage(polygon, seed):
    rng = np.random.default_rng(seed)
    y0, x0 = rng.integers(-5, 20, 2)
    h, w = rng.integers(1, 20, 2)
    full = dense(arrays([polygon]), (-10, -10, 60, 60))[0]
    part = dense(arrays([polygon]), (y0, x0, h, w))[0]
    np.testing.assert_allclose(part, full[y0 + 10 : y0 + 10 + h, x0 + 10 : x0 + 10 + w], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(polygons(), st.integers(0, 2**32 - 1))
def test_affine_maps_move_the_coverage(polygon, seed):
    rng = np.random.default_rng(seed)
    matrix = np.eye(3)
    matrix[:2, :2] = rng.normal(size=(2, 2))  # rotations, shears and flips
    matrix[:2, 2] = rng.uniform(0, 20, 2)
    if abs(np.linalg.det(matrix)) < 0.05:
        matrix[0, 0] += 2
    moved = shapely.transform(polygon, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])
    shapes_ = arrays([polygon]).transform(matrix)
    np.testing.assert_allclose(dense(shapes_)[0], by_shapely(moved), atol=1e-7)
    np.testing.assert_allclose(shapes_.area, moved.area, rtol=1e-9)
    np.testing.assert_allclose(shapes_.bounds[0], moved.bounds, atol=1e-9)
    np.testing.assert_allclose(shapes_.centroids[0], [moved.centroid.x, moved.centroid.y], atol=1e-6)


@pytest.mark.parametrize("radius", [0.05, 0.5, 2, 8, 55, 500])
def test_discs_have_the_area_of_true_discs(radius):
    size = int(2 * radius + 6)
    centre = radius + 2 + np.array([0.3, 0.8])
    found = dense(arrays([shapely.Point(centre)], radius), (0, 0, size, size))
    assert found.sum() == pytest.approx(np.pi * radius**2, rel=1e-9)
    expected = (
        by_shapely(shapely.Point(centre).buffer(radius, quad_segs=400), (0, 0, size, size)) if radius < 60 else None
    )
    if expected is not None:
        np.testing.assert_allclose(found[0], expected, atol=2e-5 * max(1, radius))


def test_a_disc_becomes_an_ellipse():
    matrix = np.array([[3.0, 1.0, 2.0], [0.0, -0.5, 9.0], [0, 0, 1]])
    shapes_ = arrays([shapely.Point(2, 3)], [2.0]).transform(matrix)
    outline = shapely.transform(
        shapely.Point(2, 3).buffer(2, quad_segs=2000), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]
    )
    assert shapes_.area[0] == pytest.approx(np.pi * 4 * 1.5)
    np.testing.assert_allclose(shapes_.bounds[0], outline.bounds, atol=1e-4)
    np.testing.assert_allclose(dense(shapes_)[0], by_shapely(outline), atol=1e-4)


def test_cases_at_the_border_and_below_a_pixel():
    tiny = 1e-4
    shapes = [
        shapely.box(3.25, 4.25, 3.25 + tiny, 4.25 + tiny),  # far smaller than a pixel
        shapely.box(-2, -2, 0, 5),  # touches the border from outside
        shapely.box(-2, 3, 1.5, 4),  # crosses it
        shapely.box(W, 0, W + 4, 4),
        shapely.box(100, 100, 110, 110),
        shapely.box(-50, -50, 100, 100),  # covers everything
    ]
    found = dense(arrays(shapes))
    assert found[0].sum() == pytest.approx(tiny**2, rel=1e-6)
    assert np.count_nonzero(found[0]) == 1
    assert found[1].sum() == 0
    np.testing.assert_array_equal(found[2, 3, :3], [1, 0.5, 0])
    assert found[3].sum() == 0
    assert found[4].sum() == 0
    assert (found[5] == 1).all()


def test_far_from_the_origin_no_pixel_outside_is_touched():
    rng = np.random.default_rng(0)
    centres = rng.uniform(1e5, 1e5 + 500, (300, 2))
    shapes = shapely.buffer(shapely.points(centres), rng.uniform(0.1, 9, 300), quad_segs=5)
    window = (100_000 - 10, 100_000 - 10, 520, 520)
    W_ = coverage(arrays(shapes), window)
    np.testing.assert_allclose(W_.sum(axis=1), shapely.area(shapes), rtol=1e-6)
    assert W_.data.min() > 1e-12
    bounds = shapely.bounds(shapes)
    pixels = (np.ceil(bounds[:, 2:]) - np.floor(bounds[:, :2])).prod(axis=1)
    assert (np.diff(W_.indptr) <= pixels).all()


def test_weights_center_counts_pixel_centres():
    rng = np.random.default_rng(1)
    shapes = [shapely.Point(p).buffer(r, 3) for p, r in zip(rng.uniform(0, 25, (40, 2)), rng.uniform(0.2, 8, 40))]
    shapes.append(shapely.box(2, 2, 20, 20).difference(shapely.box(5.2, 5.2, 9.9, 9.9)))
    found = dense(arrays(shapes), weights="center")
    y, x = np.mgrid[:H, :W] + 0.5
    for got, shape in zip(found, shapes):
        np.testing.assert_array_equal(got, shapely.contains_xy(shape, x, y))


def test_weights_center_gives_a_centre_on_a_shared_border_to_one_shape():
    edges = np.arange(0.5, 12, 2)
    shapes = [shapely.box(a, b, a + 2, b + 2) for a in edges[:-1] for b in edges[:-1]]
    found = dense(arrays(shapes), (0, 0, 12, 12), weights="center")
    assert set(np.unique(found.sum(axis=0))) == {0, 1}
    assert found.sum() == len(shapes) * 4


def test_a_partition_covers_every_pixel_once():
    rng = np.random.default_rng(2)
    cells = shapely.get_parts(
        shapely.voronoi_polygons(shapely.MultiPoint(rng.uniform(0, 30, (60, 2))), extend_to=shapely.box(-9, -9, 40, 40))
    )
    np.testing.assert_allclose(dense(arrays(cells)).sum(axis=0), 1, atol=1e-12)


def test_ring_orientation_does_not_matter():
    shell, hole = [(1, 1), (9, 1), (9, 9), (1, 9)], [(3, 3), (5, 3), (5, 6), (3, 6)]
    found = [dense(arrays([shapely.Polygon(a, [b])]))[0] for a in (shell, shell[::-1]) for b in (hole, hole[::-1])]
    for other in found:
        assert other.sum() == pytest.approx(64 - 6)
        np.testing.assert_array_equal(other, found[0])


def test_order_is_kept_and_kinds_may_be_mixed():
    shapes = [
        shapely.Point(3, 4),
        shapely.box(1, 1, 2, 3),
        shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.Point(5, 5).buffer(1)]),
        shapely.Point(7, 7),
    ]
    shapes_ = arrays(shapes, [1, np.nan, np.nan, 2])
    assert shapes_.is_ellipse.tolist() == [True, False, False, True]
    expected = [np.pi, 2, 1 + shapes[2].geoms[1].area, 4 * np.pi]
    np.testing.assert_allclose(shapes_.area, expected)
    index = [3, 1, 1, 2]
    taken = shapes_.take(index)
    np.testing.assert_allclose(taken.area, np.array(expected)[index])
    np.testing.assert_array_equal(dense(taken), dense(shapes_)[index])
    joined = ShapeArrays.concatenate([arrays(shapes[1:3]), shapes_])
    np.testing.assert_array_equal(dense(joined), dense(shapes_)[[1, 2, 0, 1, 2, 3]])
    np.testing.assert_array_equal(shapes_.take(np.array([False, True, False, True])).area, shapes_.area[[1, 3]])
    np.testing.assert_allclose(shapes_.centroids[[0, 1, 3]], [[3, 4], [1.5, 2], [7, 7]])
    np.testing.assert_allclose(taken.centroids, shapes_.centroids[index])


def test_unions_of_rectangles():
    shapes_ = ShapeArrays.from_rectangles([[0, 0, 2, 1], [0, 1, 1, 2], [4, 4, 5, 6]], [0, 0, 2], 3)
    assert shapes_.area.tolist() == [3, 0, 2]
    np.testing.assert_allclose(shapes_.centroids, [[5 / 6, 5 / 6], [np.nan, np.nan], [4.5, 5]])
    found = dense(shapes_)
    assert found[1].sum() == 0
    assert found[0, :2, :2].tolist() == [[1, 1], [1, 0]]
    assert np.isnan(shapes_.bounds[1]).all()


def test_empty_input():
    shapes_ = arrays([])
    assert len(shapes_) == 0
    assert shapes_.bounds.shape == (0, 4)
    assert coverage(shapes_, (0, 0, 3, 3)).shape == (0, 9)
    assert coverage(arrays([shapely.box(0, 0, 1, 1)]), (0, 0, 0, 0)).shape == (1, 0)


def test_arrays_from_another_process_are_read_only():
    shapes = arrays([shapely.box(0, 0, 1, 0.5)])
    for value in vars(shapes).values():
        value.flags.writeable = False
    assert coverage(shapes, (0, 0, 3, 3)).sum() == 0.5


@pytest.mark.parametrize(
    ("geometries", "radius", "error", "message"),
    [
        ([shapely.LineString([(0, 0), (1, 1)])], None, TypeError, "LINESTRING"),
        ([None], None, TypeError, "None"),
        ([shapely.Point(0, 0)], None, ValueError, "radius"),
        ([shapely.Point(0, 0)], -1, ValueError, "radius"),
    ],
)
def test_bad_geometries(geometries, radius, error, message):
    with pytest.raises(error, match=message):
        arrays(geometries, radius)


def test_bad_arguments():
    shapes_ = arrays([shapely.box(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="'area', 'center'"):
        coverage(shapes_, (0, 0, 2, 2), "centre")
    with pytest.raises(ValueError, match="negative"):
        coverage(shapes_, (0, 0, -2, 2))
    with pytest.raises(ValueError, match="inverted"):
        shapes_.transform(np.diag([1, 0, 1]))
    with pytest.raises(ValueError, match="affine"):
        shapes_.transform(np.eye(2))


@pytest.mark.parametrize("home", ["writable", "nowhere"])
def test_a_read_only_installation_works(tmp_path, home):
    """Nothing can be written beside the source, nor (second case) in the user's cache folder."""
    package = tmp_path / "site" / "pixnet"
    shutil.copytree(Path(pixnet.__file__).parent / "_core" / "coverage", package / "_core" / "coverage")
    for folder in (package, package / "_core"):
        (folder / "__init__.py").write_text("")
    # A file where numba would make its folder keeps it out even for root, whom permissions do not stop.
    shutil.rmtree(package / "_core" / "coverage" / "__pycache__", ignore_errors=True)
    (package / "_core" / "coverage" / "__pycache__").write_text("")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    folder = tmp_path / "home" if home == "writable" else blocked / "home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "XDG", "PYTHON"))} | {
        "PYTHONPATH": str(tmp_path / "site"),
        "HOME": str(folder),
    }
    code = """
        from pixnet._core.coverage import ShapeArrays, coverage
        import shapely
        print(coverage(ShapeArrays.from_geometries([shapely.box(0, 0, 1, .5)]), (0, 0, 1, 1)).sum())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.5"
    assert (home == "writable") == any(folder.rglob("*.nbi"))
