"""Misplaced spots are noticed; well placed ones are not complained of."""

from __future__ import annotations

import logging

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

import pixnet as px
from pixnet._sdata.raster_element import pyramid, raster_element

mpl.use("agg")


@pytest.fixture
def sdata():
    """Textured tissue in one corner of a wide slide, spots on it."""
    pixels = np.full((3, 600, 1000), 245, dtype=np.uint8)
    texture = np.random.default_rng(0).integers(60, 200, (3, 60, 120)).repeat(4, axis=1).repeat(4, axis=2)
    pixels[:, 30:270, 40:520] = texture
    x, y = (part.ravel() for part in np.meshgrid(np.arange(60, 500, 40), np.arange(50, 250, 40)))
    sdata = SpatialData(images={"he": raster_element(*pyramid(pixels))})
    sdata["spots"] = ShapesModel.parse(np.column_stack([x, y]).astype(float), geometry=0, radius=15.0)
    px.pp.set_mpp(sdata, "he", 2.0)
    return sdata


def move(sdata, change):
    spots = sdata["spots"].copy()
    spots.geometry = shapely.transform(spots.geometry.to_numpy(), change)
    sdata.shapes["spots"] = ShapesModel.parse(spots)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage()) if record.levelno >= logging.WARNING else None
    logger = logging.getLogger("pixnet")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_well_placed(sdata, warnings):
    table = px.pp.check_spots(sdata)
    assert list(table.index)[0] == "as given"
    assert len(table) == 9  # eight orientations, and as if they were µm
    assert table["correlation"].isna().all()
    assert table.loc["as given", "on_tissue"] > 0.95
    assert table["on_tissue"].iloc[1:].max() < 0.9
    assert warnings == []


@pytest.mark.parametrize("seed", [1, 4])
def test_well_placed_cells(seed, warnings):
    sdata = px.datasets.synthetic_tissue(800, n_genes=13, seed=seed, shapes=["cells"])
    px.pp.check_spots(sdata, "cells")
    assert warnings == []


def test_training_checks_too(sdata, warnings, monkeypatch):
    n = len(sdata["spots"])
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * n), "instance_id": np.arange(n)}, index=map(str, range(n)))
    table = ad.AnnData(np.full((n, 2), 100.0, np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    sdata["counts"] = TableModel.parse(table, region="spots", region_key="region", instance_key="instance_id")
    monkeypatch.setattr("pixnet._core.train.fit.fit", lambda *args, **kwargs: 1 / 0)
    options = {"genes": ["A", "B"], "mpp": 2.0, "zoom": 1}
    with pytest.raises(ZeroDivisionError):
        px.tl.train(sdata, **options)
    assert warnings == []
    move(sdata, lambda xy: np.column_stack([1000 - xy[:, 0], xy[:, 1]]))
    with pytest.raises(ZeroDivisionError):
        px.tl.train(sdata, **options)
    assert "with coordinates 'x mirrored'" in warnings[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda xy: np.column_stack([1000 - xy[:, 0], xy[:, 1]]), "x mirrored"),
        (lambda xy: np.column_stack([xy[:, 0], 600 - xy[:, 1]]), "y mirrored"),
        (lambda xy: np.column_stack([1000 - xy[:, 0], 600 - xy[:, 1]]), "turned by 180 degrees"),
        (lambda xy: xy[:, ::-1], "x and y exchanged"),
    ],
)
def test_misplaced(sdata, warnings, change, name):
    move(sdata, change)
    table = px.pp.check_spots(sdata)
    assert table["on_tissue"].idxmax() == name
    assert len(warnings) == 1
    assert f"coordinates '{name}'" in warnings[0]


def test_at_another_scale(sdata, warnings):
    move(sdata, lambda xy: xy * 7)
    px.pp.check_spots(sdata)
    assert "shifted, or at another scale" in warnings[0]


def test_picture(sdata):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    px.pp.check_spots(sdata, ax=ax)
    assert len(ax.images) == 1
    drawn = np.concatenate([points.get_offsets() for points in ax.collections])
    expected = 2.0 * np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y])  # µm
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0))
    assert "on tissue" in ax.get_title()
    plt.close(fig)


def test_refusals(sdata):
    with pytest.raises(KeyError, match="'cells'"):
        px.pp.check_spots(sdata, "cells")
    sdata["cells"] = sdata["spots"].copy()
    with pytest.raises(ValueError, match="one by one"):
        px.pp.check_spots(sdata, ["spots", "cells"])


def test_without_a_mask_shapes_outside_the_image_are_found(sdata, warnings):
    assert px.pp.check_spots(sdata, mask_key=False).loc["as given", "on_tissue"] == 1
    move(sdata, lambda xy: xy + [0, 500])
    found = px.pp.check_spots(sdata, mask_key=False).loc["as given", "on_tissue"]
    assert found == pytest.approx((sdata["spots"].geometry.y < 600).mean())
    assert "40 % of 'spots' lie in image 'he'" in warnings[0]


# by the transcripts ---------------------------------------------------------------------------------------------------


def table_of(total, shapes="spots"):
    obs = pd.DataFrame({"region": pd.Categorical([shapes] * len(total)), "instance_id": np.arange(len(total))})
    obs["umi"] = total
    obs.index = obs.index.astype(str)
    table = ad.AnnData(np.asarray(total, dtype=np.float32)[:, None], obs=obs)
    return TableModel.parse(table, region=shapes, region_key="region", instance_key="instance_id")


@pytest.fixture
def everywhere():
    """A slide that is all tissue, darker in places, and spots whose transcripts follow it: tissue alone tells nothing."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :600] / 600
    dark = 0.5 + 0.5 * np.sin(9 * x + 1) * np.cos(13 * y)
    texture = rng.integers(-25, 25, (150, 150)).repeat(4, 0).repeat(4, 1)
    pixels = np.stack([200 - 120 * dark + texture, 140 + 0 * dark + texture, 190 - 40 * dark + texture])
    sdata = SpatialData(images={"he": raster_element(*pyramid(pixels.clip(0, 255).astype(np.uint8)))})
    px.pp.set_mpp(sdata, "he", 2.0)
    a, b = (part.ravel() for part in np.meshgrid(np.arange(30, 580, 40), np.arange(30, 580, 40)))
    sdata["spots"] = ShapesModel.parse(np.column_stack([a, b]).astype(float), geometry=0, radius=14.0)
    sdata["spots_counts"] = table_of(rng.poisson(500 * (0.4 + dark[b, a])))
    return sdata


def test_transcripts_follow_the_haematoxylin(everywhere, warnings):
    table = px.pp.check_spots(everywhere)
    assert table.loc["as given", "correlation"] > 0.8
    assert table["correlation"].idxmax() == "as given"
    assert len(table) == 10
    assert sum(name.startswith("shifted by (") for name in table.index) == 1
    assert warnings == []
    assert px.pp.check_spots(everywhere, table_key=False)["correlation"].isna().all()
    pd.testing.assert_frame_equal(px.pp.check_spots(everywhere, total_key="umi"), table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda xy: np.column_stack([600 - xy[:, 0], xy[:, 1]]), "coordinates 'x mirrored'"),
        (lambda xy: xy[:, ::-1], "coordinates 'x and y exchanged'"),
        (lambda xy: np.column_stack([xy[:, 1], 600 - xy[:, 0]]), "coordinates 'turned by 90 degrees'"),
        (lambda xy: xy + [28, 0], "better if they are shifted by (-56, +0) µm"),
    ],
)
def test_wrong_places_on_tissue_are_noticed(everywhere, warnings, change, said):
    move(everywhere, change)
    table = px.pp.check_spots(everywhere)
    assert table["on_tissue"].iloc[0] > 0.9  # by the tissue alone all is well
    assert len(warnings) == 1
    assert said in warnings[0]
    assert table.index[1] in warnings[0]


def test_spots_in_um_are_noticed(everywhere, warnings):
    """At 0.5 µm/px, µm lie in the upper left quarter of the slide, on tissue."""
    px.pp.set_mpp(everywhere, "he", 0.5)
    move(everywhere, lambda xy: xy * 0.5)
    table = px.pp.check_spots(everywhere)
    assert table["on_tissue"].iloc[0] > 0.9
    assert table.index[1] == "in µm"
    assert "they look like µm: scale them to pixels" in warnings[0]


def test_training_warns_of_misplaced_spots(everywhere, warnings, monkeypatch):
    class BeforeFit(Exception):
        """Training itself is not needed."""

    def stop(*_, **__):
        raise BeforeFit

    monkeypatch.setattr("pixnet._core.train.fit.fit", stop)
    for misplaced in (False, True):
        if misplaced:
            move(everywhere, lambda xy: xy[:, ::-1])
        with pytest.raises(BeforeFit):
            px.tl.train(everywhere, genes=list(everywhere["spots_counts"].var_names))
        assert (
            any("fit better" in text or "hardly follow" in text or "fit image" in text for text in warnings)
            == misplaced
        )


def test_few_spots_and_normalised_tables(everywhere, warnings, caplog):
    everywhere["spots_counts"].X = everywhere["spots_counts"].X / 3
    assert px.pp.check_spots(everywhere)["correlation"].isna().all()
    with pytest.raises(ValueError, match="normalised"):
        px.pp.check_spots(everywhere, table_key="spots_counts")
    few = everywhere["spots"].iloc[:20]
    everywhere["few"] = ShapesModel.parse(few.copy())
    everywhere["few_counts"] = table_of(np.arange(20), "few")
    assert px.pp.check_spots(everywhere, "few")["correlation"].isna().all()
    with pytest.raises(KeyError, match="no obs column 'total'"):
        px.pp.check_spots(everywhere, "few", table_key="few_counts", total_key="total")
    assert warnings == []


@pytest.mark.data
def test_real_sections(shared_data, warnings):
    """Rightly placed sections are not complained of; a kidney that fills its image is seen to be mirrored."""
    sdata = px.datasets.her2st("C5", path=shared_data / "her2st")
    table = px.pp.check_spots(sdata)
    assert table["correlation"].drop("as given").max() < table.loc["as given", "correlation"] + 0.03
    kidney = shared_data / "visium_hd_kidney"
    adata = ad.read_h5ad(kidney / "spots_055um.h5ad")
    sdata = px.io.from_anndata(adata, kidney / "he.jpg", mpp=2.0026, diameter_um=55)
    assert px.pp.check_spots(sdata, total_key="total_counts_all_genes")["correlation"].idxmax() == "as given"
    assert warnings == []
    width = sdata["he"]["scale0"]["image"].sizes["x"]
    move(sdata, lambda xy: np.column_stack([width - xy[:, 0], xy[:, 1]]))
    table = px.pp.check_spots(sdata, total_key="total_counts_all_genes")
    assert table["on_tissue"].iloc[0] > 0.85
    assert "with coordinates 'x mirrored' it would be 0.4" in warnings[0]
