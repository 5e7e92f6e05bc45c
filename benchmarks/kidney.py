"""The Visium HD kidney, and parts of it to train on and to test on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shapely
from spatialdata import SpatialData

import pixnet as px
from pixnet.tl._training_genes import LEAST_DETECTED

TOTAL_KEY = "total_counts"
SCALES = {"bins_008um": 1, "bins_016um": 2, "bins_032um": 4, "bins_056um": 7}


def load(folder: Path) -> SpatialData:
    """Return image, spots and bins."""
    return px.datasets.kidney(folder)


def centres(sdata: SpatialData, key: str) -> np.ndarray:
    """Return the centres of shapes in pixels, ``(n, 2)``."""
    geometry = shapely.centroid(sdata[key].geometry.to_numpy())
    return np.column_stack([shapely.get_x(geometry), shapely.get_y(geometry)])


def part(sdata: SpatialData, low: float, high: float, least_umi: float = 0.0) -> SpatialData:
    """Return the object with the measured rows whose centres lie between two fractions of the image's height."""
    height = next(iter(sdata["he"]["scale0"].values())).sizes["y"]
    elements = {name: element for _, name, element in sdata.gen_elements()}
    for key in sdata.shapes:
        y = centres(sdata, key)[:, 1] / height
        keep = (y >= low) & (y < high)
        table = sdata.tables[f"{key}_counts"]
        k = SCALES.get(key, 0)
        keep &= table.obs[TOTAL_KEY].to_numpy() > least_umi * k * k
        elements[f"{key}_counts"] = table[keep].copy()
    return SpatialData.init_from_elements(elements, attrs=dict(sdata.attrs))


def every_gene(train: SpatialData) -> list[str]:
    """Return all genes that `tl.train` takes for programs: detected in 1 % of the training spots."""
    return px.pp.select_genes(
        train,
        table_key="spots_counts",
        total_key=TOTAL_KEY,
        n_top=None,
        exclude_prefixes=(),
        min_fraction=LEAST_DETECTED,
    )
