from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
import xarray as xr
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import (
    Affine,
    Identity,
    Scale,
    Sequence,
    get_transformation,
    remove_transformation,
    set_transformation,
)

import pixnet as px

from .conftest import CENTRES, GENES, MPP, gene_map_array, make_table


def images(ax):
    return ax.get_images()


def outlines(ax, key):
    return next(c for c in ax.collections if c.get_gid() == f"outlines-{key}")


def placed(ax, image):
    """Corners of a drawn picture in data units: upper left, upper right, lower left."""
    left, right, bottom, top = image.get_extent()
    to_data = image.get_transform() - ax.transData
    return to_data.transform([(left, top), (right, top), (left, bottom)])


def test_he_beside_each_gene(slide):
    axes = px.pl.gene_map(slide, GENES, shapes="spots", box="slide")
    assert [ax.get_title() for ax in axes] == ["H&E", *GENES]
    np.testing.assert_array_equal(images(axes[0])[0].get_array(), np.moveaxis(slide["he"].values, 0, -1))
    for i, ax in enumerate(axes[1:]):
        drawn = images(ax)[0].get_array()
        np.testing.assert_allclose(drawn.filled(np.nan), gene_map_array()[i])
        np.testing.assert_allclose(placed(ax, images(ax)[0]), [[0, 0], [160, 0], [0, 120]], atol=1e-9)
        assert ax.get_xlim() == (0, 160)
        assert ax.get_ylim() == (120, 0)


def test_background_is_transparent_and_colours_end_at_percentiles(slide):
    _, ax = px.pl.gene_map(slide, "EPCAM", percentiles=(5, 90))
    image = images(ax)[0]
    assert image.cmap(np.ma.masked_invalid([np.nan]))[0, 3] == 0
    values = gene_map_array()[0]
    assert image.norm.vmin == pytest.approx(np.nanpercentile(values, 5))
    assert image.norm.vmax == pytest.approx(np.nanpercentile(values, 90))
    _, ax = px.pl.gene_map(slide, "EPCAM", vmin=0, vmax=50)
    assert (images(ax)[0].norm.vmin, images(ax)[0].norm.vmax) == (0, 50)


def test_shared_scale(slide):
    axes = px.pl.gene_map(slide, GENES, shared_scale=True)
    assert len({(images(ax)[0].norm.vmin, images(ax)[0].norm.vmax) for ax in axes[1:]}) == 1
    own = px.pl.gene_map(slide, GENES)
    assert len({images(ax)[0].norm.vmax for ax in own[1:]}) == 3


def test_default_box_is_where_there_are_predictions(slide):
    _, ax = px.pl.gene_map(slide, "EPCAM")
    x0, x1 = ax.get_xlim()
    assert 8 * 2 - 0.05 * 160 < x0 < 8 * 2  # glass is the first 8 map pixels of 2 µm
    assert x1 == 160


def test_cp10k_is_the_share_of_all_transcripts(slide):
    _, ax, total = px.pl.gene_map(slide, ["EPCAM", "__total__"], show="cp10k", box="slide")
    density = gene_map_array()
    np.testing.assert_allclose(images(ax)[0].get_array().filled(np.nan), 1e4 * density[0] / density[3], rtol=1e-6)
    np.testing.assert_allclose(images(total)[0].get_array().filled(np.nan), density[3])
    assert total.get_title() == "all transcripts"


@pytest.mark.parametrize("container", [list, tuple, np.array, pd.Index])
def test_genes_in_any_container(slide, container):
    axes = px.pl.gene_map(slide, container(["EPCAM", "CD3E"]))
    assert [ax.get_title() for ax in axes] == ["H&E", "EPCAM", "CD3E"]


def test_colour_bars_say_what_is_shown(slide):
    def labels(axes):
        return [ax.child_axes[0].get_ylabel() for ax in axes[1:]]

    genes = ["EPCAM", "CD3E", "__total__"]
    assert labels(px.pl.gene_map(slide, genes)) == ["", "density of transcripts", "density of all transcripts"]
    assert labels(px.pl.gene_map(slide, genes, show="cp10k")) == ["", "CP10k", "density of all transcripts"]
    genes[-1] = "__total_log_sum__"
    slide.set_channel_names("he_genes", [*GENES, genes[-1]])
    assert labels(px.pl.gene_map(slide, genes)) == ["", "log1p CP10k / µm²", "density of all transcripts"]


def test_he_under_lets_low_values_through(slide):
    ax = px.pl.gene_map(slide, "EPCAM", he="under", box="slide")
    he, genes = images(ax)
    assert he.get_array().shape == (240, 320, 3)
    alpha = genes.get_alpha()
    assert alpha[:, 8].max() < alpha[:, -1].min()
    assert np.isfinite(alpha).all()


@pytest.mark.parametrize("he", ["beside", "under"])
def test_one_axes_is_used_and_returned(slide, he):
    _, ax = plt.subplots()
    assert px.pl.gene_map(slide, "EPCAM", ax=ax, he=he) is ax
    assert len(images(ax)) == (2 if he == "under" else 1)


def test_axes_given_for_each_panel_or_divided(slide):
    _, (a, b) = plt.subplots(1, 2)
    assert list(px.pl.gene_map(slide, GENES[:2], he_key=False, ax=[a, b])) == [a, b]
    _, ax = plt.subplots()
    axes = px.pl.gene_map(slide, GENES, ax=ax, ncols=2)
    assert len(axes) == 4
    assert set(ax.child_axes) == set(axes)
    with pytest.raises(ValueError, match="2 Axes, but 4"):
        px.pl.gene_map(slide, GENES, ax=[a, b])
    with pytest.raises(TypeError, match="matplotlib Axes"):
        px.pl.gene_map(slide, GENES, ax="here")


def test_scale_bar_has_a_round_length_in_um(slide):
    axes = px.pl.gene_map(slide, "EPCAM", box="slide")
    bar = next(line for line in axes[0].lines if line.get_gid() == "scale-bar")
    assert np.ptp(bar.get_xdata()) == 20  # a quarter of 160 µm is 40: the round length below
    assert any(text.get_text() == "20 µm" for text in axes[0].texts)
    axes = px.pl.gene_map(slide, "EPCAM", scalebar=False)
    assert not axes[0].lines


def test_scale_bar_counts_pixels_where_um_is_unknown(slide, capsys):
    for key in slide.images:
        remove_transformation(slide[key], "pixnet_um")
    axes = px.pl.gene_map(slide, "EPCAM", box="slide")
    assert any(text.get_text().endswith(" px") for text in axes[0].texts)
    assert axes[0].get_xlim() == (0, 320)
    assert "set_mpp" in capsys.readouterr().err


def test_um_of_a_map_without_a_pixel_size_comes_from_the_slide(slide):
    remove_transformation(slide["he_genes"], "pixnet_um")
    ax = px.pl.gene_map(slide, "EPCAM", he_key=False, box="slide")
    assert ax.get_xlim() == pytest.approx((0, 160))


def test_outlines_lie_on_the_shapes(slide):
    axes = px.pl.gene_map(slide, "EPCAM", shapes=["spots", "cells"], box="slide")
    for ax in axes:
        centres = [path.get_extents() for path in outlines(ax, "spots").get_paths()]
        found = np.array([((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for b in centres])
        np.testing.assert_allclose(found, CENTRES * MPP, atol=1e-9)
        assert centres[0].width == pytest.approx(50 * MPP)
    lines = {tuple(np.asarray(line).ravel()) for line in outlines(axes[0], "cells").get_segments()}
    assert (20.0, 10.0, 120.0, 10.0) in lines  # the upper edge of both upper cells, in um
    assert (70.0, 10.0, 70.0, 50.0) in lines  # the line between them
    assert len(lines) == 9  # two rectangles that touch, and one more


def test_box_shows_only_the_shapes_in_it(slide):
    axes = px.pl.gene_map(slide, "EPCAM", shapes="spots", box=(0, 0, 50, 60))
    assert len(outlines(axes[0], "spots").get_paths()) == 1
    assert images(axes[1])[0].get_array().shape == (30, 25)
    assert axes[1].get_xlim() == (0, 50)


def test_holes_stay_open(slide):
    ring = shapely.Point(160, 120).buffer(60).difference(shapely.Point(160, 120).buffer(30))
    two = shapely.MultiPolygon([shapely.box(10, 10, 30, 30), shapely.box(40, 10, 60, 30)])
    slide["regions"] = ShapesModel.parse(GeoDataFrame(geometry=[ring, two]), transformations={"global": Identity()})
    slide["regions_genes"] = make_table("regions", [0, 1], np.full((2, 3), 5.0), predicted=True)
    ax = px.pl.scales(slide, "EPCAM", "regions", image_key=False, he_key=False, box=(0, 0, 160, 120))
    ax.figure.canvas.draw()
    picture = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3]

    def is_filled(x, y):
        column, row = ax.transData.transform((x, y)).astype(int)
        return (picture[picture.shape[0] - 1 - row, column] < 250).any()

    assert [is_filled(80, 60), is_filled(80 + 22, 60), is_filled(10, 10), is_filled(17.5, 10), is_filled(25, 10)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_elements_in_turned_frames_meet(slide):
    """The map is stored turned by 90 degrees, the spots in a rotated and scaled system: the picture is the same."""
    angle = np.deg2rad(30)
    matrix = np.array(
        [[0.7 * np.cos(angle), -0.7 * np.sin(angle), 200], [0.7 * np.sin(angle), 0.7 * np.cos(angle), -50], [0, 0, 1]]
    )
    turn = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    for key in ("he", "cells"):
        set_transformation(slide[key], Sequence([get_transformation(slide[key]), turn]), "global")
    slide["spots"] = ShapesModel.parse(
        CENTRES @ matrix[:2, :2].T + matrix[:2, 2],
        geometry=0,
        radius=25 * 0.7,
        index=list(slide["spots"].index),
        transformations={"global": Identity()},
    )
    # new[y', x'] = old[59 - x', y'], so old x = y', old y = 60 - x'
    turned = np.ascontiguousarray(gene_map_array()[:, ::-1].swapaxes(1, 2))
    back = Affine([[0, 4, 0], [-4, 0, 240], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    slide["he_genes"] = Image2DModel.parse(
        turned, dims=("c", "y", "x"), c_coords=[*GENES, "__total__"], transformations={"global": Sequence([back, turn])}
    )
    he, ax = px.pl.gene_map(slide, "EPCAM", shapes="spots", box="slide")
    np.testing.assert_allclose(placed(he, images(he)[0]), [[0, 0], [160, 0], [0, 120]], atol=1e-6)
    # The stored map's upper left corner is the slide's lower left one; its upper edge runs up the slide's left.
    np.testing.assert_allclose(placed(ax, images(ax)[0]), [[0, 120], [0, 0], [160, 120]], atol=1e-6)
    bounds = [path.get_extents() for path in outlines(ax, "spots").get_paths()]
    found = np.array([((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for b in bounds])
    np.testing.assert_allclose(found, CENTRES * MPP, atol=0.05)  # a turned polygon of 32 corners
    assert bounds[0].width == pytest.approx(50 * MPP, rel=0.01)


def test_pyramid_level_fits_the_panel(slide):
    """Each level holds its own number, so the picture tells which one was read."""
    tree = {}
    for i in range(4):
        size = 4096 >> i
        data = xr.DataArray(
            np.full((2, size, size), float(i + 1)), dims=("c", "y", "x"), coords={"c": ["A", "__total__"]}
        )
        data.attrs["transform"] = {"global": Scale([2**i, 2**i], axes=("x", "y"))}
        tree[f"scale{i}"] = xr.Dataset({"image": data.chunk()})
    slide["big"] = xr.DataTree.from_dict(tree)
    whole = px.pl.gene_map(slide, "A", image_key="big", he_key=False, box="slide")
    assert images(whole)[0].get_array().max() > 2
    assert images(whole)[0].get_array().shape[0] <= 2048
    zoomed = px.pl.gene_map(slide, "A", image_key="big", he_key=False, box=(100, 100, 200, 200))
    assert images(zoomed)[0].get_array().max() == 1


def test_a_large_map_without_pyramid_is_averaged(slide):
    values = np.tile(np.array([[0.0, 2.0], [4.0, 6.0]], dtype=np.float32), (1000, 1000))
    values[:1000] = np.nan
    for key in slide.images:
        remove_transformation(slide[key], "pixnet_um")
    slide["big"] = Image2DModel.parse(np.stack([values, values]), dims=("c", "y", "x"), c_coords=["A", "__total__"])
    ax = px.pl.gene_map(slide, "A", image_key="big", he_key=False, box="slide")
    shown = images(ax)[0].get_array()
    assert max(shown.shape) <= 1200
    assert shown[-10:].mean() == pytest.approx(3.0, abs=0.1)
    assert shown[-10:].max() < 6
    assert shown.mask[:10].all()


def test_style_does_not_leak(slide):
    before = dict(mpl.rcParams)
    px.pl.gene_map(slide, GENES)
    assert dict(mpl.rcParams) == before


def test_showing_records_nothing(slide):
    slide.attrs.clear()
    px.pl.gene_map(slide, "EPCAM")
    assert "pixnet" not in slide.attrs


def test_map_without_predictions_still_shows(slide):
    empty = np.full((2, 20, 20), np.nan, dtype=np.float32)
    slide["nothing"] = Image2DModel.parse(empty, dims=("c", "y", "x"), c_coords=["A", "__total__"])
    ax = px.pl.gene_map(slide, "A", image_key="nothing", he_key=False)
    ax.figure.canvas.draw()
    assert images(ax)[0].get_array().mask.all()


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"genes": "EPCAMM"}, KeyError, "did you mean 'EPCAM'"),
        ({"genes": []}, ValueError, "genes is empty"),
        ({"genes": ["EPCAM", "EPCAM"]}, ValueError, "more than once"),
        ({"genes": 3}, TypeError, "a list of names is needed"),
        ({"genes": [3]}, TypeError, "not a name"),
        ({"image_key": "nope"}, KeyError, "he_genes"),
        ({"image_key": "he"}, ValueError, "not a gene map"),
        ({"he_key": "he_genes"}, ValueError, "H&E"),
        ({"shapes": "nope"}, KeyError, "spots"),
        ({"cmap": "jett"}, ValueError, "magma"),
        ({"he": "over"}, ValueError, "beside"),
        ({"show": "log"}, ValueError, "cp10k"),
        ({"box": (0, 0, 10)}, ValueError, "four numbers"),
        ({"box": (10, 0, 0, 10)}, ValueError, "x0 < x1"),
        ({"box": (500, 0, 600, 10)}, ValueError, "outside"),
        ({"box": "all"}, ValueError, "slide"),
        ({"percentiles": (99, 1)}, ValueError, "rising"),
        ({"percentiles": 99}, ValueError, "rising"),
        ({"vmin": 3, "vmax": 1}, ValueError, "vmin"),
        ({"ncols": 0}, ValueError, "ncols"),
    ],
)
def test_wrong_arguments(slide, kwargs, error, says):
    with pytest.raises(error, match=says):
        px.pl.gene_map(slide, **{"genes": "EPCAM", **kwargs})


def test_wrong_object():
    with pytest.raises(TypeError, match="SpatialData"):
        px.pl.gene_map("slide.zarr", "EPCAM")


def test_a_backend_that_starts_inside_stays_interactive(slide):
    """A notebook's backend turns interactive on with the first figure; later figures show only while it is on."""
    from pixnet.pl._style import style

    assert not mpl.is_interactive()
    try:
        with style():
            mpl.interactive(True)
        assert mpl.is_interactive()
    finally:
        mpl.interactive(False)


def test_spatialdata_plot_shows_a_map_as_the_docs_of_predict_say(slide):
    pytest.importorskip("spatialdata_plot")
    pixels = Image2DModel.parse(
        gene_map_array(), dims=("c", "y", "x"), c_coords=[*GENES, "__total__"], scale_factors=(2,)
    )
    assert np.isnan(pixels["scale0"]["image"]).any()
    sdata = SpatialData(images={"he_genes": pixels})
    with pytest.raises(ValueError, match="NaN"):  # else the docs can leave it out
        sdata.pl.render_images("he_genes", channel=GENES[0]).pl.show("global")
    shown = SpatialData(images={"map": sdata["he_genes"].map_over_datasets(lambda level: level.fillna(0))})
    shown.pl.render_images("map", channel=GENES[0]).pl.show("global")
    values = images(plt.gcf().axes[0])[0].get_array()
    assert values.min() == 0
    assert values.max() == pytest.approx(np.nanmax(gene_map_array()[0]))
