"""Evidence about genes, as tables and maps keep it: columns of ``var``, and what brings a dispersion to a shape's area."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pixnet._core.uncertainty import GammaInterval, at_area
from pixnet._evidence import COLUMNS, DISPERSION, LOW, Evidence
from pixnet._sdata.record import find_entry

INTERVAL_ROWS = 4096
"""Rows whose intervals are computed at once."""


@dataclass(frozen=True)
class GeneEvidence:
    """What held-out shapes showed of some genes.

    Attributes
    ----------
    frame
        The columns of `pixnet._evidence.COLUMNS`, with a row for each gene.
    area_um2, correlation_um
        Mean area of the held-out shapes, and the distance over which the error is alike.
    """

    frame: pd.DataFrame
    area_um2: float
    correlation_um: float

    @staticmethod
    def of(evidence: Evidence, genes: Sequence[str]) -> GeneEvidence:
        """Return the evidence that a model has."""
        return GeneEvidence(evidence.frame(genes), evidence.area_um2, evidence.correlation_um)

    @staticmethod
    def of_table(table: AnnData) -> GeneEvidence | None:
        """Return what a table of loadings or of predictions knows of its genes."""
        return _read(table.var, table.uns.get("pixnet"))

    @staticmethod
    def of_record(sdata: SpatialData, image_key: str) -> GeneEvidence | None:
        """Return what is recorded about a map of genes: losing it loses no number of the map."""
        found = (find_entry(sdata, "images", image_key) or {}).get("evidence")
        if not isinstance(found, Mapping):
            return None
        try:
            frame = pd.DataFrame(dict(found["columns"]), index=[str(g) for g in found["genes"]]).astype(float)
        except (KeyError, TypeError, ValueError):  # edited by hand
            return None
        return _read(frame, {"evidence": found})

    @property
    def scale(self) -> dict[str, float]:
        """What a table keeps of it beside the columns."""
        return {"area_um2": self.area_um2, "correlation_um": self.correlation_um}

    def take(self, genes: Sequence[str]) -> GeneEvidence:
        """Return the evidence of some genes; NaN where nothing is known."""
        return GeneEvidence(self.frame.reindex(list(genes)), self.area_um2, self.correlation_um)

    def as_entry(self) -> dict[str, Any]:
        """Return it as the record of a map keeps it (JSON-plain)."""
        columns = {name: [None if np.isnan(v) else float(v) for v in self.frame[name]] for name in COLUMNS}
        return {"genes": self.frame.index.tolist(), "columns": columns, **self.scale}

    def trusted(self) -> list[str]:
        """Return the genes whose held-out correlation is above 0 with its whole interval."""
        return self.frame.index[self.frame[LOW] > 0].tolist()

    def dispersion(self, area_um2: np.ndarray) -> np.ndarray:
        """Return the dispersion of shapes of some areas, ``(shapes, genes)``."""
        return at_area(self.frame[DISPERSION].to_numpy(), area_um2, self.area_um2, self.correlation_um)

    def intervals(self, values: Any, area_um2: np.ndarray, level: float) -> dict[str, Any]:
        """Return the layers ``"lower"`` and ``"upper"`` of CP10k ``(shapes, genes)``, lazy where the values are."""
        factors = GammaInterval(level)
        out = {}
        for end, name in enumerate(("lower", "upper")):

            def ends(x: np.ndarray, area: np.ndarray, end: int = end) -> np.ndarray:
                return (x * factors(self.dispersion(area[:, 0]))[end]).astype(np.float32)

            areas = np.asarray(area_um2, dtype=np.float64)[:, None]
            if isinstance(values, da.Array):
                rows = da.from_array(areas, chunks=(values.chunks[0], 1))
                out[name] = da.map_blocks(ends, values, rows, dtype=np.float32, chunks=values.chunks)
                continue
            layer = np.empty_like(values)
            for start in range(0, len(values), INTERVAL_ROWS):
                rows = slice(start, start + INTERVAL_ROWS)
                layer[rows] = ends(values[rows], areas[rows])
            out[name] = layer
        return out


def table_dispersion(table: AnnData, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
    """Return the dispersion of some rows and genes of a predicted table; None where it is unknown."""
    uns, evidence = table.uns.get("pixnet"), GeneEvidence.of_table(table)
    if evidence is None or uns.get("area_unit") != "um^2" or "area" not in table.obs:
        return None
    return evidence.take(table.var_names[columns]).dispersion(table.obs["area"].to_numpy(dtype=np.float64)[rows])


def _read(var: pd.DataFrame, uns: Any) -> GeneEvidence | None:
    scale = uns.get("evidence") if isinstance(uns, Mapping) else None
    if not isinstance(scale, Mapping) or any(name not in var for name in COLUMNS):
        return None
    try:
        known = [float(scale[name]) for name in ("area_um2", "correlation_um")]
    except (KeyError, TypeError, ValueError):
        return None
    if not all(np.isfinite(v) and v > 0 for v in known):
        return None
    return GeneEvidence(var[list(COLUMNS)].astype(np.float64), *known)
