"""Grids: geometry, origin, tissue, other coordinate systems."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Identity, Scale, get_transformation

import pixnet as px


@pytest.fixture
def sdata():
    image = Image2DModel.parse(
        np.full((3, 300, 400), 255, dtype=np.uint8),
        dims=("c", "y", "x"),
        transformations={"global": Identity(), "um": Scale([0.5, 0.5], ("x", "y"))},
    )
    labels = np.zeros((30, 40), dtype=np.uint8)
    labels[:, 15:] = 7
    mask = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": Scale([10.0, 10.0], ("x", "y"))})
    sdata = SpatialData(images={"he": image}, labels={"mask": mask})
    px.pp.set_mpp(sdata, "he", 0.5)
    return sdata


def test_squares_start_at_the_origin_and_tile(sdata):
    px.pp.make_grid(sdata, 25, mask_key=False)
    grid = sdata["grid"]
    assert len(grid) == 6 * 8
    assert grid.total_bounds.tolist() == [0, 0, 400, 300]
    assert grid.geometry.iloc[0].equals(shapely.box(0, 0, 50, 50))
    assert shapely.area(shapely.union_all(grid.geometry.to_numpy())) == pytest.approx(120_000)
    assert grid["tissue"].to_numpy() == pytest.approx(1)
    assert set(get_transformation(grid, get_all=True)) == {"global", "um"}


def test_hexagons_tile_at_the_right_distance(sdata):
    px.pp.make_grid(sdata, 20, shape="hex", mask_key=False, key_added="hex")
    grid = sdata["hex"]
    area = grid.geometry.area.to_numpy()
    np.testing.assert_allclose(area, 40**2 * np.sqrt(3) / 2)
    union = shapely.area(shapely.union_all(grid.geometry.to_numpy(), grid_size=1e-6))
    assert union == pytest.approx(area.sum(), rel=1e-6)  # no overlap
    centres = np.column_stack([grid.geometry.centroid.x, grid.geometry.centroid.y])
    gaps = np.sort(np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1)), axis=1)[:, 1]
    np.testing.assert_allclose(gaps, 40)
    assert union > 0.9 * 120_000


def test_shapes_that_leave_the_image(sdata):
    # 300 px are 4.29 x 70: the fifth row is 29 % inside and goes; 400 px are 5.71 x 70: the sixth column stays
    grid = px.pp.make_grid(sdata, 35, mask_key=False, inplace=False)
    assert (grid["row"].max(), grid["col"].max()) == (3, 5)
    assert grid.loc[grid["col"] == 5, "tissue"].to_numpy() == pytest.approx(5 / 7)


def test_only_over_tissue(sdata):
    grid = px.pp.make_grid(sdata, 25, mask_key="mask", inplace=False)
    # tissue begins at x = 150: columns of 50 px from the fourth
    assert grid["col"].min() == 3
    grid = px.pp.make_grid(sdata, 30, mask_key="mask", inplace=False)
    # columns of 60 px: the third covers 120 to 180, exactly half of it tissue
    assert grid["col"].min() == 2
    assert grid.loc[grid["col"] == 2, "tissue"].to_numpy() == pytest.approx(0.5)


def test_recorded_mask_is_found_else_computed(sdata):
    with pytest.raises(ValueError, match="at least half on tissue.*mask_key=False"):
        px.pp.make_grid(sdata, 25)  # white: no tissue is found
    sdata["he_tissue"] = sdata["mask"]
    assert len(px.pp.make_grid(sdata, 25, inplace=False)) == 6 * 5


def test_for_aggregate():
    sdata = px.datasets.synthetic_tissue(400, n_genes=13, shapes=())
    px.pp.make_grid(sdata, 16, shape="hex")
    px.tl.aggregate(sdata, "grid", image_key="truth")
    table = sdata["grid_genes"]
    assert table.n_obs == len(sdata["grid"])
    assert (table.obs["coverage"] > 0.9).mean() > 0.8


def test_refusals(sdata):
    with pytest.raises(ValueError, match="'circle'; valid: 'square', 'hex'"):
        px.pp.make_grid(sdata, 10, shape="circle")
    for wrong in (0, -5, float("nan")):
        with pytest.raises(ValueError, match="size_um"):
            px.pp.make_grid(sdata, wrong)
    with pytest.raises(TypeError, match="size_um"):
        px.pp.make_grid(sdata, "8")
    with pytest.raises(ValueError, match="larger size_um"):
        px.pp.make_grid(sdata, 0.001, mask_key=False)
    with pytest.raises(KeyError, match="'tissue'"):
        px.pp.make_grid(sdata, 10, mask_key="tissue")
    px.pp.make_grid(sdata, 50, mask_key=False)
    with pytest.raises(ValueError, match="'grid' exists"):
        px.pp.make_grid(sdata, 10)
    px.pp.make_grid(sdata, 25, mask_key=False, overwrite=True)
    assert len(sdata["grid"]) == 48
    with pytest.raises(ValueError, match="not shapes"):
        px.pp.make_grid(sdata, 50, mask_key=False, key_added="mask", overwrite=True)
