"""What pixnet knows of the insides of SpatialData's and zarr's stores: each test fails when a library changes its part."""

from __future__ import annotations

import json

import dask
import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Scale, get_transformation

from pixnet._core.stored import check_stored, identity, stored_array
from pixnet._sdata.store import metadata
from pixnet._sdata.store.scratch import ScratchStore
from pixnet._sdata.store.workspace import Workspace, store_lock

VERSIONS = f"spatialdata {sd.__version__}, zarr {zarr.__version__}, dask {dask.__version__}"


@pytest.fixture
def root(tmp_path):
    pixels = np.ones((2, 20, 30), np.float32)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["p", "q"], scale_factors=[2])
    labels = Labels2DModel.parse(np.ones((8, 8), np.uint8), dims=("y", "x"))
    SpatialData(images={"he": image}, labels={"mask": labels}, attrs={"mine": 1}).write(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture
def work(root):
    with store_lock(root):
        made = Workspace.create(root, {})
    yield made
    made.remove()


def test_attributes_and_consolidated_metadata_lie_in_one_file(root, work):
    content = json.loads((root / "zarr.json").read_text())
    assert content["node_type"] == "group", VERSIONS
    assert content["attributes"]["mine"] == 1, VERSIONS
    assert "images/he/s0" in content["consolidated_metadata"]["metadata"], VERSIONS
    assert metadata.is_consolidated(root)
    metadata.drop_consolidated(root, work)
    assert not metadata.is_consolidated(root)
    assert zarr.open_group(root).metadata.consolidated_metadata is None
    opened = sd.read_zarr(root)
    assert set(opened.images) == {"he"}
    assert opened.attrs == {"mine": 1}
    (root / "zarr.0123.partial").write_text("{")  # as a killed process leaves it
    metadata.consolidate(root)
    assert sd.read_zarr(root).has_consolidated_metadata()
    assert zarr.open_group(root, use_consolidated=True)["images/he/s0"].shape == (2, 20, 30)
    assert not list(root.glob("*.partial"))


def test_entries_of_the_record_are_what_spatialdata_reads(root, work):
    metadata.write_entries(root, work, None, {"masks": {"he": {"mask_key": "mask"}}})
    opened = sd.read_zarr(root)
    assert opened.attrs["mine"] == 1, VERSIONS
    assert opened.attrs["pixnet"]["masks"] == {"he": {"mask_key": "mask"}}, VERSIONS
    assert opened.has_consolidated_metadata()


def test_labels_are_listed_in_their_group(root, work):
    def listed():
        return zarr.open_group(root, use_consolidated=False)["labels"].attrs["ome"]["labels"]

    assert listed() == ["mask"], f"SpatialData lists labels otherwise: {VERSIONS}"
    (root / "labels" / "mask").rename(root / "labels" / "other")
    for key in ("mask", "other"):
        metadata.list_label(root, work, key)
    assert listed() == ["other"]
    metadata.consolidate(root)
    assert set(sd.read_zarr(root).labels) == {"other"}


def test_levels_and_channels_of_a_raster(root):
    assert metadata.level_paths(root / "images" / "he") == ["s0", "s1"], VERSIONS
    assert metadata.channel_labels(root / "images" / "he") == ["p", "q"], VERSIONS
    assert metadata.channel_labels(root / "labels" / "mask") is None


def test_a_transformation_as_spatialdata_reads_it(root):
    path = root / "images" / "he" / "zarr.json"
    content = json.loads(path.read_text())
    for mpp in (0.5, 0.25):
        scale = Scale([mpp, mpp], ("x", "y"))
        content["attributes"] = metadata.with_transformation(content["attributes"], "um", scale, lambda s: s == "um")
        path.write_text(json.dumps(content))
        image = sd.read_zarr(root)["he"]
        assert set(get_transformation(image, get_all=True)) == {"global", "um"}, VERSIONS
        matrix = get_transformation(image["scale1"]["image"], "um").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([2 * mpp, 2 * mpp, 1]))
    expected = SpatialData(images={"he": image})
    expected.write(root.parent / "again.zarr")  # SpatialData's own way gives the same
    again = json.loads((root.parent / "again.zarr" / "images" / "he" / "zarr.json").read_text())
    ours, theirs = (c["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] for c in (content, again))
    assert ours == theirs, VERSIONS


def test_a_stamp_comes_along_when_spatialdata_reads(root):
    metadata.stamp(root / "images" / "he", "an id")
    data = sd.read_zarr(root)["he"]["scale0"]["image"].data
    array = stored_array(data)
    assert array is not None, f"SpatialData or dask bind rasters otherwise: {VERSIONS}, layers {list(data.dask.layers)}"
    assert identity(array) == "an id"
    assert array.attrs["pixnet"]["chunks"] == 1
    check_stored(data, "x")


def test_the_scratch_store_is_asked_for_every_chunk(tmp_path):
    path = tmp_path / "a.zarr"
    zarr.create_array(path, shape=(4, 4), chunks=(2, 2), dtype="f4", fill_value=np.nan)[:2] = 1
    lazy = da.from_zarr(zarr.open_array(ScratchStore(path, read_only=True), mode="r"))
    assert np.isnan(lazy.compute()).sum() == 8
    path.rename(tmp_path / "b.zarr")
    with pytest.raises(FileNotFoundError, match="is gone"):
        lazy.compute()
