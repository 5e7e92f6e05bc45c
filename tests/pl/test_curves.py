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
    {"epoch": 1, "train_expression": 3.0, "val_expression": 3.2, "val_pcc": 0.05, "lr": 1e-3},
    {"epoch": 2, "train_expression": 2.0, "val_expression": 2.2, "val_pcc": 0.20, "lr": 1e-3},
    {"epoch": 3, "train_expression": 1.5, "val_expression": 2.4, "val_pcc": 0.18, "lr": 1e-4},
]


def model(history, **provenance):
    return SimpleNamespace(history=history, provenance=provenance)


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def scores(values, **columns):
    return pd.DataFrame({"pearson": values, **columns}, index=[f"G{i}" for i in range(len(values))])


def test_training_shows_loss_and_pearson():
    loss, pearson = px.pl.training(model(HISTORY, epochs=2))
    curves = {line.get_label(): line for line in loss.lines}
    np.testing.assert_allclose(curves["training"].get_ydata(), [3, 2, 1.5])
    np.testing.assert_allclose(curves["validation"].get_ydata(), [3.2, 2.2, 2.4])
    np.testing.assert_array_equal(curves["validation"].get_xdata(), [1, 2, 3])
    assert pearson.get_ylabel() == "Pearson's r"
    for ax, value in ((loss, 2.2), (pearson, 0.20)):
        (ring,) = lines(ax, "best-epoch")
        assert (ring.get_xdata(), ring.get_ydata()) == ([2], [value])


def test_training_with_one_metric_returns_one_axes():
    ax = px.pl.training(model([{"epoch": 1, "train_total": 2.0}, {"epoch": 2, "train_total": 1.0}]))
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2])


def test_training_says_which_epoch_was_kept_and_what_came_after():
    """The history is of the run with held-out shapes; the weights are of the run on everything, for as many epochs."""
    history = [row | {"val_total": total} for row, total in zip(HISTORY, (0.5, 4.0, 0.1), strict=True)]
    again = model(history, epochs=3, options={"refit": True})
    axes = px.pl.training(again)
    for ax in axes:
        assert list(lines(ax, "kept")[0].get_xdata()) == [3, 3]
        assert lines(ax, "best-epoch")[0].get_xdata() == [3]
    assert legend(axes[0]) == ["training", "validation", "kept: epoch 3; then all data, 3 epochs"]
    again.provenance["refit_epochs"] = 5
    assert legend(px.pl.training(again)[0])[-1] == "kept: epoch 3; then all data, 5 epochs"
    again.provenance["options"]["refit"] = False
    assert legend(px.pl.training(again)[0])[-1] == "kept: epoch 3"


def test_training_further_counts_epochs_on():
    """Each run counts its epochs from 1; the epoch that was kept is one of the last run."""
    further = [row | {"run": 2, "val_expression": row["val_expression"] - 1} for row in HISTORY[:2]]
    third = [row | {"run": 3} for row in HISTORY[:1]]
    axes = px.pl.training(model([*HISTORY, *further, *third], epochs=1, options={"refit": True}))
    for ax in axes:
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2, 3, 4, 5, 6])
        assert [list(line.get_xdata()) for line in lines(ax, "further")] == [[3.5, 3.5], [5.5, 5.5]]
        assert lines(ax, "best-epoch")[0].get_xdata() == [6]
    assert legend(axes[0]) == ["training", "validation", "trained further", "kept: epoch 6; then all data, 1 epoch"]


def test_training_of_a_model_that_was_trained_further():
    sdata = px.datasets.synthetic_tissue(size_um=500, n_genes=4, shapes="spots")
    options = {"max_epochs": 2, "variants": 1, "stride": 4, "mpp": 2.0, "halo": 64, "refit": False}
    first = px.tl.train(sdata, genes=["TUM1", "FIB1"], **options)
    second = px.tl.train(sdata, model=first, max_epochs=2, variants=1, refit=False)
    axes = px.pl.training(second)
    n = len(second.history)
    assert n == len(first.history) + 2
    for ax in axes:
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(1, n + 1))
        assert list(lines(ax, "further")[0].get_xdata()) == [len(first.history) + 0.5] * 2


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [(object(), TypeError, "no history"), (HISTORY, TypeError, "list"), (model([]), ValueError, "empty")],
)
def test_training_wrong_arguments(wrong, error, says):
    with pytest.raises(error, match=says):
        px.pl.training(wrong)


def test_evaluation_ranks_genes_and_names_the_ends():
    ax = px.pl.evaluation(scores([0.1, np.nan, 0.5, -0.2, 0.3]), n_named=1)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.3, 0.1, -0.2])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 100 / 3, 200 / 3, 100])
    assert [text.get_text() for text in ax.texts] == ["best  G2", "worst  G3"]
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


def test_evaluation_names_genes_of_each_curve_apart():
    ax = px.pl.evaluation({"spots": scores([0.50, 0.4, 0.1, 0.0]), "cells": scores([0.49, 0.3, 0.1, 0.01])}, n_named=1)
    assert [text.get_text() for text in ax.texts] == ["best  G0   worst  G3"] * 2
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.lines[:2]]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_names_of_genes_lie_in_the_axes_and_off_the_curves(given, several):
    ids = scores(np.linspace(0.9, 0.7, 60)).rename(index=lambda name: f"ENSG{int(name[1:]):011d}")
    ax = plt.subplots(figsize=(3.5, 2.5))[1] if given else None
    ax = px.pl.evaluation({"spots": ids, "cells": ids} if several else ids, ax=ax)
    ax.set_title("a title")
    sizes = []
    for _ in range(2):
        ax.figure.canvas.draw()
        frame, picture = ax.get_window_extent(), ax.figure.bbox
        boxes = [text.get_window_extent() for text in ax.texts]
        assert all(box.y1 <= frame.y1 + 1 and box.x0 >= picture.x0 and box.x1 <= picture.x1 for box in boxes)
        highest = ax.transData.transform([(0, max(line.get_ydata().max() for line in ax.lines[:-1]))])[0, 1]
        assert all(box.y0 >= highest for box in boxes)
        assert given or ax.title.get_window_extent().y1 <= picture.y1
        sizes.append(frame.bounds)
    assert sizes[0] == pytest.approx(sizes[1], abs=1)


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
