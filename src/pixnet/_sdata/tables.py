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

from pixnet._core.coverage import Weights
from pixnet._core.zonal import Mean, Statistic, Sum, ZonalStatistics
from pixnet._logging import logger
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.shapes import PixelShapes
from pixnet._sdata.transforms import to_coordinate_system

UNITS = {"density": "density", "log_sum": "log1p CP10k / um^2"}
"""Unit of the values of a gene map, by quantity."""


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
    statistics
        The statistics that ``agg_func`` names.
    weights, min_coverage
        As given to :func:`pixnet.tl.aggregate`.
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
    statistics: list[Statistic]
    weights: Weights
    min_coverage: float
    systems: dict[str, str]
    mpp: float | None
    model: str | None

    @property
    def computed(self) -> list[Statistic]:
        """The statistics to compute: those asked for, and those that the CP10k of a gene map is made of."""
        needed: list[Statistic] = [] if self.gene_map is None else [Mean()]
        if self.gene_map is not None and self.gene_map.quantity == "log_sum":
            needed.append(Sum())
        return list({s.name: s for s in [*needed, *self.statistics]}.values())


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


def build_table(sdata: SpatialData, plan: Plan, name: str, rows: Rows, sums: ZonalStatistics) -> AnnData:
    """Return the table of one shapes element; ``rows`` and ``sums`` are used up."""
    obs = rows.obs
    seen = sums.area
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
        "agg_func": [s.name for s in plan.statistics],
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
    plan: Plan, gene_map: GeneMap, sums: ZonalStatistics, obs: pd.DataFrame
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return CP10k of a gene map, and statistics of its values."""
    mean = sums.values.pop(Mean.name)
    density, total = np.ascontiguousarray(mean[:, :-1]), mean[:, -1].astype(np.float64) / 1e4
    del mean  # it is as large as the table
    obs["total"] = total
    unit = UNITS[gene_map.quantity]
    layers, units = {"density": density}, {"density": unit}
    for statistic in plan.computed:
        if statistic.name in sums.values:
            area = gene_map.pixel_um2 if statistic.extensive else 1.0
            layers[statistic.name] = sums.values.pop(statistic.name)[:, :-1] * np.float32(area)
            units[statistic.name] = statistic.unit(unit, "um^2")
    if gene_map.quantity == "log_sum":
        values = np.expm1(layers[Sum.name])
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = density / np.where(total > 0, total, np.nan)[:, None].astype(np.float32)
    asked = {"density", *(s.name for s in plan.statistics)}
    layers = {name: layer for name, layer in layers.items() if name in asked}
    units = {name: unit for name, unit in units.items() if name in asked}
    return values, layers, {"unit": "CP10k", "quantity": gene_map.quantity, "layer_units": units}


def _image_values(plan: Plan, sums: ZonalStatistics) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return plain statistics, the first of them as X."""
    first, *further = plan.statistics
    units = {s.name: s.unit("value", "pixel") for s in plan.statistics}
    layers = {s.name: sums.values[s.name] for s in further}
    return sums.values[first.name], layers, {"unit": units.pop(first.name), "layer_units": units}
