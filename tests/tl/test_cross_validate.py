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
