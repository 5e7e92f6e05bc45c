"""Make a table of what was summed over shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import TableModel
from xarray import DataArray

from pixnet._core.coverage import ShapeArrays, Weights
from pixnet._core.zonal import Mean, Statistic, ZonalStatistics, zonal_statistics
from pixnet._logging import logger
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.novelty import novelty_pixels
from pixnet._sdata.selection import ProgramSelection, Selection
from pixnet._sdata.shapes import PixelShapes
from pixnet._sdata.transforms import affine_to_pixels, to_coordinate_system

LARGEST_DENSE = 2 << 30
"""Bytes of genes of a program map up to which a table holds them as numbers; beyond, they are computed when asked for."""

BLOCK_BYTES = 64 << 20
"""Bytes of a block of rows of such a table."""


@dataclass(frozen=True)
class Plan:
    """A request, resolved and checked.

    Attributes
    ----------
    image_key, data
        The image, and its full-resolution level.
    gene_map
        The image as a gene map; None if it is not one.
    selection
        The genes of it that are asked for.
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
    interval
        Probability of the intervals; None: no intervals.
    novelty_key
        The image of novelty that belongs to the map; None: there is none.
    """

    image_key: str
    data: DataArray
    gene_map: GeneMap | None
    selection: Selection | None
    names: list[str]
    channels: list[int]
    statistics: list[Statistic]
    weights: Weights
    min_coverage: float
    systems: dict[str, str]
    mpp: float | None
    model: str | None
    interval: float | None
    novelty_key: str | None = None

    @property
    def evidence(self) -> GeneEvidence | None:
        """What held-out shapes showed of the genes asked for."""
        known = None if self.gene_map is None else self.gene_map.evidence
        return None if known is None else known.take(self.names)

    @property
    def computed(self) -> list[Statistic]:
        """The statistics to compute: those asked for, and those that the CP10k of a gene map is made of."""
        needed = [] if self.selection is None else self.selection.needs
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


def mean_novelty(sdata: SpatialData, map_key: str, novelty_key: str, shapes: ShapeArrays) -> NDArray[np.float32]:
    """Return the mean novelty of shapes in pixels of a map, NaN where there is none."""
    pixels = novelty_pixels(sdata, novelty_key)
    moved = shapes.transform(affine_to_pixels(sdata, map_key, novelty_key))
    return zonal_statistics(pixels, moved, channels=[0], validity=0, statistics=[Mean()]).values[Mean.name][:, 0]


def build_table(
    sdata: SpatialData,
    plan: Plan,
    name: str,
    rows: Rows,
    sums: ZonalStatistics,
    novelty: NDArray[np.float32] | None = None,
) -> AnnData:
    """Return the table of one shapes element; ``rows`` and ``sums`` are used up."""
    obs = rows.obs
    seen = sums.area
    with np.errstate(invalid="ignore", divide="ignore"):
        coverage = np.nan_to_num(seen * (plan.mpp or 1.0) ** 2 / obs["area"].to_numpy())
    # Rounding aside, a shape that is all there has coverage 1; whole pixels (center) may cover more than the shape.
    obs["coverage"] = np.where(coverage > 1 - 1e-9, 1.0, coverage)
    thin = obs["coverage"].to_numpy() < plan.min_coverage

    for found in sums.values.values():
        found[thin] = np.nan
    programs: dict[str, Any] = {"obsm": {}, "varm": {}}
    if plan.gene_map is None or plan.selection is None:
        values, layers, units = _image_values(plan, sums)
    else:
        if isinstance(plan.selection, ProgramSelection):
            programs = _programs(plan.selection, sums.values[Mean.name])
        values, layers, units = _map_values(plan, plan.gene_map, plan.selection, sums, obs)
    if novelty is not None:
        obs["novelty"] = np.where(thin, np.float32(np.nan), novelty)
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
    var, evidence = pd.DataFrame(index=pd.Index(plan.names)), plan.evidence
    if evidence is not None:
        var, parameters["evidence"] = evidence.frame.set_axis(var.index), evidence.scale
        if plan.interval is not None:
            layers |= evidence.intervals(values, obs["area"].to_numpy(), plan.interval)
            parameters["interval"] = plan.interval
    table = AnnData(
        X=values,
        obs=obs,
        var=var,
        layers=layers,
        obsm={"spatial": rows.centroids, **programs["obsm"]},
        varm=programs["varm"],
        uns={"pixnet": parameters},
    )
    return TableModel.parse(table, region=name, region_key="region", instance_key="instance_id")


def _map_values(
    plan: Plan, gene_map: GeneMap, selection: Selection, sums: ZonalStatistics, obs: pd.DataFrame
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return CP10k of a gene map, and statistics of its values."""
    mean, n_genes = sums.values[Mean.name], len(selection.genes)
    obs["total"] = selection.total(mean).astype(np.float64) / 1e4
    values = _by_rows(lambda rows: selection.cp10k({**sums.values, Mean.name: rows}, gene_map.pixel_um2), mean, n_genes)
    layers: dict[str, Any] = {}
    units: dict[str, Any] = {}
    asked = {s.name for s in plan.statistics}
    for statistic in plan.computed:
        name = "density" if statistic.name == Mean.name else statistic.name
        # A lazy table is given once; its densities are X times obs["total"].
        if name == "density" and not isinstance(values, np.ndarray):
            continue
        if name == "density" or name in asked:
            found = sums.values.pop(statistic.name)
            of_pixel = partial(_integrals, selection, np.float32(gene_map.pixel_um2))
            layers[name] = _by_rows(of_pixel if statistic.extensive else selection.values, found, n_genes)
            units[name] = selection.unit if name == "density" else statistic.unit(selection.unit, "um^2")
    return values, layers, {"unit": "CP10k", "quantity": gene_map.quantity, "layer_units": units}


def _integrals(selection: Selection, pixel_um2: np.float32, read: np.ndarray) -> np.ndarray:
    """Return sums of pixels as integrals over µm²."""
    return selection.values(read) * pixel_um2


def _programs(selection: ProgramSelection, mean: np.ndarray) -> dict[str, Any]:
    """Return the CP10k of the programs of each shape, and what each program has of every gene."""
    return {"obsm": {"X_programs": selection.programs(mean)}, "varm": {"loadings": selection.loadings.T.copy()}}


def _by_rows(function: Callable[[np.ndarray], np.ndarray], read: np.ndarray, n_genes: int) -> Any:
    """Apply a function of rows ``(shapes, channels)`` that returns ``(shapes, genes)``, when asked for where it is large."""
    if 4 * len(read) * n_genes <= LARGEST_DENSE or n_genes < read.shape[1]:
        return function(read)
    rows = max(1, BLOCK_BYTES // (4 * n_genes))
    blocks = da.from_array(read, chunks=(rows, -1))
    return blocks.map_blocks(function, chunks=(blocks.chunks[0], (n_genes,)), dtype=np.float32, meta=read[:0, :0])


def _image_values(plan: Plan, sums: ZonalStatistics) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return plain statistics, the first of them as X."""
    first, *further = plan.statistics
    units = {s.name: s.unit("value", "pixel") for s in plan.statistics}
    layers = {s.name: sums.values[s.name] for s in further}
    return sums.values[first.name], layers, {"unit": units.pop(first.name), "layer_units": units}
