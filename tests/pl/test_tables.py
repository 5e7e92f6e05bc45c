"""Figures of tables: compare and scales."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import pixnet as px
from pixnet._sdata.rasters import channel_names

from .conftest import CENTRES, MPP


def filled(ax, key):
    return next(c for c in ax.collections if c.get_gid() == f"filled-{key}")


def by_position(collection):
    """Value by centre (x, y) of each drawn shape."""
    boxes = [path.get_extents() for path in collection.get_paths()]
    return {
        (round((b.x0 + b.x1) / 2, 3), round((b.y0 + b.y1) / 2, 3)): v
        for b, v in zip(boxes, np.asarray(collection.get_array()), strict=True)
    }


def test_compare_joins_by_id_and_gives_r(slide):
    he, measured, predicted = px.pl.compare(slide, "EPCAM", table_key="spots_genes", reference_key="spots_counts")
    counts = np.asarray(slide["spots_counts"].X, dtype=float)
    expected = np.log1p(1e4 * counts[:, 0] / counts.sum(axis=1))
    shown = by_position(filled(measured, "spots"))
    for (x, y), value in zip(CENTRES * MPP, expected, strict=True):
        assert shown[(x, y)] == pytest.approx(value)
    table = np.log1p(np.asarray(slide["spots_genes"].X, dtype=float)[::-1, 0])  # its rows run backwards
    shown = by_position(filled(predicted, "spots"))
    for (x, y), value in zip(CENTRES * MPP, table, strict=True):
        assert shown[(x, y)] == pytest.approx(value, rel=1e-5)
    assert f"r = {np.corrcoef(expected, table)[0, 1]:.2f}, n = 6" in predicted.get_title()
    assert he.get_title() == "H&E"
    assert measured.get_title() == "EPCAM, measured"


def test_compare_with_totals_and_without_log(slide):
    slide["spots_counts"].obs["umi"] = 1000.0
    _, measured, _ = px.pl.compare(
        slide, "EPCAM", table_key="spots_genes", reference_key="spots_counts", total_key="umi", log=False
    )
    counts = np.asarray(slide["spots_counts"].X, dtype=float)[:, 0]
    assert sorted(filled(measured, "spots").get_array()) == pytest.approx(sorted(10 * counts))


def test_compare_leaves_out_shapes_without_value(slide):
    slide["spots_genes"].X[2] = np.nan
    _, measured, predicted = px.pl.compare(slide, "EPCAM", table_key="spots_genes", reference_key="spots_counts")
    assert len(filled(measured, "spots").get_paths()) == 6
    assert len(filled(predicted, "spots").get_paths()) == 5
    assert "n = 5" in predicted.get_title()


def test_compare_frames_the_shapes_and_shares_colours_on_request(slide):
    own = px.pl.compare(slide, "CD3E", table_key="spots_genes", reference_key="spots_counts")
    assert own[1].get_xlim()[0] > 0
    assert filled(own[1], "spots").norm.vmax != filled(own[2], "spots").norm.vmax
    shared = px.pl.compare(slide, "CD3E", table_key="spots_genes", reference_key="spots_counts", shared_scale=True)
    assert filled(shared[1], "spots").norm.vmax == filled(shared[2], "spots").norm.vmax


def test_compare_without_he_on_given_axes(slide):
    _, ax = plt.subplots(1, 2)
    axes = px.pl.compare(slide, "EPCAM", table_key="spots_genes", reference_key="spots_counts", he_key=False, ax=ax)
    assert list(axes) == list(ax)
    assert not axes[0].get_images()


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"table_key": "nope"}, KeyError, "spots_genes"),
        ({"gene": "epcam"}, KeyError, "did you mean 'EPCAM'"),
        ({"table_key": "cells_genes"}, ValueError, "aggregate"),
        ({"layer": "raw"}, KeyError, "raw"),
        ({"total_key": "umi"}, KeyError, "umi"),
        ({"cmap": "jett"}, ValueError, "cmap"),
        ({"box": (0, 0, -1, 1)}, ValueError, "x0 < x1"),
    ],
)
def test_compare_wrong_arguments(slide, kwargs, error, says):
    arguments = {"gene": "EPCAM", "table_key": "spots_genes", "reference_key": "spots_counts"} | kwargs
    with pytest.raises(error, match=says):
        px.pl.compare(slide, arguments.pop("gene"), **arguments)


def test_scales_shows_map_cells_bins_and_spots_in_the_same_colours(slide):
    axes = px.pl.scales(slide, "EPCAM", ["cells", "bins", "spots"])
    titles = [ax.get_title() for ax in axes]
    assert titles[0] == "H&E"
    assert titles[1].startswith("EPCAM, map (2 µm/px")
    assert titles[2:] == ["cells  (n = 3)", "bins  (n = 270)", "spots  (n = 6)"]
    cells = axes[2].get_images()[-1]
    shown = cells.get_array()
    values = sorted(
        {
            round(float(v), 4)
            for v in np.unique(np.asarray(shown.filled(np.nan) if np.ma.isMA(shown) else shown))
            if np.isfinite(v)
        }
    )
    assert values == pytest.approx(np.log1p([1, 4, 7]), abs=1e-4)
    norms = {(m.norm.vmin, m.norm.vmax) for m in (axes[1].get_images()[0], cells, filled(axes[3], "bins"))}
    assert len(norms) == 1


def test_scales_map_is_cp10k(slide):
    axes = px.pl.scales(slide, "EPCAM", "bins", log=False, box=(0, 0, 160, 120))
    shown = axes[1].get_images()[0].get_array()
    assert shown[0, 10] == pytest.approx(1e4 * 11 / 10_000)
    assert shown[40, 10] == pytest.approx(1e4 * 11 / 12_000)


def test_scales_takes_tables_by_name(slide):
    both = px.pl.scales(slide, "EPCAM", ["spots", "cells"], table_key={"spots": "spots_counts", "cells": "cells_genes"})
    counts = np.asarray(slide["spots_counts"].X, dtype=float)
    expected = np.log1p(1e4 * counts[:, 0] / counts.sum(axis=1))
    assert sorted(filled(both[2], "spots").get_array()) == pytest.approx(sorted(expected))
    single = px.pl.scales(slide, "EPCAM", "spots", he_key=False, image_key=False)
    assert single.get_title() == "spots  (n = 6)"


@pytest.mark.parametrize(
    ("shapes", "kwargs", "error", "says"),
    [
        ("nope", {}, KeyError, "spots"),
        (["bins", "spots"], {"table_key": "bins_genes"}, ValueError, "one for each"),
        ("spots", {"table_key": "spots_8um"}, KeyError, "aggregate"),
        ("spots", {"table_key": "bins_genes"}, ValueError, "annotates 'bins'"),
        ("spots", {"table_key": {"bins": "bins_genes"}}, ValueError, "no entry for 'spots'"),
        ("spots", {"image_key": "he"}, ValueError, "not a gene map"),
    ],
)
def test_scales_wrong_arguments(slide, shapes, kwargs, error, says):
    with pytest.raises(error, match=says):
        px.pl.scales(slide, "EPCAM", shapes, **kwargs)


def test_a_map_of_log_sums_is_not_taken_for_densities(slide):
    names = [*channel_names(slide["he_genes"])[:-1], "__total_log_sum__"]
    slide.set_channel_names("he_genes", names)
    axes = px.pl.scales(slide, "EPCAM", ["cells", "spots"])
    assert [ax.get_title() for ax in axes] == ["H&E", "cells  (n = 3)", "spots  (n = 6)"]
    with pytest.raises(ValueError, match="image_key=False"):
        px.pl.scales(slide, "EPCAM", "spots", image_key="he_genes")
    with pytest.raises(ValueError, match="log_sum"):
        px.pl.gene_map(slide, "EPCAM", show="cp10k")
    _, ax = px.pl.gene_map(slide, "EPCAM")
    assert ax.child_axes[0].get_ylabel() == "log1p CP10k / µm²"


def test_scales_shows_the_predicted_map_beside_others(slide):
    slide["truth"] = slide["he_genes"].copy()
    axes = px.pl.scales(slide, "EPCAM", "spots")
    assert [ax.get_title().split(" (")[0] for ax in axes] == ["H&E", "EPCAM, map", "spots "]
