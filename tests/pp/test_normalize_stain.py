"""pp.normalize_stain: what it brings the stain to, what it keeps, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pixnet as px
from pixnet._core.slide.stain import apply_table, matching_table, optical_density, slide_statistics
from pixnet._logging import logger
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import levels
from pixnet._sdata.record import find_entry
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import open_mask


def density(sdata, key):
    tissue = sdata["he_tissue"]
    image = levels(sdata[key])[0].data.values
    step = image.shape[1] // tissue.shape[0]
    inside = tissue.values.astype(bool)
    return optical_density(image[:, ::step, ::step][:, : inside.shape[0], : inside.shape[1]][:, inside])


@pytest.fixture
def model():
    net = px.models.PixNet(["A", "B"], mpp=0.5, pretrained=False)
    net.stain = [
        {"od_mean": [0.30, 0.34, 0.19], "od_sd": [0.20, 0.15, 0.10], "detail": 0.5, "masked": True},
        {"od_mean": [0.32, 0.36, 0.21], "od_sd": [0.22, 0.17, 0.12], "detail": 0.5, "masked": True},
    ]
    return net


@pytest.fixture
def slide():
    sdata = px.datasets.synthetic_tissue(size_um=500, stain_seed=3)
    px.pp.tissue_mask(sdata)
    return sdata


def test_a_slide_like_those_of_training_stays_as_it_is():
    statistics = {"od_mean": [0.3, 0.3, 0.2], "od_sd": [0.2, 0.2, 0.1]}
    np.testing.assert_array_equal(matching_table(statistics, [statistics])[:, 1:], np.tile(np.arange(1, 256), (3, 1)))


def test_each_channel_has_its_own_table():
    table = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)]).astype(np.uint8)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 6), dtype=np.uint8)
    out = apply_table(pixels, table)
    np.testing.assert_array_equal(out[0], pixels[0])
    np.testing.assert_array_equal(out[1], 255 - pixels[1])
    assert (out[2] == 7).all()


def test_tissue_gets_the_density_of_the_training_slides(slide, model):
    before = np.abs(density(slide, "he").mean(axis=1) - [0.31, 0.35, 0.20]).max()
    px.pp.normalize_stain(slide, model)
    found = density(slide, "he_normalized")
    after = np.abs(found.mean(axis=1) - [0.31, 0.35, 0.20]).max()
    assert before > 0.08
    assert after < 0.03  # the statistics come from samples of the tissue
    np.testing.assert_allclose(found.std(axis=1), [0.21, 0.16, 0.11], rtol=0.25)


def test_levels_systems_scale_and_mask_are_those_of_the_image(slide, model):
    px.pp.normalize_stain(slide, model)
    ours, theirs = levels(slide["he_normalized"]), levels(slide["he"])
    assert [a.scale for a in ours] == [a.scale for a in theirs]
    assert [a.data.shape for a in ours] == [a.data.shape for a in theirs]
    assert get_transformation(slide["he_normalized"], get_all=True) == get_transformation(slide["he"], get_all=True)
    assert find_mpp(slide, "he_normalized") == find_mpp(slide, "he")
    assert find_entry(slide, "masks", "he_normalized")["mask_key"] == "he_tissue"
    px.tl.predict(slide, model, image_key="he_normalized")
    assert find_entry(slide, "images", "he_normalized_genes")["image_key"] == "he_normalized"


def test_channels_in_chunks_of_their_own(slide, model):
    expected = levels(px.pp.normalize_stain(slide, model, inplace=False))[0].data.values
    pixels = levels(slide["he"])[0].data.data.rechunk((1, 300, 300))
    slide["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    px.pp.set_mpp(slide, "he", 0.5)
    found = levels(px.pp.normalize_stain(slide, model, inplace=False))[0].data.values
    assert np.abs(found.astype(int) - expected).max() <= 1  # one level in place of a pyramid


def test_a_mask_that_is_no_longer_used_is_forgotten(slide, model):
    model.stain += [s | {"masked": False} for s in model.stain]
    px.pp.normalize_stain(slide, model)
    px.pp.normalize_stain(slide, model, mask_key=False, overwrite=True)
    assert find_entry(slide, "masks", "he_normalized") is None


def test_nothing_is_added_where_it_is_only_returned(slide, model):
    image = px.pp.normalize_stain(slide, model, inplace=False)
    assert "he_normalized" not in slide
    assert levels(image)[0].data.dtype == np.uint8


def test_a_backed_object_keeps_it(slide, model, tmp_path):
    slide.write(tmp_path / "a.zarr")
    backed = sd.read_zarr(tmp_path / "a.zarr")
    px.pp.normalize_stain(backed, model)
    again = sd.read_zarr(tmp_path / "a.zarr")
    expected = px.pp.normalize_stain(slide, model, inplace=False)
    np.testing.assert_array_equal(levels(again["he_normalized"])[0].data.values, levels(expected)[0].data.values)
    assert find_mpp(again, "he_normalized") == 0.5


def test_a_slide_that_was_foreign_before_is_still_named(slide, model, monkeypatch):
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logger, level, lambda text, *args, level=level: said.append((level, text % args)))
    model.provenance["tissue"] = "breast tumour"
    opened, grid = Slide.open(slide), Slide.open(slide).grid(0.5, 4)
    own = slide_statistics(opened.reader(grid), open_mask(opened, grid.out_px))
    near, far = (own | {"od_mean": [x + more for x in own["od_mean"]]} for more in (0.02, 0.5))
    for training, foreign in (([near], False), ([far], True)):
        model.stain = training
        px.pp.normalize_stain(slide, model, overwrite=True)
        said.clear()
        px.tl.predict(slide, model, image_key="he_normalized", overwrite=True)
        assert any(level == "info" and "was trained on breast tumour" in text for level, text in said)
        warned = [text for level, text in said if level == "warning" and "lay far outside it" in text]
        assert len(warned) == foreign
    assert "mean optical density in" in warned[0]
    assert "another than breast tumour" in warned[0]


def test_bad_input(slide, model):
    with pytest.raises(KeyError, match="no image 'x'"):
        px.pp.normalize_stain(slide, model, image_key="x")
    with pytest.raises(ValueError, match="made from"):
        px.pp.normalize_stain(slide, model, key_added="he", overwrite=True)
    with pytest.raises(ValueError, match="overwrite=True"):
        px.pp.normalize_stain(slide, model, key_added="he")
    with pytest.raises(TypeError, match="model is of type int"):
        px.pp.normalize_stain(slide, 3)
    with pytest.raises(ValueError, match="does not know the stain of its training slides without a mask"):
        px.pp.normalize_stain(slide, model, mask_key=False)
    with pytest.raises(ValueError, match="does not know the stain"):
        px.pp.normalize_stain(slide, px.models.PixNet(["A"], mpp=0.5, pretrained=False))
    glass = sd.SpatialData(
        images={"he": Image2DModel.parse(np.full((3, 600, 600), 245, np.uint8), dims=("c", "y", "x"))}
    )
    with pytest.raises(ValueError, match="set_mpp"):
        px.pp.normalize_stain(glass, model)
    px.pp.set_mpp(glass, "he", 0.5)
    with pytest.raises(ValueError, match="no tissue"):
        px.pp.normalize_stain(glass, model)
    assert list(slide.images) == ["he", "truth"]
