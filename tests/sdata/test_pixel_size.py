"""The pixel size of an image: where it stands, what is refused, and that it aligns nothing."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation, set_transformation

import pixnet as px
from pixnet._sdata.pixel_size import PIXNET_UM, find_mpp, get_mpp
from pixnet._sdata.rasters import levels, pyramid, raster_element
from pixnet._sdata.store.element_store import write_mpp
from pixnet._sdata.transforms import shared_coordinate_system


def slide(side: int = 64) -> SpatialData:
    pixels = np.zeros((3, side, side), np.uint8)
    return SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))})


def affine(matrix):
    full = np.eye(3)
    full[:2, :2] = matrix
    return Affine(full, input_axes=("x", "y"), output_axes=("x", "y"))


@pytest.mark.parametrize("mpp", [0.1, 0.25, 0.4987, 200 / 290, 4.0])
def test_what_is_stated_is_found_to_the_last_bit(mpp, tmp_path):
    sdata = slide()
    write_mpp(sdata, "he", mpp)
    assert get_mpp(sdata, "he") == mpp
    sdata.write(tmp_path / "a.zarr")
    assert get_mpp(sd.read_zarr(tmp_path / "a.zarr"), "he") == mpp


@pytest.mark.parametrize("consolidated", [True, False])
def test_a_stored_pixel_size_is_corrected_on_disk(tmp_path, consolidated):
    slide().write(tmp_path / "a.zarr", consolidate_metadata=consolidated)
    sdata = sd.read_zarr(tmp_path / "a.zarr")
    for mpp in (0.5, 0.25):
        px.pp.set_mpp(sdata, "he", mpp)
        again = sd.read_zarr(tmp_path / "a.zarr")
        assert get_mpp(again, "he") == mpp
        assert again.has_consolidated_metadata() == consolidated
        assert "pixnet" not in again.attrs


def test_scales_of_levels_stay_exact():
    # SpatialData's own set_transformation replaces them by ratios of the shapes: 463 / 231 in place of 2.
    made, scales = pyramid(np.zeros((3, 463, 301), np.uint8))
    element = raster_element(made, scales, transformations={"global": Identity()})
    sdata = SpatialData(images={"he": element})
    before = [level.scale for level in levels(element)]
    write_mpp(sdata, "he", 0.5)
    write_mpp(sdata, "he", 0.25)
    assert [level.scale for level in levels(sdata["he"])] == before == scales
    for level in levels(sdata["he"]):
        matrix = get_transformation(level.data, PIXNET_UM).to_affine_matrix(("y", "x"), ("y", "x"))
        np.testing.assert_allclose(np.diag(matrix)[:2], 0.25 * np.array(level.scale))
    sd.transform(sdata["he"], to_coordinate_system="global")  # which wants every system of a level to begin alike


def test_turned_mirrored_and_shifted_images_have_a_pixel_size():
    turn = np.deg2rad(30)
    for matrix in ([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], [[-1, 0], [0, 1]], [[0, 1], [1, 0]]):
        sdata = slide()
        set_transformation(sdata["he"], affine(0.5 * np.array(matrix)), PIXNET_UM)
        assert get_mpp(sdata, "he") == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({}, r"unknown.*set_mpp\(sdata, 'he', mpp\).*infer_mpp"),
        ({"um": Scale([0.5, 0.5], axes=("x", "y"))}, "unknown"),  # no coordinate system of the user's tells it
        ({"pixnet_umbra": Scale([0.5, 0.5], axes=("x", "y"))}, "unknown"),
        ({PIXNET_UM: affine([[0.5, 0], [0, 0.52]])}, r"not square.*'pixnet_um'.*1.040 times.*set_mpp"),
        ({PIXNET_UM: affine([[0.5, 0.1], [0, 0.5]])}, "not square.*shears"),
        ({PIXNET_UM: affine([[0, 0], [0, 0.5]])}, "cannot be inverted.*set_mpp"),
        (
            {PIXNET_UM: Scale([0.5, 0.5], axes=("x", "y")), "pixnet_um-a": Scale([0.25, 0.25], axes=("x", "y"))},
            r"several pixel sizes: 0.5 µm/px \('pixnet_um'\), 0.25 µm/px \('pixnet_um-a'\).*set_mpp",
        ),
    ],
)
def test_what_is_refused_and_that_the_fix_fixes(systems, message):
    sdata = slide()
    for name, transformation in systems.items():
        set_transformation(sdata["he"], transformation, name)
    with pytest.raises(ValueError, match=message):
        px.pp.tissue_mask(sdata)
    px.pp.set_mpp(sdata, "he", 0.5)
    assert get_mpp(sdata, "he") == 0.5


def test_names_that_concatenate_gives_are_known():
    sdata = slide()
    set_transformation(sdata["he"], Scale([0.5, 0.5], axes=("x", "y")), "pixnet_um-a-b")
    assert get_mpp(sdata, "he") == 0.5
    px.pp.set_mpp(sdata, "he", 0.25)
    assert set(get_transformation(sdata["he"], get_all=True)) == {"global", PIXNET_UM}


def test_another_object_that_shares_the_transformations_is_left_alone():
    one = slide()
    other = SpatialData(images={"he": one["he"].isel(x=slice(0, 32))})
    write_mpp(other, "he", 0.5)
    assert find_mpp(one, "he") is None


# alignment -----------------------------------------------------------------------------------------------------------


def test_a_pixel_size_aligns_nothing():
    sdata = slide()
    squares = gpd.GeoDataFrame({"geometry": [shapely.box(0, 0, 9, 9)]})
    sdata["squares"] = ShapesModel.parse(squares, transformations={PIXNET_UM: Identity(), "a": Identity()})
    write_mpp(sdata, "he", 0.5)
    with pytest.raises(ValueError, match=r"'squares' \('a'\) and 'he' \('global'\) share no coordinate system"):
        px.tl.aggregate(sdata, "squares", image_key="he")
    set_transformation(sdata["he"], Identity(), "a")
    assert shared_coordinate_system(sdata, "squares", "he") == "a"
    with pytest.raises(ValueError, match="'pixnet_um' tells the pixel size.*aligns no elements"):
        px.tl.aggregate(sdata, "squares", image_key="he", coordinate_system=PIXNET_UM)


def test_what_is_made_from_an_image_has_its_systems():
    sdata = px.datasets.synthetic_tissue(size_um=300, n_genes=5)
    px.pp.tissue_mask(sdata, key_added="mask")
    px.pp.make_grid(sdata, 50, mask_key="mask")
    assert set(get_transformation(sdata["mask"], get_all=True)) == {"global", "um", PIXNET_UM}
    assert find_mpp(sdata, "mask") == pytest.approx(5.5, rel=0.3)
    assert set(get_transformation(sdata["grid"], get_all=True)) == {"global", "um"}
    assert set(get_transformation(sdata["spots"], get_all=True)) == {"global", "um"}
