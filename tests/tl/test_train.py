"""tl.train: what it learns, what it remembers and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from shapely import Point
from spatialdata.models import Image2DModel

import pixnet as px
from pixnet._core.crops import place_crops, weigh
from pixnet._sdata.sections import open_section, resolve_sources, split_block

from .conftest import QUICK, PatchEncoder, coloured_slide, table_for


def train(sdata, **options):
    return px.tl.train(sdata, **(QUICK | {"max_epochs": 1} | options))


def scores(sdata, model):
    px.tl.predict(sdata, model, mask_key=False, overwrite=True)
    px.tl.aggregate(sdata, "spots", overwrite=True)
    return px.tl.evaluate(sdata, table_key="spots_genes", reference_key="spots_counts")


def test_it_learns_what_can_be_seen_on_an_unseen_slide(quick_model):
    slide = coloured_slide(7)
    found = scores(slide, quick_model)
    assert found.loc[["PINK", "BLUE"], "pearson"].min() > 0.9
    assert abs(found.loc["FLAT", "pearson"]) < 0.4
    # Values, not only their order: the composition is that of the counts.
    mean = np.expm1(np.log1p(slide["spots_genes"].to_df()).mean())
    np.testing.assert_allclose(mean["FLAT"], 1000, rtol=0.1)
    assert mean["PINK"] == pytest.approx(1750, rel=0.35)


def test_depth_is_learned_relative_to_the_section(quick_model):
    slide = coloured_slide(8)
    scores(slide, quick_model)
    total = slide["spots_genes"].obs["total"].to_numpy()
    measured = np.asarray(slide["spots_counts"].X.sum(axis=1)).ravel()
    assert np.corrcoef(total, measured)[0, 1] > 0.9
    assert total.mean() == pytest.approx(1, abs=0.2)


def test_history_and_config_are_plain_and_kept(quick_model, tmp_path):
    assert [row["epoch"] for row in quick_model.history] == list(range(1, len(quick_model.history) + 1))
    assert {"train_expression", "val_expression", "val_pcc", "val_total"} <= set(quick_model.history[0])
    assert quick_model.history[-1]["train_expression"] < quick_model.history[0]["train_expression"]
    json.dumps(quick_model.config)
    assert quick_model.config["provenance"]["training"] == {"0": {"spots": 225}}
    assert quick_model.config["provenance"]["validation"] == {"1": {"spots": 225}}
    assert len(quick_model.config["stain"]) == 1
    quick_model.save(tmp_path / "m.safetensors")
    assert px.models.load(tmp_path / "m.safetensors").history == quick_model.history


def test_the_same_seed_gives_the_same_weights(slide):
    before = torch.get_rng_state()
    options = {"max_epochs": 2, "variants": 2, "encoder": PatchEncoder()}
    a, b = train(slide, **options), train(slide, **options)
    c = train(slide, **options, seed=1)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    assert not torch.equal(a.members[0].head.weight, c.members[0].head.weight)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"


def test_genes_default_to_those_of_highest_mean(slide):
    model = px.tl.train(slide, **{k: v for k, v in QUICK.items() if k != "genes"}, max_epochs=1)
    assert model.genes == px.pp.select_genes(slide)


def test_mpp_defaults_to_half_a_um_or_the_coarsest_slide(slide):
    assert train(slide).mpp == 0.5
    other = coloured_slide(3)
    px.pp.set_mpp(other, "he", 0.7)
    assert train([slide, other]).mpp == 0.7
    assert train([slide, other], mpp=0.6).mpp == 0.6


def test_starting_from_a_model_leaves_it_alone(slide, quick_model):
    before = {k: v.clone() for k, v in quick_model.state_dict().items()}
    options = {k: v for k, v in QUICK.items() if k in {"mask_key", "variants", "lr"}}
    new = px.tl.train(slide, model=quick_model, max_epochs=1, **options)
    assert new.genes == quick_model.genes
    assert all(torch.equal(v, before[k]) for k, v in quick_model.state_dict().items())
    assert not torch.equal(new.members[0].head.weight, quick_model.members[0].head.weight)
    with pytest.raises(ValueError, match="brings its own encoder"):
        px.tl.train(slide, model=quick_model, mpp=1.0)


def test_several_scales_train_together(slide):
    rng = np.random.default_rng(0)
    centres = slide["spots"].geometry
    cells = slide["spots"].copy()
    cells["geometry"] = [Point(p.x + 9, p.y - 7) for p in centres]
    cells["radius"] = 4.0
    slide["cells"] = cells
    slide["cells_counts"] = table_for(
        "cells", list(cells.index), rng.poisson(2, (len(cells), 4)), ["PINK", "BLUE", "FLAT", "REST"]
    )
    model = train(slide, shapes=["spots", "cells"], table_key=["spots_counts", "cells_counts"])
    assert set(model.config["provenance"]["training"]["0"]) == {"spots", "cells"}


def test_members_average(slide):
    assert len(train(slide, members=2).members) == 2


@pytest.mark.parametrize("loss", ["mse", "pcc", "poisson+pcc"])
def test_losses(slide, loss):
    assert np.isfinite(train(slide, loss=loss).history[-1]["val_expression"])


def test_a_tuned_encoder_changes_and_a_frozen_one_does_not(slide):
    frozen = px.tl.train(slide, **(QUICK | {"encoder": "tiny-conv-test"}), max_epochs=1, seed=3)
    tuned = px.tl.train(slide, **(QUICK | {"encoder": "tiny-conv-test"}), max_epochs=1, seed=3, tune_encoder=True)
    torch.manual_seed(3)
    start = ConvEncoder().conv.weight
    assert torch.equal(frozen.encoder.conv.weight, start)
    assert not torch.equal(tuned.encoder.conv.weight, start)


class ConvEncoder(torch.nn.Module):
    strides, channels = (4,), (6,)

    def __init__(self, pretrained=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, image):
        return [self.conv(image)]


px.models.register_encoder("tiny-conv-test", ConvEncoder)


class TestValidation:
    def test_the_last_of_several_is_held_out(self):
        model = train({"a": coloured_slide(1), "b": coloured_slide(2), "c": coloured_slide(3)})
        assert list(model.config["provenance"]["validation"]) == ["c"]

    def test_by_name_and_by_object(self, slide):
        both = {"a": coloured_slide(1), "b": coloured_slide(2)}
        assert list(train(both, validation="a").config["provenance"]["training"]) == ["b"]
        assert list(train(both, validation=slide).config["provenance"]["training"]) == ["a", "b"]

    def test_a_block_of_a_single_one_shares_no_shape(self, slide):
        source = resolve_sources({"0": slide}, None, None, None, None)[0]
        section = open_section(source, ["PINK"], 0.5, 4, layer=None, total_key=None, mask_key=False)
        near, far = split_block(section)
        a, b = near.targets[0].geometries.bounds, far.targets[0].geometries.bounds
        assert len(a) + len(b) <= 225
        assert 30 <= len(b) <= 60
        assert a[:, 2].max() <= b[:, 0].min() or a[:, 3].max() <= b[:, 1].min()

    def test_wrong_ones(self, slide):
        both = {"a": coloured_slide(1), "b": slide}
        with pytest.raises(KeyError, match="'c', no object of sdata; it has: 'a', 'b'"):
            train(both, validation="c")
        with pytest.raises(ValueError, match="every object"):
            train(both, validation=["a", "b"])
        with pytest.raises(ValueError, match="by its name"):
            train(both, validation=slide)


class TestCrops:
    def test_every_shape_is_whole_in_exactly_one(self, slide):
        source = resolve_sources({"0": slide}, None, None, None, None)[0]
        section = open_section(source, ["PINK"], 0.5, 4, layer=None, total_key=None, mask_key=False)
        crops = place_crops(section, 0, 320)
        rows = np.concatenate([c.rows["spots"] for c in crops])
        assert sorted(rows) == list(range(225))
        for crop in crops:
            assert crop.origin[0] % 64 == 0
            assert crop.origin[1] % 64 == 0
            weigh(crop, section, 320)
            area = crop.weights["spots"].sum(axis=1)
            np.testing.assert_allclose(area, np.pi * 3**2, rtol=1e-3)


class TestLeftOut:
    def test_shapes_without_counts_or_tissue_or_image_train_nothing(self, slide, caplog):
        slide["spots_counts"].X[:5] = 0
        slide["spots"].loc["s100", "geometry"] = Point(5000, 5000)
        slide["spots"].loc["s101", "geometry"] = Point(766, 300)
        model = train(slide, validation=coloured_slide(2))
        assert model.config["provenance"]["training"]["0"]["spots"] == 225 - 5 - 2

    def test_an_all_background_slide(self, slide):
        white = np.full((3, 768, 768), 255, np.uint8)
        slide["he"] = Image2DModel.parse(white, dims=("c", "y", "x"))
        with pytest.raises(ValueError, match="no shapes are left to train on"):
            train(slide, mask_key=None, validation=coloured_slide(2))


class TestRefusals:
    """Each is refused before a pixel is read, with the mend."""

    @pytest.fixture(autouse=True)
    def _no_pixels(self, monkeypatch):
        def read(*_):
            raise AssertionError("a pixel was read")

        monkeypatch.setattr("pixnet._core.tiling.SlideReader.read", read)

    def test_unknown_um_per_pixel(self, slide):
        slide.attrs["pixnet"]["mpp"].clear()
        with pytest.raises(ValueError, match=r"pixnet\.pp\.set_mpp"):
            train(slide)

    def test_images_that_are_no_rgb_uint8(self, slide):
        pixels = np.asarray(slide["he"].data)
        for image, error, match in (
            (pixels[:1], ValueError, "greyscale"),
            (np.concatenate([pixels, pixels[:1]]), ValueError, "drop the alpha channel"),
            (pixels.astype(np.uint16), TypeError, "must be uint8"),
        ):
            slide["he"] = Image2DModel.parse(image, dims=("c", "y", "x"))
            with pytest.raises(error, match=match):
                train(slide)

    def test_unknown_names(self, slide):
        with pytest.raises(KeyError, match="no image 'HE'.*it has: 'he'"):
            train(slide, image_key="HE")
        with pytest.raises(KeyError, match="no shapes or labels element 'cells'.*it has: 'spots'"):
            train(slide, shapes="cells")
        with pytest.raises(KeyError, match="no table 'x'.*it has: 'spots_counts'"):
            train(slide, table_key="x")
        with pytest.raises(KeyError, match="no layer 'raw'"):
            train(slide, layer="raw")
        with pytest.raises(KeyError, match=r"no obs column 'umi'.*'region'"):
            train(slide, total_key="umi")
        with pytest.raises(KeyError, match="lacks 1 of the 2 genes: 'NOPE'"):
            train(slide, genes=["PINK", "NOPE"])
        with pytest.raises(TypeError, match="has no argument 'epochs'"):
            train(slide, epochs=3)

    def test_genes_that_repeat(self, slide):
        with pytest.raises(ValueError, match="more than once: PINK"):
            train(slide, genes=["PINK", "PINK"])
        slide["spots_counts"].var_names = ["PINK", "PINK", "FLAT", "REST"]
        with pytest.raises(ValueError, match="var_names_make_unique"):
            train(slide, genes=["PINK"])

    @pytest.mark.parametrize(("value", "match"), [(np.nan, "NaN"), (-1, "negative"), (0.5, "looks normalised")])
    def test_counts_that_are_none(self, slide, value, match):
        slide["spots_counts"].X[3, 1] = value
        with pytest.raises(ValueError, match=match):
            train(slide)

    def test_a_table_that_does_not_match_its_shapes(self, slide):
        slide["spots_counts"].obs["instance_id"] = [f"t{i}" for i in range(225)]
        with pytest.raises(ValueError, match=r"have no shape in 'spots'.*'t0'.*'s0'"):
            train(slide)

    def test_a_table_without_a_count(self, slide):
        slide["spots_counts"].X[:] = 0
        with pytest.raises(ValueError, match="none of the genes has a count"):
            train(slide)

    def test_a_slide_far_coarser_than_the_model(self, slide):
        with pytest.raises(ValueError, match="more than 2 times coarser"):
            train(slide, mpp=0.2)

    def test_totals_that_mean_different_things(self, slide):
        small = coloured_slide(2)
        small["spots_counts"] = small["spots_counts"][:, :2].copy()
        with pytest.raises(ValueError, match="total_key"):
            train([slide, small], genes=["PINK"])

    def test_totals_smaller_than_the_counts(self, slide):
        slide["spots_counts"].obs["umi"] = 1.0
        with pytest.raises(ValueError, match="smaller than the sum"):
            train(slide, total_key="umi")

    def test_genes_without_counts_are_named_and_kept_out(self, slide, monkeypatch):
        monkeypatch.undo()
        slide["spots_counts"].X[:, 2] = 0
        assert train(slide).genes == ["PINK", "BLUE"]

    def test_numbers(self, slide):
        for options, match in (({"max_epochs": 0}, "max_epochs"), ({"seed": -1}, "seed"), ({"mpp": -1}, "mpp")):
            with pytest.raises(ValueError, match=match):
                train(slide, **options)
        with pytest.raises(TypeError, match="SpatialData"):
            px.tl.train("slide")
        with pytest.raises(ValueError, match="empty"):
            px.tl.train([])


def test_a_nan_loss_names_its_batch(slide, monkeypatch):
    from pixnet._core import fit

    def broken(*args, **kwargs):
        found = original(*args, **kwargs)
        return found | {"expression": found["expression"] * torch.nan}

    original = fit._losses
    monkeypatch.setattr(fit, "_losses", broken)
    with pytest.raises(FloatingPointError, match="epoch 1, batch 1"):
        train(slide)
