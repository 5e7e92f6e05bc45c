"""A few figures as pictures: shapes, colours and places, without text, whose fonts differ between machines.

``PIXNET_NEW_BASELINES=1 pytest tests/pl/test_baselines.py`` draws the pictures anew; look at them before committing.
"""

from __future__ import annotations

import os
from pathlib import Path

import dask.array as da
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from spatialdata.transformations import Affine, Sequence, get_transformation, set_transformation

import pixnet as px

pytestmark = pytest.mark.skipif(
    tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11),
    reason="the pictures were drawn with matplotlib 3.11; earlier versions place lines and pixels otherwise",
)
NEW = os.environ.get("PIXNET_NEW_BASELINES") == "1"
BASELINES = Path(__file__).with_name("baselines")


def check(figure, name, tmp_path, new=NEW):
    for text in figure.findobj(Text):
        text.set_visible(False)
    if new:
        BASELINES.mkdir(exist_ok=True)
        figure.savefig(BASELINES / f"{name}.png", dpi=50, facecolor="white", metadata={"Software": None})
    figure.savefig(tmp_path / f"{name}.png", dpi=50, facecolor="white")
    difference = compare_images(str(BASELINES / f"{name}.png"), str(tmp_path / f"{name}.png"), tol=4)
    assert difference is None, difference


def fixed(n):
    """Axes at fixed places, so that no text moves them."""
    figure = plt.figure(figsize=(2.6 * n, 2.2))
    return figure, [figure.add_axes(((i + 0.08) / n, 0.12, 0.72 / n, 0.8)) for i in range(n)]


@pytest.fixture
def slide(slide):
    """The slide with a soft gradient for H&E: in noise any shift looks alike."""
    y, x = np.mgrid[:240, :320]
    gradient = np.stack([230 - x // 4, 150 + y // 4, 200 - (x + y) // 8]).astype(np.uint8)
    slide["he"] = slide["he"].copy(data=da.from_array(gradient))
    return slide


@pytest.fixture
def turned(slide):
    """The slide with everything but its spots in a coordinate system that is rotated and scaled."""
    angle = np.deg2rad(20)
    matrix = np.array(
        [[2 * np.cos(angle), -2 * np.sin(angle), 30], [2 * np.sin(angle), 2 * np.cos(angle), 9], [0, 0, 1]]
    )
    turn = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    for key in ("he", "he_genes", "cells", "spots", "bins"):
        set_transformation(slide[key], Sequence([get_transformation(slide[key]), turn]), "global")
    return slide


def test_gene_map(slide, tmp_path):
    figure, axes = fixed(3)
    px.pl.gene_map(slide, ["EPCAM", "COL1A1"], shapes=["spots", "cells"], box="slide", ax=axes)
    check(figure, "gene_map", tmp_path)


def test_gene_map_in_a_turned_system_looks_the_same(turned, tmp_path):
    figure, axes = fixed(3)
    px.pl.gene_map(turned, ["EPCAM", "COL1A1"], shapes=["spots", "cells"], box="slide", ax=axes)
    check(figure, "gene_map", tmp_path)


def test_scales(slide, tmp_path):
    figure, axes = fixed(5)
    px.pl.scales(slide, "EPCAM", ["cells", "bins", "spots"], box=(0, 0, 160, 120), ax=axes)
    check(figure, "scales", tmp_path)


def test_evaluation(tmp_path):
    figure, (ax,) = fixed(1)
    rng = np.random.default_rng(0)
    spots = pd.DataFrame({"pearson": rng.uniform(0, 0.6, 40)}, index=[f"G{i}" for i in range(40)])
    px.pl.evaluation({"spots": spots, "cells": spots * 0.5 - 0.05}, ax=ax)
    ax.get_legend().set_visible(False)
    check(figure, "evaluation", tmp_path)


def test_a_wrong_picture_is_noticed(slide, tmp_path):
    """The tolerance is wide enough for other versions of matplotlib, and no wider: spots off by 3 µm fail."""
    figure, axes = fixed(3)
    slide["spots"].geometry = slide["spots"].geometry.translate(6, 0)
    px.pl.gene_map(slide, ["EPCAM", "COL1A1"], shapes=["spots", "cells"], box="slide", ax=axes)
    with pytest.raises(AssertionError, match="RMS"):
        check(figure, "gene_map", tmp_path, new=False)
