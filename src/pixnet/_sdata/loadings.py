"""The table of loadings of a program map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata.models import TableModel

from pixnet._programs import is_program
from pixnet._sdata.evidence import GeneEvidence

TOP_GENES = 4
"""Genes that name a program."""

LEAST_SHARE = 1e-3
"""Part of a program's transcripts that such a gene has at least."""


def is_loadings(table: AnnData) -> bool:
    """Whether a table holds the loadings of a model's programs."""
    return table.n_obs > 0 and all(map(is_program, map(str, table.obs_names)))


def loadings_table(
    loadings: pd.DataFrame, image_key: str, model: str | None = None, evidence: GeneEvidence | None = None
) -> AnnData:
    """Return loadings ``(programs, genes)`` as a table; ``obs["top_genes"]`` names each program by its genes.

    ``var`` tells what held-out shapes showed of each gene, where the model knows.

    It annotates the map, so that SpatialData keeps both together (a table that annotates nothing breaks its queries).
    """
    obs = {
        "region": pd.Categorical([image_key] * len(loadings)),
        "instance_id": np.arange(1, len(loadings) + 1),
        "top_genes": top_genes(loadings),
    }
    uns: dict[str, Any] = {"kind": "loadings"}
    if model is not None:
        uns["model"] = model
    if evidence is not None:
        uns["evidence"] = evidence.scale
    table = AnnData(
        X=loadings.to_numpy(dtype=np.float32),
        obs=pd.DataFrame(obs, index=loadings.index),
        var=pd.DataFrame(index=loadings.columns) if evidence is None else evidence.frame.set_axis(loadings.columns),
        uns={"pixnet": uns},
    )
    return TableModel.parse(table, region=image_key, region_key="region", instance_key="instance_id")


def top_genes(loadings: pd.DataFrame, n: int = TOP_GENES) -> list[str]:
    """Return the genes of largest `lift` of each program, as one string."""
    order = np.argsort(-lift(loadings.to_numpy()), axis=1, kind="stable")[:, :n]
    return [" ".join(str(loadings.columns[i]) for i in row) for row in order]


def lift(loadings: np.ndarray) -> np.ndarray:
    """Return each gene's share of a program over its mean share of all programs, ``(programs, genes)``.

    It is 0 for genes of which a program has less than of the average gene, or less than a thousandth of its
    transcripts: rarer ones come and go with the seed. Where fewer than ten reach the thousandth, the ten largest take
    its place.
    """
    values = np.asarray(loadings, dtype=np.float64)
    kth = max(values.shape[1] - 10, 0)
    tenth = np.partition(values, kth, axis=1)[:, kth, None]
    enough = values >= np.maximum(values.mean(axis=1, keepdims=True), np.minimum(LEAST_SHARE, tenth))
    return np.where(enough, values / np.maximum(values.mean(axis=0), 1e-12), 0.0)
