"""Figures of numbers: training and evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

import pixnet as px

HISTORY = [
    {"epoch": 0, "train_expression": 3.0, "val_expression": 3.2, "val_pcc": 0.05, "lr": 1e-3},
    {"epoch": 1, "train_expression": 2.0, "val_expression": 2.2, "val_pcc": 0.20, "lr": 1e-3},
    {"epoch": 2, "train_expression": 1.5, "val_expression": 2.4, "val_pcc": 0.18, "lr": 1e-4},
]


def scores(values, **columns):
    return pd.DataFrame({"pearson": values, **columns}, index=[f"G{i}" for i in range(len(values))])


def test_training_shows_loss_and_pearson():
    loss, pearson = px.pl.training(SimpleNamespace(history=HISTORY))
    curves = {line.get_label(): line for line in loss.lines}
    np.testing.assert_allclose(curves["training"].get_ydata(), [3, 2, 1.5])
    np.testing.assert_allclose(curves["validation"].get_ydata(), [3.2, 2.2, 2.4])
    assert pearson.get_ylabel() == "Pearson's r"
    best = {ax: next(line for line in ax.lines if line.get_gid() == "best-epoch") for ax in (loss, pearson)}
    assert best[loss].get_xdata() == [1]  # the lowest loss
    assert best[pearson].get_xdata() == [1]  # the highest r


def test_training_with_loss_only_returns_one_axes():
    ax = px.pl.training([{"loss": 2.0}, {"loss": 1.0}])
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2])


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (object(), TypeError, "no history"),
        (SimpleNamespace(history=[]), ValueError, "empty"),
        ([{"lr": 1.0}], ValueError, "none of"),
    ],
)
def test_training_wrong_arguments(model, error, says):
    with pytest.raises(error, match=says):
        px.pl.training(model)


def test_evaluation_ranks_genes_and_names_the_ends():
    ax = px.pl.evaluation(scores([0.1, np.nan, 0.5, -0.2, 0.3]), n_named=1)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.3, 0.1, -0.2])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 100 / 3, 200 / 3, 100])
    assert {text.get_text() for text in ax.texts} == {"G2", "G3"}
    assert "mean 0.17" in ax.get_legend().get_texts()[0].get_text()


def test_evaluation_draws_a_curve_for_each_scale_or_section():
    _, given = plt.subplots()
    ax = px.pl.evaluation({"spots": scores([0.5, 0.4]), "8 µm": scores([0.2, 0.1, 0.0])}, ax=given)
    assert ax is given
    assert [t.get_text().split("   ")[0] for t in ax.get_legend().get_texts()] == ["spots", "8 µm"]
    ax = px.pl.evaluation(scores([0.5, 0.4, 0.2, 0.1], section=["C4", "C4", "C5", "C5"]))
    assert [t.get_text().split("   ")[0] for t in ax.get_legend().get_texts()] == ["C4", "C5"]


@pytest.mark.parametrize(
    ("df", "kwargs", "error", "says"),
    [
        ([0.1], {}, TypeError, "DataFrame"),
        (pd.DataFrame({"r": [0.1]}), {}, KeyError, "pearson"),
        (scores([np.nan, np.nan]), {}, ValueError, "no gene"),
        (scores([0.1]), {"n_named": -1}, ValueError, "n_named"),
        (scores([0.1]), {"ax": 3}, TypeError, "Axes"),
    ],
)
def test_evaluation_wrong_arguments(df, kwargs, error, says):
    with pytest.raises(error, match=says):
        px.pl.evaluation(df, **kwargs)


def test_training_says_which_epoch_was_kept_and_what_came_after():
    """The history is of the run with held-out shapes; the weights are of the run on everything, for as many epochs."""
    history = [row | {"val_total": total} for row, total in zip(HISTORY, (0.5, 4.0, 0.1), strict=True)]
    model = SimpleNamespace(history=history, provenance={"options": {"total_weight": 0.2, "refit": True}})
    loss, pearson, total = px.pl.training(model)
    for ax in (loss, pearson, total):
        line = next(line for line in ax.lines if line.get_gid() == "kept")
        assert list(line.get_xdata()) == [2, 2]  # 2.4 + 0.2 x 0.1 is below 2.2 + 0.2 x 4
        assert next(line for line in ax.lines if line.get_gid() == "best-epoch").get_xdata() == [2]
    assert "kept: epoch 2; then all data, 2 epochs" in [t.get_text() for t in loss.get_legend().get_texts()]
    model.provenance["options"]["refit"] = False
    axes = px.pl.training(model)
    assert "kept: epoch 2" in [t.get_text() for t in axes[0].get_legend().get_texts()]


def test_evaluation_names_genes_of_each_curve_apart():
    ax = px.pl.evaluation({"spots": scores([0.50, 0.4, 0.1, 0.0]), "cells": scores([0.49, 0.3, 0.1, 0.01])}, n_named=1)
    best = [text for text in ax.texts if text.get_gid() == "best"]
    assert [text.get_text() for text in best] == ["G0", "G0"]
    assert abs(best[0].xy[1] - best[1].xy[1]) >= 0.05 * np.ptp(ax.get_ylim())
    assert [text.get_color() for text in best] == [line.get_color() for line in ax.lines[:2]]
    assert len([text for text in ax.texts if text.get_gid() == "worst"]) == 2


def test_evaluation_takes_a_cross_validation():
    rows = [
        {"fold": fold, "group": group, "gene": gene, "metric": metric, "value": value}
        for fold, group in enumerate(["C2", "C3"])
        for gene, r in (("A", 0.6 - 0.2 * fold), ("B", 0.2))
        for metric, value in (("pearson", r), ("mse", 9.0))
    ]
    ax = px.pl.evaluation(pd.DataFrame(rows))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "C2   mean 0.40, median 0.40",
        "C3   mean 0.30, median 0.30",
    ]
