"""tl.train: what it learns, what it remembers and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from shapely import Point, box
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import remove_transformation

import pixnet as px
from pixnet._core.train.feature_store import forget_features

from .conftest import QUICK, PatchEncoder, coloured_slide, with_cells


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


def test_history_and_provenance_are_plain_and_kept(quick_model, tmp_path):
    assert [row["epoch"] for row in quick_model.history] == list(range(1, len(quick_model.history) + 1))
    assert {"train_expression", "val_expression", "val_pcc", "val_total"} <= set(quick_model.history[0])
    assert quick_model.history[-1]["train_expression"] < quick_model.history[0]["train_expression"]
    json.dumps(quick_model.provenance)
    assert quick_model.provenance["training"] == {"0": {"spots": 225}}
    assert quick_model.provenance["validation"] == {"1": {"spots": 225}}
    assert quick_model.provenance["options"]["lr"] == QUICK["lr"]
    assert len(quick_model.stain) == 1
    quick_model.save(tmp_path / "m.safetensors")
    assert px.models.load(tmp_path / "m.safetensors").history == quick_model.history


def test_the_same_seed_gives_the_same_weights(slide):
    before = torch.get_rng_state()
    options = {"max_epochs": 2, "variants": 2, "encoder": PatchEncoder()}
    a, b = train(slide, **options), train(slide, **options)
    c = train(slide, **options, seed=1)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    assert not torch.equal(a.members[0].last.weight, c.members[0].last.weight)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"


def test_the_seed_is_that_of_the_settings_unless_given(slide, monkeypatch):
    before = px.settings.seed
    monkeypatch.setattr(px.settings, "seed", 3)
    left, given, other = train(slide), train(slide, seed=3), train(slide, seed=before)
    assert left.provenance["seed"] == 3
    assert torch.equal(left.members[0].last.weight, given.members[0].last.weight)
    assert not torch.equal(left.members[0].last.weight, other.members[0].last.weight)


NO_GENES = {k: v for k, v in QUICK.items() if k != "genes"}


@pytest.mark.parametrize("settings", [{}, {"n_programs": 0}, {"quantity": "log_sum"}])
def test_few_genes_have_a_channel_each(slide, settings):
    model = px.tl.train(slide, **NO_GENES, **settings, max_epochs=1)
    assert model.loadings is None
    assert model.genes == px.pp.select_genes(slide)


def test_programs_of_logs_are_refused(slide):
    with pytest.raises(ValueError, match="n_programs is 4; programs hold densities"):
        px.tl.train(slide, **NO_GENES, n_programs=4, quantity="log_sum", max_epochs=1)


def test_a_whole_transcriptome_is_held_by_programs():
    slide, rng = coloured_slide(1), np.random.default_rng(0)
    table = slide["spots_counts"]
    names = [f"G{i}" for i in range(1100)]
    rare = (np.arange(table.n_obs) == 0)[:, None]  # in one of 225 spots
    counts = np.hstack(
        [table.X.toarray() if sparse.issparse(table.X) else table.X, rng.poisson(0.1, (table.n_obs, 1100)), rare]
    )
    wide = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=table.obs, uns=table.uns)
    wide.var_names = [*table.var_names, *names, "RARE"]
    slide["spots_counts"] = wide
    model = px.tl.train(slide, **NO_GENES, max_epochs=1, refit=False)
    assert len(model.genes) == 1104
    assert len(model.loadings) == 64  # less than a third of 225
    assert "RARE" not in model.genes
    assert {"PINK", "BLUE", *names} <= set(model.genes)
    panel = px.tl.train(slide, **NO_GENES, max_epochs=1, refit=False, n_programs=0)
    assert panel.loadings is None
    assert panel.genes == px.pp.select_genes(slide)
    assert len(panel.genes) == 250


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
    assert not torch.equal(new.members[0].last.weight, quick_model.members[0].last.weight)
    assert {row["run"] for row in quick_model.history} == {1}
    assert [row["run"] for row in new.history[len(quick_model.history) :]] == [2]
    for own in ({"mpp": 1.0}, {"encoder": "efficientnet_lite0"}, {"hidden": 128}):  # its defaults too
        with pytest.raises(ValueError, match=f"brings its own encoder.*leave out '{next(iter(own))}'"):
            px.tl.train(slide, model=quick_model, **own)


class TestOptions:
    """Settings of training: single ones, then options=, then the model's own, then the defaults."""

    def test_single_settings_come_before_options(self, slide):
        options = px.tl.TrainingOptions(max_epochs=2, variants=1, lr=0.5, refit=False)
        common = {"encoder": "patch-test", "window": 256, "halo": 64, "mask_key": False, "genes": "PINK"}
        found = px.tl.train(slide, options=options, lr=1e-2, **common).provenance["options"]
        assert (found["lr"], found["max_epochs"], found["refit"], found["dropout"]) == (1e-2, 2, False, 0.4)
        found = px.tl.train(slide, options={"max_epochs": 1, "variants": 1}, lr=1e-2, **common).provenance["options"]
        assert (found["lr"], found["max_epochs"], found["refit"]) == (1e-2, 1, True)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"dropout": 1}, ValueError, "dropout is 1; it should be less than 1"),
            ({"refit": 1}, ValueError, "refit is 1"),
            ({"loss": "mse"}, ValueError, "loss is 'mse'; it should be 'mse\\+pcc' or 'nb\\+pcc'"),
            ({"epochs": 3}, TypeError, "no setting 'epochs'"),
            (5, TypeError, "options is 5; TrainingOptions, a mapping or None"),
        ],
    )
    def test_wrong_ones(self, slide, options, error, match):
        with pytest.raises(error, match=match):
            train(slide, options=options)

    def test_every_setting_is_an_argument_of_train(self):
        parameters = inspect.signature(px.tl.train).parameters
        for field in dataclasses.fields(px.tl.TrainingOptions):
            assert parameters[field.name].default is None


class TestScales:
    """Shapes of several sizes at once, and sizes that were never trained on."""

    def test_several_train_together(self, slide):
        model = train(with_cells(slide), shapes=["spots", "cells"], table_key=["spots_counts", "cells_counts"])
        assert set(model.provenance["training"]["0"]) == {"spots", "cells"}

    def test_an_object_takes_part_with_the_scales_it_has(self, slide):
        keys = {"shapes": ["spots", "cells"], "table_key": ["spots_counts", "cells_counts"]}
        both = {"a": with_cells(slide), "b": coloured_slide(1), "c": coloured_slide(2)}
        training = train(both, **keys).provenance["training"]
        assert {name: set(n) for name, n in training.items()} == {"a": {"spots", "cells"}, "b": {"spots"}}

    def test_bins_added_up_to_spots_give_the_spots(self, quick_model):
        """The CP10k of a spot is that of its pieces, each weighed by its total: exact at every scale, through the public calls."""
        slide = coloured_slide(5)
        spots = slide["spots"].iloc[::7]
        outlines = spots.geometry.buffer(12.0)
        side = 5.3  # no multiple of a map pixel
        corners = [(side * i, side * j) for i in range(146) for j in range(146)]
        bins = gpd.GeoDataFrame(geometry=[box(x, y, x + side, y + side) for x, y in corners])
        pieces = gpd.overlay(
            bins,
            gpd.GeoDataFrame({"spot": spots.index}, geometry=list(outlines)),
            how="intersection",
            keep_geom_type=True,
        )
        slide["discs"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=list(outlines), index=list(spots.index)))
        slide["pieces"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=list(pieces.geometry)))
        px.tl.predict(slide, quick_model, mask_key=False)
        px.tl.aggregate(slide, ["discs", "pieces"], image_key="he_genes")
        whole, parts = slide["discs_genes"], slide["pieces_genes"]
        assert len(parts) > 15 * len(whole)
        weight = (parts.obs["total"] * parts.obs["area"]).to_numpy()
        amount = (
            pd.DataFrame(parts.X * weight[:, None])
            .groupby(pieces["spot"].to_numpy())
            .sum()
            .loc[whole.obs["instance_id"]]
        )
        total = pd.Series(weight).groupby(pieces["spot"].to_numpy()).sum().loc[whole.obs["instance_id"]]
        np.testing.assert_allclose(amount.to_numpy() / total.to_numpy()[:, None], whole.X, rtol=1e-4)
        np.testing.assert_allclose(total, whole.obs["total"] * whole.obs["area"], rtol=1e-4)
        # which the mean over the pieces' CP10k is not
        plain = pd.DataFrame(parts.X).groupby(pieces["spot"].to_numpy()).mean().loc[whole.obs["instance_id"]]
        assert not np.allclose(plain, whole.X, rtol=1e-4)


class NormedEncoder(PatchEncoder):
    """Patches behind a batch norm whose statistics are of other images."""

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, image):
        a, b = super().forward(image)
        return [self.norm(a), b]


class TestAdaptedNorms:
    def test_batch_norms_take_the_statistics_of_the_training_tissue(self, slide):
        black = coloured_slide(1)
        black["he"].data = black["he"].data * 0
        options = {"encoder": NormedEncoder(), "refit": False, "adapt_norms": True}
        norm = train(slide, **options, validation=[black]).encoder.norm
        tissue = slide["he"].values.mean(axis=(1, 2)) / 255
        assert (norm.running_mean.numpy() > tissue - 0.02).all(), "tissue, and what is white around the slide"
        assert (norm.running_mean.numpy() < tissue + 0.2).all()
        assert (norm.running_var < 0.1).all()
        assert norm.momentum == 0.1
        other = train(slide, **options, validation=[coloured_slide(2)]).encoder.norm
        assert torch.equal(norm.running_mean, other.running_mean), "what is held out has no say"

        assert torch.equal(options["encoder"].norm.running_mean, torch.zeros(3)), "the caller's module is left alone"

    def test_unless_told_otherwise_where_images_are_enlarged(self, slide):
        options = {"encoder": NormedEncoder(), "refit": False}
        assert torch.equal(train(slide, **options).encoder.norm.running_mean, torch.zeros(3))
        enlarged = train(slide, **options, zoom=2)
        assert (enlarged.encoder.encoder.norm.running_mean > 0.3).all()
        left = train(slide, **options, zoom=2, adapt_norms=False)
        assert torch.equal(left.encoder.encoder.norm.running_mean, torch.zeros(3))

    def test_a_module_that_is_passed_is_not_tuned_itself(self, slide):
        mine = NormedEncoder()
        model = train(slide, encoder=mine, tune_encoder=True)
        assert not torch.equal(model.encoder.norm.weight, torch.ones(3))
        assert torch.equal(mine.norm.weight, torch.ones(3)), "else a second fold would start from the first"

    def test_a_trained_model_keeps_its_own(self, slide):
        model = train(slide, encoder=NormedEncoder(), refit=False, adapt_norms=True)
        other = coloured_slide(3)
        other["he"].data = other["he"].data // 2
        again = px.tl.train(other, model=model, mask_key=False, max_epochs=1, variants=1, adapt_norms=True)
        assert torch.equal(again.encoder.norm.running_mean, model.encoder.norm.running_mean)

    def test_encoders_without_batch_norms_are_not_run_for_it(self, slide):
        calls = []

        class Counted(PatchEncoder):
            def forward(self, image):
                calls.append(image.shape)
                return super().forward(image)

        counts = []
        for adapt in (True, False):
            calls.clear()
            forget_features()
            train(slide, encoder=Counted(), adapt_norms=adapt)
            counts.append(len(calls))
        assert counts[0] == counts[1] > 0


class TestUntrainedModels:
    """A model that is given, but was never trained: settings of its own, and everything set from the training shapes."""

    def _model(self, genes=("PINK", "BLUE", "FLAT"), **options):
        options = {
            "encoder": "patch-test",
            "stride": 4,
            "widths": (16, 16, 16, 16),
            "window": 256,
            "halo": 64,
        } | options
        return px.models.PixNet.paper(list(genes), **options)

    def test_its_own_settings_hold_unless_overridden(self, slide, capsys):
        quick = {"model": self._model(), "mask_key": False}
        model = px.tl.train(slide, **quick, variants=1, max_epochs=1, refit=False)
        options = model.provenance["options"]
        assert (options["lr"], options["weight_decay"], options["ema"], options["variants"]) == (5e-4, 1e-4, 0.0, 1)
        assert options["max_epochs"] == 1
        logged = capsys.readouterr().err
        assert "come from the model (model.training_options): patience=20, lr=0.0005, weight_decay=0.0001" in logged
        assert "max_epochs" not in logged
        model = px.tl.train(slide, **quick, variants=1, max_epochs=1, refit=False, lr=1e-3, loss="nb+pcc")
        options = model.provenance["options"]
        assert (options["lr"], options["loss"], options["weight_decay"]) == (1e-3, "nb+pcc", 1e-4)
        full = px.tl.TrainingOptions(max_epochs=1, variants=1, refit=False)
        assert px.tl.train(slide, **quick, options=full).provenance["options"]["lr"] == 2e-3

    def test_statistics_and_start_come_from_the_training_shapes(self, slide):
        given = self._model()
        model = px.tl.train(slide, model=given, mask_key=False, variants=1, max_epochs=1)
        assert (model.feature_mean_0 != 0).all()
        assert float(model.head.area_um2) == pytest.approx(np.pi * 12**2 * 0.25, rel=1e-3), "that of a spot"
        share = np.log1p(1e4 * slide["spots_counts"].X / slide["spots_counts"].X.sum(axis=1, keepdims=True))[
            :, :3
        ].mean(axis=0)
        np.testing.assert_allclose(model.members[0].last.bias.detach()[:3], share, atol=0.3)
        assert not given.history
        assert (given.feature_mean_0 == 0).all()
        # The same once trained: it goes on from what it knows.
        again = px.tl.train(slide, model=model, mask_key=False, variants=1, max_epochs=1, lr=1e-12)
        torch.testing.assert_close(again.members[0].last.bias, model.members[0].last.bias)

    def test_a_log_sum_fits_the_size_it_was_trained_on(self):
        slides = [coloured_slide(1), coloured_slide(2)]
        model = px.tl.train(
            slides, model=self._model(), mask_key=False, variants=1, max_epochs=12, lr=1e-2, refit=False
        )
        assert model.provenance["epochs"] <= 12
        slide = coloured_slide(7)
        found = scores(slide, model)
        assert found.loc[["PINK", "BLUE"], "pearson"].min() > 0.8
        assert found["mse"].max() < 0.3
        assert slide["spots_genes"].uns["pixnet"]["quantity"] == "log_sum"

    def test_genes_without_counts_are_kept_out(self, slide):
        slide["spots_counts"].X[:, 2] = 0
        model = px.tl.train(slide, model=self._model(), mask_key=False, variants=1, max_epochs=1)
        assert model.genes == ["PINK", "BLUE"]

    def test_what_is_not_a_model(self, slide):
        with pytest.raises(TypeError, match="a PixNet is needed"):
            px.tl.train(slide, model="her2st")


def test_members_average(slide):
    assert len(train(slide, members=2).members) == 2


@pytest.mark.parametrize(
    "options", [{"loss": "nb+pcc"}, {"quantity": "log_sum"}, {"decoder": "paper", "widths": (8, 8, 16, 16)}]
)
def test_losses_quantities_and_decoders(slide, options):
    model = train(slide, max_epochs=6, refit=False, dropout=0.0, **options)
    assert model.history[-1]["train_expression"] < model.history[0]["train_expression"]


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
        assert list(model.provenance["validation"]) == ["c"]

    def test_by_name_and_by_object(self, slide):
        both = {"a": coloured_slide(1), "b": coloured_slide(2)}
        assert list(train(both, validation="a").provenance["training"]) == ["b"]
        assert list(train(both, validation=slide).provenance["training"]) == ["a", "b"]

    def test_wrong_ones(self, slide):
        both = {"a": coloured_slide(1), "b": slide}
        with pytest.raises(KeyError, match="'c', which is not an object of sdata; it has: 'a', 'b'"):
            train(both, validation="c")
        with pytest.raises(ValueError, match="every object"):
            train(both, validation=["a", "b"])
        with pytest.raises(ValueError, match="by its name"):
            train(both, validation=slide)


def test_a_few_spots_of_a_slide_from_elsewhere_are_worth_it(quick_model):
    """As docs/guides/fine-tuning.md has it: train on one end of the slide, test on the other half."""
    mine = coloured_slide(9)
    pixels = 255 - np.asarray(mine["he"].data)[[1, 2, 0]]  # as no training slide looks
    mine["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"])
    px.pp.set_mpp(mine, "he", 0.5)
    from_left = np.argsort(mine["spots"].loc[mine["spots_counts"].obs["instance_id"]].geometry.x.to_numpy())

    def with_spots(rows):
        elements = {name: element for _, name, element in mine.gen_elements()}
        elements["spots_counts"] = mine["spots_counts"][rows].copy()
        return SpatialData.init_from_elements(elements, attrs=dict(mine.attrs))

    few, rest = with_spots(from_left[:56]), with_spots(from_left[112:])
    before = quick_model.members.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    tuned = px.tl.train(few, model=quick_model, mask_key=False, variants=1, lr=1e-2, max_epochs=20)
    none, some = (scores(rest, one).loc[["PINK", "BLUE"], "pearson"].mean() for one in (quick_model, tuned))
    assert some > none + 0.3
    assert some > 0.8
    assert tuned.history[-1]["run"] == 2
    assert all(torch.equal(t, before[name]) for name, t in quick_model.members.state_dict().items())


class TestLeftOut:
    def test_shapes_without_counts_or_tissue_or_image_train_nothing(self, slide, caplog):
        slide["spots_counts"].X[:5] = 0
        slide["spots"].loc["s100", "geometry"] = Point(5000, 5000)
        slide["spots"].loc["s101", "geometry"] = Point(766, 300)
        model = train(slide, validation=coloured_slide(2))
        assert model.provenance["training"]["0"]["spots"] == 225 - 5 - 2

    def test_an_all_background_slide(self, slide):
        white = np.full((3, 768, 768), 255, np.uint8)
        slide["he"] = Image2DModel.parse(white, dims=("c", "y", "x"))
        px.pp.set_mpp(slide, "he", 0.5)
        with pytest.raises(ValueError, match="no shapes are left to train on"):
            train(slide, mask_key=None, validation=coloured_slide(2))


class TestRefusals:
    """Each is refused before a pixel is read, with a way to fix it."""

    @pytest.fixture(autouse=True)
    def _no_pixels(self, monkeypatch):
        def read(*_):
            raise AssertionError("a pixel was read")

        monkeypatch.setattr("pixnet._core.slide.reader.SlideReader.read", read)

    def test_an_unknown_pixel_size(self, slide):
        remove_transformation(slide["he"], "pixnet_um")
        with pytest.raises(ValueError, match=r"pixnet\.pp\.set_mpp"):
            train(slide)

    def test_images_that_are_not_rgb_uint8(self, slide):
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
        with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
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

    def test_genes_without_counts_are_named_and_kept_out(self, slide, monkeypatch, capsys):
        monkeypatch.undo()
        slide["spots_counts"].X[:, 2] = 0
        assert train(slide).genes == ["PINK", "BLUE"]
        assert "1 genes have no counts in the training tables and are left out: 'FLAT'" in capsys.readouterr().err

    def test_more_genes_than_the_table_has(self, slide):
        names = ["PINK", *(f"G{i}" for i in range(300))]
        with pytest.raises(KeyError, match="lacks 300 of the 301 genes: 'G0', 'G1'"):
            train(slide, genes=names)
        with pytest.raises(KeyError, match="lacks 1 of the 2 genes: 'NOPE'"):
            px.tl.train(slide, model=px.models.PixNet(["PINK", "NOPE"], encoder="patch-test"))

    def test_a_gene_that_only_the_last_object_lacks(self, slide):
        other = coloured_slide(2)
        other["spots_counts"].var_names = ["PINK", "OTHER", "FLAT", "REST"]
        with pytest.raises(KeyError, match="lacks 1 of the 2 genes: 'BLUE'"):
            train([slide, other], genes=["PINK", "BLUE"], validation=["1"])

    def test_numbers(self, slide):
        wrong = {"max_epochs": 0, "seed": -1, "mpp": -1, "loss": "huber", "lr": 0, "variants": 0, "dropout": 1, "ema": 1,
                 "batch_shapes": 1.5, "weight_decay": -1}  # fmt: skip
        for name, value in wrong.items():
            options, match = {name: value}, f"{name} is {value!r}"
            with pytest.raises(ValueError, match=match):
                train(slide, **options)
        with pytest.raises(TypeError, match="SpatialData"):
            px.tl.train("slide")
        with pytest.raises(ValueError, match="empty"):
            px.tl.train([])


def test_the_passes_made_are_kept(slide):
    model = train(slide, max_epochs=3)
    best = min(model.history, key=lambda row: row["val_expression"] + 0.2 * row["val_total"])
    assert abs(model.provenance["epochs"] - best["epoch"]) <= 1
    assert len(model.history) <= 3, "the last run on everything has nothing to be validated with"


def test_counts_are_read_once(slide, monkeypatch):
    from pixnet._sdata import measured

    read = []
    original = measured.counts_matrix
    monkeypatch.setattr(measured, "counts_matrix", lambda *args: read.append(args[1]) or original(*args))
    px.tl.train(slide, **{k: v for k, v in QUICK.items() if k != "genes"}, max_epochs=1)
    assert read == ["spots_counts"]
