"""Nuclei are found where they are, and the tiles do not show."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import dask
import numpy as np
import pytest
import shapely
import spatialdata
from scipy import ndimage
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

import pixnet as px
from pixnet._core.cells import Found, joined
from pixnet._sdata.raster_element import pyramid, raster_element

PINK, BLUE = np.array([225, 170, 205]), np.array([70, 60, 130])
MPP = 0.5


def painted(height=400, width=560, mpp=MPP, seed=0):
    """Return a slide with blue nuclei on pink tissue, and their centres (x, y): some touch, some lie where tiles meet."""
    rng = np.random.default_rng(seed)
    centres = []
    for row in range(30, height - 20, 44):
        for col in range(30, width - 20, 44):
            centres.append((col + rng.uniform(-6, 6), row + rng.uniform(-6, 6)))
            if rng.random() < 0.3:  # a neighbour that touches
                angle = rng.uniform(0, 2 * np.pi)
                centres.append((centres[-1][0] + 14 * np.cos(angle), centres[-1][1] + 14 * np.sin(angle)))
    centres = np.array(centres)
    y, x = np.mgrid[:height, :width]
    distance = np.full((height, width), np.inf)
    for cx, cy in centres:
        part = np.s_[max(int(cy) - 12, 0) : int(cy) + 13, max(int(cx) - 12, 0) : int(cx) + 13]
        distance[part] = np.minimum(distance[part], np.hypot(x[part] - cx, y[part] - cy))
    share = ndimage.gaussian_filter((distance < 7.5).astype(float), 0.8)[..., None]
    pixels = PINK * (1 - share) + BLUE * share + rng.normal(0, 5, (height, width, 1))
    pixels = pixels.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    sdata = SpatialData(images={"he": raster_element(*pyramid(pixels))})
    px.pp.set_mpp(sdata, "he", mpp)
    return sdata, centres


@pytest.fixture(scope="module")
def slide():
    return painted()


def test_each_nucleus_is_one_cell(slide):
    sdata, centres = slide
    cells = px.pp.segment_cells(sdata, mask_key=False, inplace=False)
    assert cells.geometry.is_valid.all()
    assert list(cells.index) == list(range(1, len(cells) + 1))
    tree = shapely.STRtree(cells.geometry.to_numpy())
    point, cell = tree.query(shapely.points(centres), predicate="intersects")
    assert abs(len(cells) - len(centres)) <= 0.02 * len(centres)
    assert len(set(point)) >= 0.99 * len(centres)
    assert len(set(cell)) >= 0.98 * len(centres)
    # a nucleus of radius 3.75 µm and 4 µm around it, where it stands alone
    alone = shapely.area(cells.geometry.to_numpy()) * MPP**2
    assert np.quantile(alone, 0.9) == pytest.approx(np.pi * 7.75**2, rel=0.15)


def test_tiles_do_not_show(slide):
    sdata, _ = slide
    whole = px.pp.segment_cells(sdata, mask_key=False, inplace=False)
    tiled = px.pp.segment_cells(sdata, mask_key=False, inplace=False, tile_size=210)
    assert len(whole) == len(tiled)
    assert whole.geometry.geom_equals_exact(tiled.geometry, 1e-9).all()


def test_tiles_run_in_other_processes():
    sdata, _ = painted(200, 300)
    here = px.pp.segment_cells(sdata, mask_key=False, inplace=False, tile_size=160)
    with dask.config.set(scheduler="processes", num_workers=1):
        there = px.pp.segment_cells(sdata, mask_key=False, inplace=False, tile_size=160)
    assert here.geometry.geom_equals_exact(there.geometry, 0).all()


def test_nuclei_alone(slide):
    sdata, _ = slide
    nuclei = px.pp.segment_cells(sdata, mask_key=False, inplace=False, expand_um=0)
    assert nuclei.area.median() * MPP**2 == pytest.approx(np.pi * 3.75**2, rel=0.15)


def test_finer_and_coarser_slides(slide):
    sdata, centres = slide
    pixels = np.asarray(sdata["he"]["scale0"]["image"].data)[:, :220, :300]
    sdata = SpatialData(images={"he": raster_element(*pyramid(pixels))})
    px.pp.set_mpp(sdata, "he", MPP)
    fine = SpatialData(images={"he": raster_element(*pyramid(pixels.repeat(2, 1).repeat(2, 2)))})
    px.pp.set_mpp(fine, "he", MPP / 2)
    found = px.pp.segment_cells(fine, mask_key=False, inplace=False)
    expected = px.pp.segment_cells(sdata, mask_key=False, inplace=False)
    np.testing.assert_allclose(found.bounds, 2 * expected.bounds)
    rough, centres = painted(220, 300, mpp=0.62)  # enlarged to 0.5
    found = px.pp.segment_cells(rough, mask_key=False, inplace=False)
    assert abs(len(found) - len(centres)) <= 0.05 * len(centres)


def test_stored_and_summed_over(tmp_path):
    sdata, centres = painted(200, 300)
    sdata.write(tmp_path / "a.zarr")
    px.pp.segment_cells(sdata, mask_key=False)
    again = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert len(again["cells"]) == len(sdata["cells"])
    assert set(get_transformation(again["cells"], get_all=True)) == {"global"}
    px.tl.aggregate(again, "cells", image_key="he")
    assert again["cells_he"].n_obs == len(again["cells"])
    x0, y0, x1, y1 = again["cells"].total_bounds
    assert 0 <= x0 < x1 <= 300
    assert 0 <= y0 < y1 <= 200
    with pytest.raises(ValueError, match="'cells' exists"):
        px.pp.segment_cells(again)


def test_only_cells_on_the_mask(slide):
    sdata, _ = slide
    mask = np.zeros((400, 560), np.uint8)
    mask[100:300, 200:400] = 1
    sdata["part"] = raster_element([mask], [(1.0, 1.0)], channels=None)
    found = px.pp.segment_cells(sdata, mask_key="part", inplace=False)
    whole = px.pp.segment_cells(sdata, mask_key=False, inplace=False)
    inside = whole.representative_point()
    inside = inside.x.between(208, 392) & inside.y.between(108, 292)
    assert inside.sum() <= len(found) < 0.35 * len(whole)


def blue_pixels(rgb):
    """A method of one's own, which sees every part of the slide a little differently in each tile."""
    assert rgb.dtype == np.uint8
    labels, _ = ndimage.label(ndimage.binary_opening(rgb[..., 0] < 140 + int(rgb.sum()) % 20))
    return labels


def test_own_method(slide):
    sdata, centres = slide
    callers = set()

    def method(rgb):
        callers.add(threading.get_ident())
        return blue_pixels(rgb)

    found = px.pp.segment_cells(sdata, mask_key=False, method=method, expand_um=0, tile_size=150, inplace=False)
    assert len(callers) == 1
    assert 0.6 * len(centres) < len(found) <= len(centres)  # those that touch are one
    # no two overlap, no one is missing in between
    a, b = shapely.STRtree(found.geometry.to_numpy()).query(found.geometry.to_numpy(), predicate="overlaps")
    assert len(a) == 0
    hit = shapely.STRtree(found.geometry.to_numpy()).query(shapely.points(centres), predicate="intersects")[0]
    assert len(set(hit)) >= 0.97 * len(centres)


@pytest.mark.parametrize("package", ["cellpose", "stardist", "instanseg"])
def test_the_networks_of_the_guide(slide, package):
    """The guide's own lines, where the network is installed and its weights can be had."""
    pytest.importorskip(package)
    guide = Path(__file__).parents[2] / "docs" / "guides" / "cells.md"
    (lines,) = [block for block in re.findall(r"```py\n(.*?)```", guide.read_text(), re.S) if package in block]
    sdata = SpatialData(images=dict(slide[0].images))
    try:
        exec(lines, {"px": px, "sdata": sdata})
    except (OSError, RuntimeError) as error:
        pytest.skip(f"the weights of {package} cannot be had: {error}")
    assert len(sdata["cells"]) > 20


def test_cells_that_two_tiles_found_are_kept_once():
    box = shapely.box
    one = Found(np.array([box(0, 0, 10, 10), box(20, 0, 30, 10)]), np.array([[5.0, 5.0], [5.0, 25.0]]))
    two = Found(np.array([box(20, 1, 31, 11), box(28, 0, 40, 10)]), np.array([[6.0, 25.5], [5.0, 34.0]]))
    found = joined([one, two])
    assert [p.bounds[0] for p in found.polygons] == [0, 20, 28]
    assert len(joined([]).polygons) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": 5}, TypeError, "method is 5"),
        ({"method": lambda rgb: rgb[:5, :5, 0]}, TypeError, r"method returned uint8 \(5, 5\)"),
        ({"method": lambda rgb: rgb[..., 0] / 2}, TypeError, "method returned float64"),
        ({"method": lambda rgb: 0 * rgb[..., 0]}, ValueError, "no cell was found"),
        ({"mpp": 5}, ValueError, "mpp is 5; a number from 0.1 to 1 "),
        ({"expand_um": -1}, ValueError, "expand_um is -1"),
        ({"tile_size": "big"}, ValueError, "tile_size is 'big'"),
        ({"image_key": "other"}, KeyError, "'other'"),
    ],
)
def test_refusals(slide, arguments, error, message):
    with pytest.raises(error, match=message):
        px.pp.segment_cells(slide[0], **{"mask_key": False, "inplace": False, **arguments})


def test_coarse_and_empty_slides_are_refused():
    coarse, _ = painted(300, 300, mpp=4.4)
    with pytest.raises(ValueError, match=r"4.4 µm/px, and nuclei are told apart up to 1"):
        px.pp.segment_cells(coarse)
    empty = SpatialData(images={"he": raster_element(*pyramid(np.full((3, 400, 400), 243, np.uint8)))})
    px.pp.set_mpp(empty, "he", 0.5)
    with pytest.raises(ValueError, match="no tissue found"):
        px.pp.segment_cells(empty)
    with pytest.raises(ValueError, match="no cell was found"):
        px.pp.segment_cells(empty, mask_key=False)


@pytest.mark.slow
@pytest.mark.data
def test_her2st(shared_data, monkeypatch):
    """A whole section: as many cells as there are, the same for two sizes of tiles."""
    monkeypatch.setenv("PIXNET_DATA_DIR", str(shared_data))
    sdata = px.datasets.her2st("C5")
    px.pp.tissue_mask(sdata)
    first, second = (px.pp.segment_cells(sdata, tile_size=n, inplace=False) for n in (1024, 700))
    assert 5_000 < len(first) < 60_000
    assert first.geometry.geom_equals_exact(second.geometry, 1e-6).all()
