"""What held-out shapes showed of each gene: it travels with the model, its maps and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from pixnet._checked import checked

if TYPE_CHECKING:
    import pandas as pd

Correlation = Annotated[float, Field(ge=-1, le=1)]
Nonnegative = Annotated[float, Field(ge=0)]

PEARSON, LOW, HIGH = "validation_pearson", "validation_pearson_low", "validation_pearson_high"
RATIO, CEILING, DISPERSION = "validation_ratio", "noise_ceiling", "dispersion"
COLUMNS = (PEARSON, LOW, HIGH, RATIO, CEILING, DISPERSION)
"""Names of the columns of a table of evidence."""


@checked
class Evidence:
    """What held-out shapes showed of each gene; None where too little was measured.

    Attributes
    ----------
    n_shapes
        Number of held-out shapes.
    area_um2
        Their mean area in µm².
    correlation_um
        Distance in µm over which the error of the model is alike: its correlation falls to 1/e.
    validation_pearson, validation_pearson_low, validation_pearson_high
        Pearson's r of predicted and measured log1p CP10k, and its 95 % interval (bootstrap of blocks in space).
    validation_ratio
        Summed measured counts over summed predicted ones: before the amounts were balanced with these shapes, or, of a
        cross-validation, in groups that no amount was balanced with.
    noise_ceiling
        The r that a perfect prediction would have, since counts are noisy.
    dispersion
        Squared relative error of the model in these shapes: counts have variance ``mean + dispersion * mean**2``.
    """

    n_shapes: Annotated[int, Field(ge=1)]
    area_um2: Annotated[float, Field(gt=0)]
    correlation_um: Annotated[float, Field(gt=0)]
    validation_pearson: list[Correlation | None]
    validation_pearson_low: list[Correlation | None]
    validation_pearson_high: list[Correlation | None]
    validation_ratio: list[Nonnegative | None]
    noise_ceiling: list[Correlation | None]
    dispersion: list[Nonnegative | None]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.validation_pearson)

    def column(self, name: str) -> np.ndarray:
        """Return a column as numbers, NaN where nothing is known."""
        return np.array([np.nan if v is None else v for v in getattr(self, name)], dtype=np.float64)

    def frame(self, genes: Sequence[str]) -> pd.DataFrame:
        """Return the evidence with a row for each gene."""
        import pandas as pd

        return pd.DataFrame({name: self.column(name) for name in COLUMNS}, index=pd.Index(genes, name="gene"))

    def take(self, positions: Sequence[int | None]) -> Evidence:
        """Return the evidence of other genes, by position; None: nothing is known."""
        columns = {name: [None if i is None else getattr(self, name)[i] for i in positions] for name in COLUMNS}
        return Evidence(self.n_shapes, self.area_um2, self.correlation_um, **columns)


def evidence_of(n_shapes: int, area_um2: float, correlation_um: float, columns: Mapping[str, np.ndarray]) -> Evidence:
    """Return evidence of columns of numbers, rounded to what they are worth; NaN becomes None."""

    def plain(values: np.ndarray) -> list[float | None]:
        return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]

    found = {name: plain(columns[name]) for name in COLUMNS}
    return Evidence(int(n_shapes), float(area_um2), float(correlation_um), **found)
