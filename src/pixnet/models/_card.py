"""The card of a model: what it is, how it was trained, and what held-out shapes showed, in markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixnet._evidence import CEILING, HIGH, LOW, PEARSON

if TYPE_CHECKING:
    from pixnet.models._pixnet import PixNet

LISTED = 20
"""Genes in the table of the best ones."""


def card(model: PixNet) -> str:
    """Return the card of a model."""
    return (
        "\n\n".join(part for part in (_head(model), _training(model), _evidence(model), _limits(model)) if part) + "\n"
    )


def _head(model: PixNet) -> str:
    config, n_weights = model.config, sum(p.numel() for p in model.parameters())
    what = "a channel for each gene" if config.n_programs is None else f"{config.n_programs} programs"
    rows = {
        "genes": f"{len(model.genes):,}: {', '.join(model.genes[:8])}{', ...' if len(model.genes) > 8 else ''}",
        "map": f"{what}; {model.unit}",
        "pixel size": f"{model.mpp:.4g} µm/px in, {model.mpp * model.stride:.4g} µm/px out",
        "encoder": config.encoder,
        "decoder": f"{config.decoder}, {config.members} side by side" if config.members > 1 else config.decoder,
        "weights": f"{n_weights / 1e6:.1f} M",
    }
    return "# PixNet model\n\nPredicts dense maps of gene expression from H&E slides, with pixnet.\n\n" + _table(rows)


def _training(model: PixNet) -> str:
    found = model.provenance
    if not found:
        return "## Training\n\nHow this model was trained is not recorded."
    options = found.get("options") or {}
    rows = {
        "trained on": _sections(found.get("training")),
        "validated on": _sections(found.get("validation")),
        "pixel size of the slides": ", ".join(f"{k}: {v:.4g} µm/px" for k, v in (found.get("mpp") or {}).items()),
        "passes": found.get("refit_epochs", found.get("epochs")),
        "loss": options.get("loss"),
        "seed": found.get("seed"),
        "pixnet": found.get("pixnet"),
    }
    text = "## Training\n\n" + _table(rows)
    if found.get("validation") and options.get("refit"):
        text += "\n\nThe validation part chose the number of passes; the model was then trained on it too."
    return text


def _evidence(model: PixNet) -> str:
    if model.evidence is None:
        return (
            "## Evidence\n\nThis model carries no held-out evidence for its genes. Score it on measured tissue of your kind "
            "(`pixnet.tl.evaluate`) before you use its maps."
        )
    frame = model.evidence.frame(model.genes)
    trusted = int((frame[LOW] > 0).sum())
    best = frame.sort_values(LOW, ascending=False).head(LISTED)
    lines = [
        "## Evidence",
        "",
        f"Pearson's r of predicted and measured log1p CP10k, over {model.evidence.n_shapes:,} held-out shapes of "
        f"{model.evidence.area_um2:,.0f} µm² on average. Median over {len(frame):,} genes: {frame[PEARSON].median():.2f}. For "
        f"{trusted:,} of them, the whole 95 % interval is above 0.",
        "",
        "| gene | r | 95 % interval | most that counting noise allows |",
        "|---|---|---|---|",
        *(
            f"| {gene} | {row[PEARSON]:.2f} | {row[LOW]:.2f} to {row[HIGH]:.2f} | {row[CEILING]:.2f} |"
            for gene, row in best.iterrows()
        ),
    ]
    return "\n".join(lines)


def _limits(model: PixNet) -> str:
    return (
        "## Limits\n\nFor research only: not for diagnosis, nor for decisions on treatment. Held-out tissue of the training "
        "slides says little about another organ, stain or scanner. Do not claim a finer scale than was measured."
    )


def _sections(found: Any) -> str | None:
    """Return the sections of a training with their numbers of shapes."""
    if not isinstance(found, Mapping) or not found:
        return None
    return "; ".join(
        f"{name} ({', '.join(f'{n:,} {shapes}' for shapes, n in counts.items())})"
        if isinstance(counts, Mapping)
        else str(name)
        for name, counts in found.items()
    )


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))]
    )
