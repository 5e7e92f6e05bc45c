"""Tissue: right on real sections, on synthetic ones, on empty glass; and what the element looks like."""

from __future__ import annotations

import dask.array as da
import geopandas
import numpy as np
import pytest
import spatialdata
from PIL import Image
from shapely import box
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Scale, get_transformation

import pixnet as px
from pixnet._core.slide.tissue import compute_mask
from pixnet._sdata.record import find_entry


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def tissue():
    return px.datasets.synthetic_tissue(800, n_genes=13, shapes=("spots",))


def true_mask(sdata, shape):
    """The true tissue on the pixels of a mask."""
    truth = np.isfinite(sdata["truth"].values[-1])
    rows, cols = (((np.arange(n) + 0.5) * t / n).astype(int) for n, t in zip(shape, truth.shape))
    return truth[rows][:, cols]


def test_synthetic(tissue):
    found = px.pp.tissue_mask(tissue, inplace=False)
    assert found.dtype == np.uint8
    assert overlap(found.values > 0, true_mask(tissue, found.shape)) > 0.92


@pytest.mark.parametrize("stain_seed", [1, 2, 3])
@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_stain_and_resolution(stain_seed, mpp):
    sdata = px.datasets.synthetic_tissue(600, mpp=mpp, n_genes=13, seed=stain_seed, stain_seed=stain_seed, shapes=())
    found = px.pp.tissue_mask(sdata, inplace=False)
    assert overlap(found.values > 0, true_mask(sdata, found.shape)) > 0.92


def test_transform_and_record(tissue):
    sdata = SpatialData(images={"he": tissue["he"]})
    assert px.pp.tissue_mask(sdata) is None
    mask = sdata["he_tissue"]
    assert find_entry(sdata, "masks", "he")["mask_key"] == "he_tissue"
    matrix = get_transformation(mask, "global").to_affine_matrix(("x", "y"), ("x", "y"))
    assert 4 <= matrix[0, 0] * 0.5 <= 8
    assert matrix[0, 0] * mask.shape[1] == pytest.approx(1600, abs=matrix[0, 0])
    assert set(get_transformation(mask, get_all=True)) == {"global", "um", "pixnet_um"}
    with pytest.raises(ValueError, match="'he_tissue' exists.*overwrite=True"):
        px.pp.tissue_mask(sdata)
    px.pp.tissue_mask(sdata, overwrite=True)


@pytest.mark.parametrize("value", [255, 240, 200])
def test_empty_glass(value):
    noisy = np.random.default_rng(0).normal(value, 2, (3, 900, 700)).clip(0, 255).astype(np.uint8)
    assert not compute_mask(noisy, 5.0).any()
    assert not compute_mask(np.full((3, 300, 300), value, dtype=np.uint8), 5.0).any()


def test_shaded_glass_and_padding():
    y, x = np.mgrid[:600, :600]
    shaded = np.stack([245 - 40 * x / 600, 235 - 40 * y / 600, 240 - 20 * x / 600]).astype(np.uint8)
    assert not compute_mask(shaded, 5.0).any()
    shaded[:, :, 300:] = 0  # a scanner's black padding
    assert not compute_mask(shaded, 5.0).any()


def test_tissue_everywhere():
    pink = np.random.default_rng(0).normal([[[200]], [[120]], [[170]]], 25, (3, 200, 200)).clip(0, 255).astype(np.uint8)
    assert compute_mask(pink, 5.0).mean() > 0.99


def test_backed(tissue, tmp_path):
    sdata = SpatialData(images={"he": tissue["he"]})
    sdata.write(tmp_path / "a.zarr")
    sdata = spatialdata.read_zarr(tmp_path / "a.zarr")
    px.pp.tissue_mask(sdata)
    back = spatialdata.read_zarr(tmp_path / "a.zarr")
    assert (back["he_tissue"].values == sdata["he_tissue"].values).all()
    assert find_entry(back, "masks", "he")["mask_key"] == "he_tissue"


def test_unknown_resolution_and_key(tissue):
    sdata = SpatialData(images={"he": Image2DModel.parse(np.zeros((3, 64, 64), np.uint8), dims=("c", "y", "x"))})
    with pytest.raises(ValueError, match="set_mpp"):
        px.pp.tissue_mask(sdata)
    with pytest.raises(KeyError, match="no image 'slide'.*'he'"):
        px.pp.tissue_mask(tissue, "slide")


def test_only_the_coarse_level_is_read():
    """A slide with a pyramid must not be decoded at full resolution for its mask."""

    def refuse(block):
        raise AssertionError("level 0 was read")

    fine = da.zeros((3, 4096, 4096), chunks=(3, 1024, 1024), dtype=np.uint8).map_blocks(
        refuse, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    coarse = da.full((3, 409, 409), 255, dtype=np.uint8)
    from pixnet._sdata.raster_element import raster_element

    sdata = SpatialData(images={"he": raster_element([fine, coarse], [(1, 1), (4096 / 409,) * 2])})
    px.pp.set_mpp(sdata, "he", 0.5)
    assert not px.pp.tissue_mask(sdata, inplace=False).values.any()


def test_image_in_another_frame(tissue):
    image = Image2DModel.parse(
        tissue["he"]["scale0"]["image"].values,
        dims=("c", "y", "x"),
        transformations={"slide": Scale([3.0, 3.0], ("x", "y"))},
    )
    sdata = SpatialData(images={"he": image})
    px.pp.set_mpp(sdata, "he", 0.5)
    px.pp.tissue_mask(sdata)
    matrix = get_transformation(sdata["he_tissue"], "slide").to_affine_matrix(("x", "y"), ("x", "y"))
    assert matrix[0, 0] == pytest.approx(33.0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "mpp", "share", "inside", "outside"),
    [
        # share of tissue; points (x, y as shares of the picture) that are tissue, and that are not
        (
            "her2st/ST-imgs/C/C2/5714_HE_BT_C2.jpg",
            0.688,
            (0.15, 0.20),
            [(0.6, 0.6), (0.75, 0.4)],
            [(0.1, 0.1), (0.9, 0.4)],
        ),
        # pink light, a smear of eosin above and left of the tissue, and fat, which is tissue
        (
            "her2st/ST-imgs/B/B4/BT10737_D2_HE.jpg",
            0.688,
            (0.25, 0.30),
            [(0.2, 0.8), (0.7, 0.7)],
            [(0.25, 0.25), (0.1, 0.5), (0.8, 0.3)],
        ),
        ("visium_hd_kidney/he.jpg", 2.0026, (0.86, 0.91), [(0.5, 0.5), (0.1, 0.1)], [(0.05, 0.8), (0.2, 0.95)]),
        ("wsi/CMU-1-Small-Region.svs", 0.499, (0.38, 0.48), [(0.5, 0.6), (0.4, 0.8)], [(0.1, 0.7), (0.9, 0.3)]),
        ("wsi/instanseg_HE_example.tif", 0.5, (0.70, 0.80), [(0.5, 0.5)], [(0.02, 0.02), (0.98, 0.98)]),
    ],
)
def test_real_sections(shared_data, file, mpp, share, inside, outside):
    Image.MAX_IMAGE_PIXELS = None
    picture = Image.open(shared_data / file).convert("RGB")
    factor = max(1, round(5.5 / mpp))
    mask = compute_mask(np.asarray(picture.reduce(factor)).transpose(2, 0, 1), mpp * factor)
    assert share[0] < mask.mean() < share[1]
    at = [mask[int(y * mask.shape[0]), int(x * mask.shape[1])] for x, y in [*inside, *outside]]
    assert at == [True] * len(inside) + [False] * len(outside)


@pytest.mark.data
@pytest.mark.parametrize("section", ["C2", "B4"])
def test_real_spots_lie_on_tissue(shared_data, section):
    sdata = px.datasets.her2st(section, path=shared_data / "her2st")
    mask = px.pp.tissue_mask(sdata, inplace=False)
    matrix = get_transformation(mask, "global").to_affine_matrix(("x", "y"), ("x", "y"))
    x, y = (
        (sdata["spots"].geometry.x / matrix[0, 0]).astype(int),
        (sdata["spots"].geometry.y / matrix[1, 1]).astype(int),
    )
    assert mask.values[y, x].mean() > 0.97


def test_regions_and_what_is_excluded(tissue):
    sdata = SpatialData(images={"he": tissue["he"]}, shapes={"spots": tissue["spots"]})
    halves = geopandas.GeoDataFrame(geometry=[box(0, 0, 800, 1600), box(800, 0, 1600, 1600)])
    sdata["left"] = ShapesModel.parse(halves.iloc[:1])
    sdata["fold"] = ShapesModel.parse(geopandas.GeoDataFrame(geometry=[box(200, 400, 400, 1000)]))
    sdata["halves"] = ShapesModel.parse(halves)
    whole = px.pp.tissue_mask(sdata, inplace=False).values
    left = px.pp.tissue_mask(sdata, within="left", exclude=["fold"], inplace=False)
    scale = get_transformation(left, "global").to_affine_matrix(("x", "y"), ("x", "y"))[0, 0]
    x, y = ((np.arange(n) + 0.5) * scale for n in whole.shape[::-1])
    expected = whole.astype(bool) & (x < 800)[None, :]
    expected &= ~(((x > 200) & (x < 400))[None, :] & ((y > 400) & (y < 1000))[:, None])
    assert (left.values.astype(bool) != expected).mean() < 0.003
    np.testing.assert_array_equal(px.pp.tissue_mask(sdata, within="halves", inplace=False).values, whole)
    with pytest.raises(ValueError, match="no tissue of image 'he' is left"):
        px.pp.tissue_mask(sdata, exclude="halves")
    with pytest.raises(KeyError, match="'ink'"):
        px.pp.tissue_mask(sdata, exclude="ink")
    with pytest.raises(ValueError, match=r"is a shapes element.*tissue_mask\(sdata, 'he', within='left'\)"):
        px.pp.check_spots(sdata, "spots", mask_key="left")
