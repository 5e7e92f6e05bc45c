"""The Visium HD kidney as a SpatialData object: H&E, 55 µm spots, and bins of 8, 16, 32 and 56 µm.

The data are 10x Genomics' public human kidney (FFPE, Visium HD), left half of one section.
"""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel

import pixnet as px

TOTAL_KEY = "total_counts_all_genes"
SCALES = {"bins_008um": 1, "bins_016um": 2, "bins_032um": 4, "bins_056um": 7}


def load(folder: Path, scales: dict[str, int] | None = None) -> SpatialData:
    """Read the folder; coarser bins are sums of whole blocks of 8 µm bins."""
    meta = json.loads((folder / "meta.json").read_text())
    image = np.asarray(Image.open(folder / "he.jpg").convert("RGB")).transpose(2, 0, 1)
    spots = ad.read_h5ad(folder / "spots_055um.h5ad")
    bins = ad.read_h5ad(folder / "bins_008um.h5ad")
    radius = meta["spot_diameter_um"] / 2 / meta["microns_per_pixel"]
    circles = gpd.GeoDataFrame(
        {"radius": radius}, geometry=gpd.points_from_xy(*spots.obsm["spatial"].T), index=spots.obs_names
    )
    elements = {
        "he": Image2DModel.parse(image, dims=("c", "y", "x"), scale_factors=(2, 2)),
        "spots": ShapesModel.parse(circles),
        "spots_counts": _table(spots.X, spots.obs, spots.var_names, "spots"),
    }
    col, row = (np.array(meta["bin_basis_px"][k]) for k in ("col", "row"))
    for name, k in (SCALES if scales is None else scales).items():
        shapes, table = _bins(bins, k, col, row, name)
        elements[name], elements[f"{name}_counts"] = shapes, table
    sdata = SpatialData.init_from_elements(elements)
    px.pp.set_mpp(sdata, "he", meta["microns_per_pixel"])
    return sdata


def _bins(bins: ad.AnnData, k: int, col: np.ndarray, row: np.ndarray, name: str) -> tuple[gpd.GeoDataFrame, ad.AnnData]:
    """Sum blocks of ``k`` x ``k`` bins; blocks that lack bins (the section's edge) are left out."""
    r, c = bins.obs["array_row"].to_numpy() // k, bins.obs["array_col"].to_numpy() // k
    code, owner, size = np.unique(r * 100_000 + c, return_inverse=True, return_counts=True)
    sums = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(code), len(owner)))
    centre = (sums @ bins.obsm["spatial"]) / size[:, None]
    total = sums @ bins.obs[TOTAL_KEY].to_numpy(dtype=float)
    counts = sparse.csr_array(sums @ sparse.csr_array(bins.X)).astype(np.float32)
    whole = size == k * k
    ids = np.array([f"{name}_{i // 100_000}_{i % 100_000}" for i in code])[whole]
    corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * k / 2
    rings = centre[whole][:, None, :] + corner[None, :, :1] * col + corner[None, :, 1:] * row
    shapes = ShapesModel.parse(gpd.GeoDataFrame(geometry=shapely.polygons(rings), index=ids))
    obs = pd.DataFrame({TOTAL_KEY: total[whole]}, index=ids)
    return shapes, _table(counts[np.flatnonzero(whole)], obs, bins.var_names, name)


def _table(counts, obs: pd.DataFrame, genes, region: str) -> ad.AnnData:
    frame = pd.DataFrame(
        {"region": pd.Categorical([region] * len(obs)), "instance_id": obs.index.astype(str)},
        index=obs.index.astype(str),
    )
    frame[TOTAL_KEY] = obs[TOTAL_KEY].to_numpy(dtype=float)
    table = ad.AnnData(sparse.csr_matrix(counts), obs=frame, var=pd.DataFrame(index=genes))
    return TableModel.parse(table, region=region, region_key="region", instance_key="instance_id")


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
