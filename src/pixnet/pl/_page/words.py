"""What a page says of a map: how far genes can be trusted, what to beware of, and how the map was made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet._evidence import CEILING, HIGH, LOW, PEARSON, RATIO
from pixnet._sdata.gene_map import GeneMap, ProgramMap
from pixnet._sdata.novelty import EXPECTED, RARE
from pixnet.pl._frame import Frame

EVIDENCE = {"pearson": PEARSON, "low": LOW, "high": HIGH, "ceiling": CEILING, "ratio": RATIO}
"""What a page shows of the evidence about a gene."""


def evidence_of(opened: GeneMap) -> pd.DataFrame:
    """Return the evidence for each gene of a map: a row for each gene, and no column where none is known."""
    if opened.evidence is None:
        return pd.DataFrame(index=pd.Index(opened.genes))
    frame = opened.evidence.take(opened.genes).frame
    return pd.DataFrame({short: frame[name] for short, name in EVIDENCE.items()})


def by_trust(evidence: pd.DataFrame) -> list[str]:
    """Return the genes, those whose correlation is surely high first: by the lower end of its interval."""
    if "low" not in evidence:
        return list(evidence.index)
    return list(evidence["low"].sort_values(ascending=False, kind="stable", na_position="last").index)


def warnings_of(
    sdata: SpatialData,
    opened: GeneMap,
    evidence: pd.DataFrame,
    novelty: NDArray[np.float32] | None,
    left_out: int,
    others: Sequence[str],
) -> list[str]:
    """Return what a reader must know first, in plain words."""
    found = list(others)
    if novelty is None:
        found.append(
            "This map carries no novelty, so the page cannot show where the tissue is unlike the training tissue. A model draws "
            "crisp maps of an organ that it has never seen, too: check well-known genes against the tissue first."
        )
    else:
        far = float(np.mean(novelty[np.isfinite(novelty)] > RARE)) if np.isfinite(novelty).any() else 0.0
        if far > 5 * EXPECTED:
            found.append(
                f"{far:.0%} of this tissue is unlike the tissue that the model was trained on (1 % is expected). Values there "
                "are guesses; the novelty layer shows where."
            )
    if "low" not in evidence:
        found.append(
            "This map carries no held-out evidence for its genes. Treat the map of any gene as a hypothesis until it has been "
            "compared with measurements."
        )
    else:
        poor = int((~(evidence["low"] > 0)).sum())
        if poor:
            found.append(
                f"{poor:,} of {len(evidence):,} genes were not shown to be predictable on held-out tissue. They are at the end "
                "of the list."
            )
    if opened.quantity == "log_sum":
        found.append(
            "This model predicts sums of logs, which hold for shapes of the size it was trained on. Compare places; do not read "
            "the values as amounts."
        )
    if left_out:
        found.append(
            f"{left_out:,} genes of the map do not fit into this page and are left out; pixnet.pl.report(..., genes=) chooses."
        )
    if not opened.made:
        found.append("How this map was made is not recorded.")
    return found


def provenance_of(sdata: SpatialData, opened: GeneMap, he_key: str | None, frame: Frame) -> list[tuple[str, str]]:
    """Return how the map was made, as pairs of words."""
    entry = opened.made
    height, width = opened.data.sizes["y"], opened.data.sizes["x"]
    size = "unknown pixel size" if opened.mpp is None else f"{opened.mpp:.4g} µm/px"
    found: list[tuple[str, Any]] = [("Store", None if sdata.path is None else sdata.path.name)]
    if he_key is not None:
        known = frame.unit != "px" and frame.anchor == he_key
        found.append(("Slide", f"{he_key}, {frame.unit_per_pixel:.4g} µm/px" if known else he_key))
    what = f"{len(opened.programs)} programs" if isinstance(opened, ProgramMap) else "a channel for each gene"
    found += [
        ("Map", f"{opened.key}, {width:,} × {height:,} px, {size}, {what}"),
        ("Genes", f"{len(opened.genes):,}"),
        ("Model", entry.get("model")),
        ("Model hash", entry.get("model_hash")),
        ("Tissue mask", {False: "none: everything was predicted", None: "computed"}.get(m := entry.get("mask_key"), m)),
        ("Predicted with", _joined(entry.get("precision"), entry.get("device"))),
        ("Page written", f"{time.strftime('%Y-%m-%d %H:%M')} by pixnet {version('pixnet')}"),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def _joined(*words: Any) -> str | None:
    return ", ".join(str(word) for word in words if word is not None) or None
