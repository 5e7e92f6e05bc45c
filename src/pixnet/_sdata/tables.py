"""Make a table of what was summed over shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import TableModel
from xarray import DataArray

from pixnet._core.zonal.zonal import Sums
from pixnet._logging import logger
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.shapes import PixelShapes
from pixnet._sdata.transforms import to_coordinate_system

UNITS = {
    "density": ("density", "density x um^2"),
    "log_sum": ("log1p CP10k / um^2", "log1p CP10k"),
}
"""Unit of the values of a gene map, and of their sum times µm², by quantity."""


@dataclass(frozen=True)
class Plan:
    """A request, resolved and checked.

    Attributes
    ----------
    image_key, data
        The image, and its full-resolution level.
    gene_map
        The image as a gene map; None if it is not one.
    names, channels
        Names of the channels asked for, and their indices; of a gene map the index of the total comes last.
    agg_func, weights, min_coverage
        As given to :func:`pixnet.tl.aggregate`; ``agg_func`` is a list.
    systems
        Coordinate system of each shapes element.
    mpp
        Pixel size (µm/px), if known.
    model
        Name of the model that made the map, if known.
    """

    image_key: str
    data: DataArray
    gene_map: GeneMap | None
    names: list[str]
    channels: list[int]
    agg_func: list[str]
    weights: str
    min_coverage: float
    systems: dict[str, str]
    mpp: float | None
    model: str | None


class Rows(NamedTuple):
    """The part of a table that needs no pixels."""

    obs: pd.DataFrame
    centroids: NDArray[np.float64]


def table_rows(sdata: SpatialData, plan: Plan, name: str, element: PixelShapes) -> Rows:
    """Return ids, areas (µm² or pixels) and centroids (in the coordinate system) of the shapes of one element."""
    obs = pd.DataFrame(index=pd.Index(element.ids.astype(str), name=None))
    obs["region"] = pd.Categorical.from_codes(np.zeros(len(obs), np.int8), categories=[name])
    integer = pd.api.types.is_integer_dtype(element.ids.dtype)
    obs["instance_id"] = element.ids.to_numpy(dtype=np.int64 if integer else object)
    obs["area"] = element.geometries.area * (plan.mpp or 1.0) ** 2
    to_system = to_coordinate_system(sdata, plan.image_key, plan.systems[name])
    return Rows(obs, element.geometries.centroids @ to_system[:2, :2].T + to_system[:2, 2])


def build_table(sdata: SpatialData, plan: Plan, name: str, rows: Rows, sums: Sums) -> AnnData:
    """Return the table of one shapes element; ``rows`` and ``sums`` are used up."""
    obs = rows.obs
    seen = sums.weight.max(axis=1)  # a pixel that any channel has counts as seen
    with np.errstate(invalid="ignore", divide="ignore"):
        coverage = np.nan_to_num(seen * (plan.mpp or 1.0) ** 2 / obs["area"].to_numpy())
    # Rounding aside, a shape that is all there has coverage 1; whole pixels (center) may cover more than the shape.
    obs["coverage"] = np.where(coverage > 1 - 1e-9, 1.0, coverage)
    thin = obs["coverage"].to_numpy() < plan.min_coverage

    if plan.gene_map is None:
        values, layers, units = _image_values(plan, sums)
    else:
        values, layers, units = _map_values(plan, plan.gene_map, sums, obs)
    if thin.any():
        for value in (values, *layers.values()):
            value[thin] = np.nan
        if plan.gene_map is not None:
            obs.loc[thin, "total"] = np.nan
    empty = int((seen == 0).sum())
    if empty or thin.any():
        logger.info(
            "%s: of %d shapes %d have no predictions, %d too few", name, len(obs), empty, (thin & (seen > 0)).sum()
        )

    parameters = {
        "kind": "aggregate",
        "shapes": name,
        "image_key": plan.image_key,
        "agg_func": plan.agg_func,
        "weights": plan.weights,
        "min_coverage": plan.min_coverage,
        "coordinate_system": plan.systems[name],
        "genes": plan.names,
        "area_unit": "um^2" if plan.mpp is not None else "pixel",
        **units,
    }
    if plan.mpp is not None:
        parameters["mpp"] = plan.mpp
    if plan.model is not None:
        parameters["model"] = plan.model
    table = AnnData(
        X=values,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(plan.names)),
        layers=layers,
        obsm={"spatial": rows.centroids},
        uns={"pixnet": parameters},
    )
    return TableModel.parse(table, region=name, region_key="region", instance_key="instance_id")


def _map_values(
    plan: Plan, gene_map: GeneMap, sums: Sums, obs: pd.DataFrame
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return CP10k of a gene map, and statistics of its values."""
    density = np.ascontiguousarray(sums.mean[:, :-1])
    total = sums.mean[:, -1].astype(np.float64) / 1e4
    sums.mean = density[:0]  # it is as large as the table, and copied now
    obs["total"] = total
    value_unit, sum_unit = UNITS[gene_map.quantity]
    layers, units = {"density": density}, {"density": value_unit}
    summed = density[:0]
    if gene_map.quantity == "log_sum" or "sum" in plan.agg_func:
        pixel_um2 = np.nan if gene_map.mpp is None else gene_map.mpp**2
        summed = density * (sums.weight * pixel_um2).astype(np.float32)
    if gene_map.quantity == "log_sum":
        values = np.expm1(summed)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = density / np.where(total > 0, total, np.nan)[:, None].astype(np.float32)
    for function in plan.agg_func:
        if function == "sum":
            layers["sum"], units["sum"] = summed, sum_unit
        elif function != "mean":
            layers[function] = np.ascontiguousarray(getattr(sums, function)[:, :-1])
            units[function] = value_unit
    return values, layers, {"unit": "CP10k", "quantity": gene_map.quantity, "layer_units": units}


def _image_values(plan: Plan, sums: Sums) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return plain statistics, the first of them as X."""
    values, units = {}, {}
    for function in plan.agg_func:
        if function == "sum":
            values["sum"] = np.where(sums.weight > 0, sums.mean * sums.weight, np.nan).astype(np.float32)
            units["sum"] = "value x pixel"
        else:
            values[function] = getattr(sums, function)
            units[function] = "value"
    first = plan.agg_func[0]
    layers = {function: value for function, value in values.items() if function != first}
    return (
        values[first],
        layers,
        {"unit": units[first], "layer_units": {function: units[function] for function in layers}},
    )
