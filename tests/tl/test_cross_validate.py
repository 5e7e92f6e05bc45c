"""tl.cross_validate: seeds, options and what it refuses. Folds are tested in test_evaluate."""

from __future__ import annotations

import pandas as pd
import pytest

import pixnet as px

from .conftest import QUICK, coloured_slide

OPTIONS = dict(QUICK) | {"max_epochs": 1, "refit": False}


def test_the_seed_is_that_of_the_settings_unless_given(monkeypatch):
    slide = coloured_slide(1)
    monkeypatch.setattr(px.settings, "seed", 5)
    left = px.tl.cross_validate(slide, groups=2, **OPTIONS)
    pd.testing.assert_frame_equal(left, px.tl.cross_validate(slide, groups=2, seed=5, **OPTIONS))
    other = px.tl.cross_validate(slide, groups=2, seed=6, **OPTIONS)
    assert not left["value"].equals(other["value"])


def test_one_gene_and_options_are_passed_on():
    options = {k: v for k, v in OPTIONS.items() if k not in {"genes", "max_epochs", "refit", "variants", "lr"}}
    training = px.tl.TrainingOptions(max_epochs=1, variants=1, refit=False)
    found = px.tl.cross_validate(coloured_slide(1), groups=2, genes="PINK", options=training, **options)
    assert set(found["gene"]) == {"PINK"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 3}, TypeError, "unexpected keyword argument 'epochs'"),
        ({"lr": 0}, ValueError, "lr is 0"),
        ({"stride": 3}, ValueError, "stride is 3"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"validation": "a"}, TypeError, "leave out validation="),
        ({"genes": ["PINK", 3]}, TypeError, "holds 3, which is not a name"),
    ],
)
def test_wrong_arguments(options, error, match, monkeypatch):
    def read(*_):
        raise AssertionError("a pixel was read")

    monkeypatch.setattr("pixnet._core.slide.reader.SlideReader.read", read)
    with pytest.raises(error, match=match):
        px.tl.cross_validate(coloured_slide(1), groups=2, **OPTIONS | options)


def test_it_refines_the_evidence_of_a_model():
    """The evidence of all folds: a gene whose amount differs between patients is off by as much as they differ."""
    slides = {name: coloured_slide(i) for i, name in enumerate("abc")}
    table = slides["c"]["spots_counts"]
    table.X[:, 1] *= 2  # a patient with twice as much BLUE
    options = OPTIONS | {"max_epochs": 8, "groups": ["P", "P", "Q"], "genes": ["PINK", "BLUE", "FLAT"], "seed": 0}
    model = px.tl.train(slides, **{k: v for k, v in options.items() if k != "groups"})
    before = model.evidence
    scores = px.tl.cross_validate(slides, update=model, **options)
    found = model.evidence.frame(model.genes)
    assert model.evidence.n_shapes == 3 * table.n_obs > before.n_shapes
    by_section = scores[scores["metric"] == "pearson"].groupby("gene")["value"].mean()
    assert found["validation_pearson"]["PINK"] == pytest.approx(by_section["PINK"], abs=0.1)
    assert found["validation_pearson"]["PINK"] > 0.5 > found["validation_pearson_high"]["FLAT"]
    assert found["dispersion"]["BLUE"] > 3 * before.frame(model.genes)["dispersion"]["BLUE"]


@pytest.mark.parametrize(
    ("update", "error", "match"),
    [("her2st", TypeError, "update is str"), (px.models.PixNet(["A"], pretrained=False), ValueError, "not trained")],
)
def test_models_that_cannot_be_updated(update, error, match):
    with pytest.raises(error, match=match):
        px.tl.cross_validate(coloured_slide(1), groups=2, update=update, **OPTIONS)
