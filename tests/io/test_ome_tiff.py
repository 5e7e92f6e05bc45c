"""OME-TIFF of chosen channels: pixels, names, pixel size and pyramid, as tifffile and ome-types read them."""

from __future__ import annotations

import json
import logging

import dask.array as da
import numpy as np
import ome_types
import pytest
import tifffile
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Scale

import pixnet as px
from pixnet._core.slide.pyramid import block_means
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.raster_element import raster_element
from pixnet._sdata.rasters import full_resolution

NAMES = ["EPCAM", "HLA-A", "odd <&> µ", "__total__"]


@pytest.fixture
def sdata():
    """A gene map with background, and an RGB slide."""
    values = np.random.default_rng(0).random((4, 1100, 1301), dtype=np.float32)
    values[:, 300:410, 700:901] = np.nan
    values[1] *= 0
    chunked = da.from_array(values, chunks=(2, 256, 256))
    one = raster_element([chunked], [(1.0, 1.0)], channels=NAMES)
    halves = [values]
    while len(halves) < 3:
        halves.append(block_means(halves[-1], 2, 2))
    pyramid = raster_element(halves, [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)], channels=NAMES)
    rgb = np.random.default_rng(1).integers(0, 255, (3, 700, 500), dtype=np.uint8)
    sdata = SpatialData(images={"one": one, "pyramid": pyramid, "he": raster_element([rgb], [(1.0, 1.0)])})
    for key in sdata.images:
        px.pp.set_mpp(sdata, key, 2.0)
    return sdata


def pixels(sdata, key):
    image = sdata[key]
    return np.asarray((image if key != "pyramid" else image["scale0"]["image"]).data)


@pytest.mark.parametrize("key", ["one", "pyramid"])
def test_pixels_names_and_levels(sdata, tmp_path, key):
    path = tmp_path / "a.ome.tif"
    px.io.write_ome_tiff(sdata, key, path, channels=["__total__", "odd <&> µ"])
    expected = pixels(sdata, key)[[3, 2]]
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert series.axes == "CYX"
        assert series.keyframe.is_tiled
        assert [level.shape for level in series.levels][:2] == [(2, 1100, 1301), (2, 550, 650)]
        np.testing.assert_array_equal(series.levels[0].asarray(), expected)
        half = block_means(expected, 2, 2)
        np.testing.assert_allclose(series.levels[1].asarray(), half, rtol=1e-6)
    ome = ome_types.from_tiff(path)
    (image,) = ome.images
    assert [channel.name for channel in image.pixels.channels] == ["__total__", "odd <&> µ"]
    assert (image.pixels.physical_size_x, image.pixels.physical_size_y) == (2.0, 2.0)
    assert image.pixels.physical_size_x_unit.value == "µm"
    assert image.pixels.type.value == "float"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ome.tif"]


def test_all_channels_of_a_stored_map(sdata, tmp_path):
    sdata.write(tmp_path / "a.zarr")
    px.io.write_ome_tiff(sdata, "pyramid", tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.ome.tif"), pixels(sdata, "pyramid"))


def test_slide_reads_what_is_written_of_a_slide(sdata, tmp_path):
    px.io.write_ome_tiff(sdata, "he", tmp_path / "he.ome.tif")
    again = px.io.slide(tmp_path / "he.ome.tif")
    np.testing.assert_array_equal(again["he"]["scale0"]["image"].data.compute(), pixels(sdata, "he"))


def test_whole_numbers(sdata, tmp_path):
    px.io.write_ome_tiff(sdata, "one", tmp_path / "a.ome.tif", channels=["EPCAM", "HLA-A"], dtype="uint16")
    found = tifffile.imread(tmp_path / "a.ome.tif")
    assert found.dtype == np.uint16
    factors = json.loads(ome_types.from_tiff(tmp_path / "a.ome.tif").images[0].description)["value of 1"]
    expected = pixels(sdata, "one")[:2]
    background = np.isnan(expected[0])
    assert (found[:, background] == 0).all()
    assert found[0].max() == 65535
    np.testing.assert_allclose(found[0] * factors["EPCAM"], np.nan_to_num(expected[0]), atol=1e-5)
    assert (found[1] == 0).all()


def test_each_chunk_is_read_once(sdata, tmp_path):
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"])
        return block

    values = da.zeros((4, 1024, 1024), chunks=(4, 512, 512), dtype=np.float32).map_blocks(read, dtype=np.float32)
    sdata["counted"] = raster_element([values, values[:, ::2, ::2]], [(1.0, 1.0), (2.0, 2.0)], channels=NAMES)
    reads.clear()
    px.io.write_ome_tiff(sdata, "counted", tmp_path / "a.ome.tif")
    assert len(reads) == 8  # once for each of the two levels


def test_unknown_pixel_size_is_said(sdata, tmp_path):
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("pixnet").addHandler(handler)
    sdata["other"] = raster_element([np.zeros((1, 60, 60), np.float32)], [(1.0, 1.0)], channels=["a"])
    px.io.write_ome_tiff(sdata, "other", tmp_path / "a.ome.tif")
    logging.getLogger("pixnet").removeHandler(handler)
    assert "is unknown, so that a.ome.tif does not state it" in found[0]
    assert ome_types.from_tiff(tmp_path / "a.ome.tif").images[0].pixels.physical_size_x is None


def test_refusals(sdata, tmp_path, monkeypatch):
    path = tmp_path / "a.ome.tif"
    with pytest.raises(KeyError, match="no image 'none'"):
        px.io.write_ome_tiff(sdata, "none", path)
    with pytest.raises(KeyError, match="'epcam' is not in image 'one'"):
        px.io.write_ome_tiff(sdata, "one", path, channels="epcam")
    with pytest.raises(ValueError, match="more than once"):
        px.io.write_ome_tiff(sdata, "one", path, channels=["EPCAM", "EPCAM"])
    with pytest.raises(ValueError, match="dtype is 'uint8'"):
        px.io.write_ome_tiff(sdata, "one", path, dtype="uint8")
    with pytest.raises(FileNotFoundError, match="no folder"):
        px.io.write_ome_tiff(sdata, "one", tmp_path / "b" / "a.tif")
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        px.io.write_ome_tiff(sdata, "one", path)
    monkeypatch.setattr("pixnet.io._write_ome_tiff._compressed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        px.io.write_ome_tiff(sdata, "one", path, overwrite=True)
    assert path.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


# reading back --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped():
    """A slide of 401 x 300 px, and a gene map of 4 px over it."""
    rgb = np.random.default_rng(1).integers(60, 200, (3, 300, 401), dtype=np.uint8)
    values = np.random.default_rng(0).random((4, 75, 101), dtype=np.float32)
    values[:, 10:20, 30:40] = np.nan
    genes = raster_element(
        [values], [(1.0, 1.0)], channels=NAMES, transformations={"global": Scale([4.0, 4.0], axes=("x", "y"))}
    )
    sdata = SpatialData(images={"he": raster_element([rgb], [(1.0, 1.0)]), "he_genes": genes})
    px.pp.set_mpp(sdata, "he", 0.5)
    px.pp.set_mpp(sdata, "he_genes", 2.0)
    sdata["spots"] = ShapesModel.parse(np.array([[60.0, 70.0], [140.0, 60.0], [300.0, 200.0]]), geometry=0, radius=25.0)
    return sdata


@pytest.mark.parametrize("backed", [False, True])
def test_a_map_comes_back(mapped, tmp_path, backed):
    px.io.write_ome_tiff(mapped, "he_genes", tmp_path / "again.ome.tif")
    if backed:
        mapped.write(tmp_path / "a.zarr")
    px.io.read_ome_tiff(mapped, tmp_path / "again.ome.tif", image_key="he")
    np.testing.assert_array_equal(full_resolution(mapped["again"]).values, mapped["he_genes"].values)
    assert find_mpp(mapped, "again") == 2.0
    for key in ("he_genes", "again"):
        px.tl.aggregate(mapped, "spots", image_key=key, key_added=f"by_{key}")
    np.testing.assert_array_equal(mapped["by_again"].X, mapped["by_he_genes"].X)


def test_scaled_numbers_come_back(mapped, tmp_path):
    px.io.write_ome_tiff(mapped, "he_genes", tmp_path / "a.ome.tif", dtype="uint16")
    found = px.io.read_ome_tiff(mapped, tmp_path / "a.ome.tif", image_key="he", inplace=False)
    np.testing.assert_allclose(full_resolution(found).values, np.nan_to_num(mapped["he_genes"].values), atol=1e-5)


def test_maps_of_other_programs(mapped, tmp_path):
    values = np.random.default_rng(0).random((38, 51)).astype(np.float32)
    tifffile.imwrite(tmp_path / "heat.tif", values)  # states neither names nor size
    found = px.io.read_ome_tiff(mapped, tmp_path / "heat.tif", image_key="he", inplace=False)
    np.testing.assert_array_equal(full_resolution(found).values[0], values)
    tifffile.imwrite(tmp_path / "other.tif", values[:20])
    with pytest.raises(ValueError, match="do not cover image 'he' of 401 x 300 px"):
        px.io.read_ome_tiff(mapped, tmp_path / "other.tif", image_key="he")
    tifffile.imwrite(tmp_path / "stack.ome.tif", np.zeros((3, 2, 38, 51), np.uint8), metadata={"axes": "ZCYX"})
    with pytest.raises(ValueError, match="has axes ZCYX"):
        px.io.read_ome_tiff(mapped, tmp_path / "stack.ome.tif", image_key="he")
    (tmp_path / "bad.tif").write_bytes(b"II*\0cut")
    with pytest.raises(ValueError, match="not a readable TIFF"):
        px.io.read_ome_tiff(mapped, tmp_path / "bad.tif", image_key="he")
    with pytest.raises(FileNotFoundError):
        px.io.read_ome_tiff(mapped, tmp_path / "none.tif", image_key="he")
