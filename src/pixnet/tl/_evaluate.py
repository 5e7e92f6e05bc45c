"""Compare predicted tables with measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pixnet._core.uncertainty import check_level, count_quantile, marginal_dispersion, randomised_pit
from pixnet._correlation import pearson
from pixnet._logging import logger
from pixnet._names import check_genes, listed, some
from pixnet._sdata.counts import check_totals_alike, counts_matrix, dense, is_predicted_table, totals
from pixnet._sdata.evidence import table_dispersion
from pixnet._sdata.genes import gene_positions
from pixnet._sdata.inputs import SpatialDatas, named_objects
from pixnet._sdata.sections import Total
from pixnet._settings import settings

POOLED = "pooled"

CALIBRATION_VALUES = 2_000_000
"""Rows times genes at most whose intervals are looked at."""

WIDTH_ROWS = 10
"""One of so many of these rows gives the width of intervals, whose quantiles take longer."""


def evaluate(
    sdata: SpatialDatas,
    *,
    table_key: str,
    reference_key: str,
    genes: str | Sequence[str] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    totals: Total = "all",
    interval: float = 0.9,
) -> pd.DataFrame:
    """Score a predicted table against the measured one, gene by gene.

    Both are compared as log1p of CP10k. Rows meet by element and id. Rows whose prediction is NaN or whose measured
    total is zero are left out.

    Parameters
    ----------
    sdata
        One object, a list (their names are "0", "1", ...) or a dict of named ones.
    table_key
        Predicted table, as `pixnet.tl.aggregate` makes it: X holds CP10k.
    reference_key
        Measured table of raw counts.
    genes
        Genes to score, one name or several. None: all that every predicted and measured table has; a warning names the
        others.
    layer
        Layer of the measured table that holds the counts. None: X.
    total_key
        Column of the measured table's obs with all UMI. None: the sum over all its columns.
    totals
        ``"all"``: the measured total is that of all transcripts. ``"panel"``: it is that of the genes that both tables
        have, and the prediction is compared within them.
    interval
        Probability (between 0 and 1) of the intervals whose coverage is told.

    Returns
    -------
    DataFrame
        Index ``gene``; columns

        ``pearson``
            Pearson's r; NaN for genes constant in prediction or measurement.
        ``mse``, ``mae``
            Squared and absolute error of log1p CP10k.
        ``ratio``
            Summed measured counts over summed predicted ones; 1 where amounts are right. Correlations do not see it.
        ``n``
            Rows compared.
        ``coverage``, ``width``, ``marginal_width``, ``pit_deviation``
            Where the table knows how far off it may be (``var["dispersion"]``): the share of measured counts inside
            their intervals, the mean width of these in counts, that of intervals that ignore the image (the gene's
            mean share and its spread over these rows), and the largest distance of the counts' randomised PIT from
            uniform.

        ``.attrs["summary"]`` holds ``pcc_mean``, ``pcc_median``, ``pcc_q1`` (first quartile), ``n_genes`` (genes with a
        correlation), ``mse``, ``mae``, ``ratio`` (of all genes together), ``ratio_median``, and ``coverage_median`` and
        ``pit_deviation_median`` where they are known. With several objects a column ``section`` names the object, or
        "pooled" for all rows together, and the summary is a dict by section.

    Raises
    ------
    KeyError
        If a table, layer, column or gene is missing.
    ValueError
        If the tables have no rows in common, or the measured one holds no raw counts.

    Notes
    -----
    Counts are negative binomial around the prediction, with the dispersion that held-out shapes had, brought to the
    area of each shape (see `pixnet.tl.aggregate`). A count is put at a random place within its own probability
    (randomised PIT: Czado, Gneiting & Held, Biometrics 2009), so that coverage is not flattered where counts are few.
    At most some thousand rows, drawn at random, are looked at for it.

    Per-section and pooled figures differ: pooled correlations include differences between sections. The first quartile,
    median and mean are PCC@F, PCC@S and PCC@M of EGN and PixNet (arXiv 2503.01347).

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600, n_genes=10)
    >>> px.tl.aggregate(sdata, "bins", image_key="truth", key_added="bins_true")
    >>> scores = px.tl.evaluate(sdata, table_key="bins_true", reference_key="bins_counts")
    >>> list(scores.columns)
    ['pearson', 'mse', 'mae', 'ratio', 'n']
    """
    objects = named_objects(sdata)
    for name, one in objects.items():
        for argument, key in (("table_key", table_key), ("reference_key", reference_key)):
            if key not in one.tables:
                where = f" of object {name!r}" if len(objects) > 1 else ""
                raise KeyError(f"no table {key!r}{where} ({argument}=); it has: {listed(one.tables)}")
    if totals not in ("all", "panel"):
        raise ValueError(f"totals is {totals!r}; valid: 'all', 'panel'")
    check_level(interval)
    if totals == "all":
        columns = {f"{reference_key} of object {n}": one.tables[reference_key].n_vars for n, one in objects.items()}
        check_totals_alike(columns, total_key)
    if genes is not None:
        genes = check_genes(genes)
    else:
        genes = _common_genes(objects, table_key, reference_key)
    pairs = {
        name: matched(one, table_key, reference_key, genes, layer, total_key, totals) for name, one in objects.items()
    }
    if isinstance(sdata, SpatialData):
        frame = _score(pairs["0"], genes, interval)
        frame.attrs["summary"] = _summary(frame)
        return frame
    pairs[POOLED] = Pair.pooled(list(pairs.values()))
    frames = {name: _score(pair, genes, interval) for name, pair in pairs.items()}
    summary = {name: _summary(frame) for name, frame in frames.items()}
    out = pd.concat([frame.assign(section=name) for name, frame in frames.items()])
    out.attrs["summary"] = summary
    return out


def _common_genes(objects: dict[str, SpatialData], table_key: str, reference_key: str) -> list[str]:
    """Return the genes that all tables have, predicted and measured, in the order of the first; log what is left out."""
    predicted = [one.tables[table_key].var_names for one in objects.values()]
    measured = [one.tables[reference_key].var_names for one in objects.values()]
    common = predicted[0]
    for names in [*predicted[1:], *measured]:
        common = common[common.isin(names)]
    left_out = predicted[0][~predicted[0].isin(common)]
    if len(common) == 0:
        return predicted[0].tolist()  # refused where they are looked for, with what the names look like
    if len(left_out):
        logger.warning(
            "%d of the %d predicted genes are not in every table and are not scored: %s",
            len(left_out),
            len(predicted[0]),
            some(left_out.astype(str).tolist()),
        )
    return common.tolist()


@dataclass(frozen=True)
class Pair:
    """Rows that both tables have.

    Attributes
    ----------
    predicted
        CP10k, ``(rows, genes)``.
    counts, total
        Measured counts ``(rows, genes)``, and all transcripts of each row.
    dispersion
        How far off predictions may be, ``(rows, genes)``; None: unknown.
    rows
        Positions of the rows in the predicted table.
    """

    predicted: np.ndarray
    counts: np.ndarray
    total: np.ndarray
    dispersion: np.ndarray | None
    rows: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Predicted counts."""
        return self.predicted * self.total[:, None] / 1e4

    @staticmethod
    def pooled(pairs: Sequence[Pair]) -> Pair:
        """Return the rows of all."""
        known = [p.dispersion for p in pairs if p.dispersion is not None]
        return Pair(
            np.concatenate([p.predicted for p in pairs]),
            np.concatenate([p.counts for p in pairs]),
            np.concatenate([p.total for p in pairs]),
            np.concatenate(known) if len(known) == len(pairs) else None,
            np.concatenate([p.rows for p in pairs]),
        )


def matched(
    sdata: SpatialData,
    table_key: str,
    reference_key: str,
    genes: list[str],
    layer: str | None,
    total_key: str | None,
    totals_of: Total,
) -> Pair:
    """Return what was predicted and measured in the rows that both tables have."""
    predicted, reference = sdata.tables[table_key], sdata.tables[reference_key]
    columns = gene_positions(predicted, table_key, genes)
    measured_columns = gene_positions(reference, reference_key, genes)
    matrix = counts_matrix(reference, reference_key, layer)
    shared = predicted.var_names.intersection(reference.var_names)
    if totals_of == "panel":
        total = np.asarray(matrix[:, reference.var_names.get_indexer(shared)].sum(axis=1), dtype=np.float64).ravel()
    else:
        total = totals(reference, reference_key, matrix, total_key)
    here, there = _keys(predicted, table_key), _keys(reference, reference_key)
    found = here.get_indexer(there)
    if (found < 0).all():
        raise ValueError(
            f"tables {table_key!r} and {reference_key!r} have no rows in common: they annotate {listed(_regions(here))} and "
            f"{listed(_regions(there))}, with ids such as {here[0][1] if len(here) else None!r} and "
            f"{there[0][1] if len(there) else None!r}; aggregate over the shapes that the measured table annotates"
        )
    rows = np.flatnonzero((found >= 0) & (total > 0))
    values = dense(predicted.X[found[rows]][:, columns]).astype(np.float64)
    if totals_of == "panel":
        everything = dense(predicted.X[found[rows]][:, predicted.var_names.get_indexer(shared)]).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = 1e4 * values / everything.sum(axis=1, keepdims=True)
    # A log that was summed and undone may come out below 0, though above -1; anything else is not CP10k.
    least = -1 if is_predicted_table(predicted) else 0
    if (values < 0).any() and (values <= least).any():
        raise ValueError(f"table {table_key!r} holds negative values; X must be CP10k, as pixnet.tl.aggregate makes it")
    known = np.isfinite(values).all(axis=1)
    rows, values = rows[known], np.maximum(values[known], -0.99)
    counts = dense(matrix[rows][:, measured_columns]).astype(np.float64)
    return Pair(values, counts, np.asarray(total)[rows], table_dispersion(predicted, found[rows], columns), found[rows])


def _keys(table: AnnData, key: str) -> pd.MultiIndex:
    """Return element and id of each row."""
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        raise ValueError(f"table {key!r} annotates no element; link it with spatialdata.models.TableModel.parse(...)")
    out = pd.MultiIndex.from_arrays([table.obs[attrs["region_key"]].astype(str), table.obs[attrs["instance_key"]]])
    if not out.is_unique:
        raise ValueError(f"table {key!r} has several rows for one shape")
    return out


def _regions(keys: pd.MultiIndex) -> list[str]:
    return sorted(set(keys.get_level_values(0)))


def _score(pair: Pair, genes: list[str], interval: float) -> pd.DataFrame:
    index = pd.Index(genes, name="gene")
    n = len(pair.total)
    if n == 0:
        return pd.DataFrame(dict.fromkeys(("pearson", "mse", "mae", "ratio"), np.nan) | {"n": 0}, index=index)
    predicted, measured = np.log1p(pair.predicted), np.log1p(1e4 * pair.counts / pair.total[:, None])
    error = predicted - measured
    sums = pair.counts.sum(axis=0), pair.mean.sum(axis=0)
    scores = {
        "pearson": pearson(predicted, measured),
        "mse": (error**2).mean(axis=0),
        "mae": np.abs(error).mean(axis=0),
        "ratio": _ratio(*sums),
        "n": n,
    }
    frame = pd.DataFrame(scores | _calibration(pair, interval), index=index)
    frame.attrs["sums"] = tuple(float(total.sum()) for total in sums)
    return frame


def _ratio(measured: Any, predicted: Any) -> Any:
    """Return measured over predicted amounts; NaN where nothing is predicted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(predicted) > 0, measured / predicted, np.nan)


def _calibration(pair: Pair, level: float) -> dict[str, np.ndarray]:
    """Return how counts fall into the intervals of their predictions, for each gene, from rows drawn at random."""
    if pair.dispersion is None:
        return {}
    rng = np.random.default_rng(settings.seed)
    rows = rng.permutation(len(pair.total))[: max(1, CALIBRATION_VALUES // max(pair.counts.shape[1], 1))]
    counts, mean, dispersion = pair.counts[rows], np.maximum(pair.mean[rows], 0), pair.dispersion[rows]
    tail = (1 - level) / 2
    unknown = np.isnan(dispersion).all(axis=0)
    pit = randomised_pit(counts, mean, np.nan_to_num(dispersion), rng)
    inside = ((pit >= tail) & (pit <= 1 - tail)).mean(axis=0)
    uniform = (np.arange(len(rows)) + 0.5)[:, None] / len(rows)
    few = slice(0, max(1, len(rows) // WIDTH_ROWS))
    share, marginal = marginal_dispersion(pair.counts, pair.total)

    def width(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
        ends = (count_quantile(share, mean, dispersion) for share in (1 - tail, tail))
        return np.subtract(*ends).mean(axis=0)

    total = pair.total[rows][few, None]
    found = {
        "coverage": inside,
        "width": width(mean[few], np.nan_to_num(dispersion[few])),
        "marginal_width": width(total * share, np.broadcast_to(marginal, (len(total), len(marginal)))),
        "pit_deviation": np.abs(np.sort(pit, axis=0) - uniform).max(axis=0),
    }
    return {name: np.where(unknown, np.nan, values) for name, values in found.items()}


def _summary(frame: pd.DataFrame) -> dict[str, float | int]:
    pearson = frame["pearson"].dropna()
    calibration = {
        f"{name}_median": float(frame[name].median()) for name in ("coverage", "pit_deviation") if name in frame
    }
    return {
        "pcc_mean": float(pearson.mean()),
        "pcc_median": float(pearson.median()),
        "pcc_q1": float(pearson.quantile(0.25)),
        "n_genes": int(len(pearson)),
        "mse": float(frame["mse"].mean()),
        "mae": float(frame["mae"].mean()),
        "ratio": float(_ratio(*frame.attrs.pop("sums", (np.nan, np.nan)))),
        "ratio_median": float(frame["ratio"].median()),
        **calibration,
    }
