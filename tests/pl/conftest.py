"""A small slide whose map, spots, cells and tables are made by hand, so that what is drawn can be told exactly."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import anndata as ad
import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from pixnet._sdata.record import identity_of, note
from pixnet._sdata.store.element_store import write_mpp

GENES = ["EPCAM", "COL1A1", "CD3E"]
MPP = 0.5  # H&E: 240 x 320 px = 120 x 160 µm; map: 60 x 80 px of 2 um
CENTRES = np.array([[60.0, 60.0], [160.0, 60.0], [260.0, 60.0], [60.0, 180.0], [160.0, 180.0], [260.0, 180.0]])


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def gene_map_array() -> np.ndarray:
    """Density (gene, y, x): EPCAM rises to the right, COL1A1 downwards; glass is the left tenth."""
    y, x = np.mgrid[:60, :80].astype(np.float32)
    total = np.full_like(x, 10_000.0) + 50 * y
    density = np.stack([x + 1, 2 * y + 1, np.full_like(x, 3.0), total])
    density[:, :, :8] = np.nan
    return density


def make_table(region: str, index, values: np.ndarray, predicted: bool) -> ad.AnnData:
    obs = pd.DataFrame({"region": pd.Categorical([region] * len(index)), "instance_id": np.asarray(index)})
    obs.index = [str(i) for i in index]
    table = ad.AnnData(np.asarray(values, dtype=np.float32), obs=obs, var=pd.DataFrame(index=GENES))
    table = TableModel.parse(table, region=region, region_key="region", instance_key="instance_id")
    if predicted:
        table.uns["pixnet"] = {"kind": "aggregate"}
    return table


@pytest.fixture
def slide() -> sd.SpatialData:
    rng = np.random.default_rng(0)
    he = rng.integers(150, 250, size=(3, 240, 320), dtype=np.uint8)
    names = [f"s{i}" for i in range(6)]
    cells = np.zeros((240, 320), dtype=np.int32)
    cells[20:100, 40:140], cells[20:100, 140:240], cells[120:220, 100:300] = 3, 7, 12
    counts = rng.poisson([[30, 20, 5], [40, 10, 5], [80, 5, 5], [20, 40, 5], [50, 30, 5], [90, 20, 5]])
    boxes = [shapely.box(x, y, x + 16, y + 16) for y in range(0, 240, 16) for x in range(32, 320, 16)]
    sdata = sd.SpatialData(
        images={
            "he": Image2DModel.parse(
                he, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={"global": Identity()}
            ),
            "he_genes": Image2DModel.parse(
                gene_map_array(),
                dims=("c", "y", "x"),
                c_coords=[*GENES, "__total__"],
                transformations={"global": Scale([4, 4], axes=("x", "y"))},
            ),
        },
        labels={"cells": Labels2DModel.parse(cells, dims=("y", "x"), transformations={"global": Identity()})},
        shapes={
            "spots": ShapesModel.parse(
                CENTRES, geometry=0, radius=25.0, index=names, transformations={"global": Identity()}
            ),
            "bins": ShapesModel.parse(gpd.GeoDataFrame(geometry=boxes), transformations={"global": Identity()}),
        },
        tables={
            # Rows in another order than the shapes: joined by id, not by position.
            "spots_genes": make_table("spots", names[::-1], rng.gamma(5, 10, size=(6, 3)), predicted=True),
            "spots_counts": make_table("spots", names, counts, predicted=False),
            "cells_genes": make_table("cells", [3, 7, 12], [[1, 2, 3], [4, 5, 6], [7, 8, 9]], predicted=True),
            "bins_genes": make_table("bins", range(len(boxes)), rng.gamma(5, 10, (len(boxes), 3)), predicted=True),
        },
    )
    write_mpp(sdata, "he", MPP)
    write_mpp(sdata, "he_genes", 4 * MPP)
    note(sdata, "images", "he_genes", {"image_key": "he", "identity": identity_of(sdata["he_genes"])})
    note(sdata, "defaults", "image_key", "he")
    note(sdata, "defaults", "shapes", "spots")
    return sdata
