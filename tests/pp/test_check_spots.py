"""Misplaced spots are noticed; well placed ones are not complained of."""

from __future__ import annotations

import logging

import matplotlib as mpl
import numpy as np
import pytest
import shapely
from spatialdata import SpatialData
from spatialdata.models import ShapesModel

import pixnet as px
from pixnet._sdata.rasters import pyramid, raster_element

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
    assert len(table) == 8
    assert table.loc["as given", "on_tissue"] > 0.95
    assert table["on_tissue"].iloc[1:].max() < 0.9
    assert warnings == []


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
