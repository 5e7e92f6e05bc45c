"""The genes that a model is trained on, and whether the tables can teach them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixnet._names import MOST_CHANNELS, check_genes, listed
from pixnet._sdata.measured import MeasuredTable, columns_with_counts, rank_genes

if TYPE_CHECKING:
    from pixnet.models import PixNet
    from pixnet.models._config import Quantity

Tables = Mapping[str, Mapping[str, MeasuredTable]]
"""Measured tables of each object and shapes element."""

LEAST_DETECTED = 0.01
"""Share of the training shapes in which a gene is detected, at least, to be among all genes."""

N_PROGRAMS = 64
SHAPES_PER_PROGRAM = 3
"""Training shapes at least for each program, where their number is not given."""


def choose_genes(
    genes: str | Sequence[str] | None,
    model: PixNet | None,
    tables: Tables,
    held_out: Mapping[str, Any],
    *,
    every: bool,
) -> tuple[list[str], Tables]:
    """Return the genes to predict and their counts: as given, the model's, all that are detected, or those of highest mean.

    Genes without a count in the training tables are left out, except those of a model that was trained before.
    """
    names = [name for name in tables if name not in held_out]
    partial = any(t.within_panel for found in tables.values() for t in found.values())
    if genes is not None:
        chosen = check_genes(genes)
    elif model is not None:
        chosen = model.genes
    else:
        own = [table for name in names for table in tables[name].values()]
        detected: dict[str, Any] = {"n_top": None, "exclude_prefixes": (), "min_fraction": LEAST_DETECTED}
        wanted = detected if every else {}
        if partial:
            chosen = list(dict.fromkeys(gene for table in own for gene in rank_genes([table], **wanted)))
        else:
            others = [set(table.genes) for name in held_out for table in tables[name].values()]
            chosen = [gene for gene in rank_genes(own, **wanted) if all(gene in known for known in others)]
    _check_measured(chosen, [table for name in names for table in tables[name].values()])
    tables = {
        name: {key: t.select(chosen, partial=partial) for key, t in found.items()} for name, found in tables.items()
    }
    if genes is None and model is not None and model.history:
        return chosen, tables
    columns = columns_with_counts([table for name in names for table in tables[name].values()])
    tables = {name: {key: t.keep(columns) for key, t in found.items()} for name, found in tables.items()}
    return [chosen[i] for i in columns], tables


def only_held_out_have(held_out: Mapping[str, Any], tables: Tables, genes: str | Sequence[str] | None) -> bool:
    """Return whether tables are of panels and held-out objects alone measured some of the genes (None: of any gene)."""
    if not any(t.within_panel for found in tables.values() for t in found.values()):
        return False
    here: set[str] = set()
    elsewhere: set[str] = set()
    for name, found in tables.items():
        for table in found.values():
            (here if name in held_out else elsewhere).update(table.genes)
    return bool((here if genes is None else here & set(check_genes(genes))) - elsewhere)


def number_of_programs(n_programs: int | None, n_genes: int, n_shapes: int) -> int | None:
    """Return the number of programs of a new model, None for a channel for each gene; refuse more than there are shapes."""
    if n_programs is None:
        return None if n_genes <= MOST_CHANNELS else max(2, min(N_PROGRAMS, n_shapes // SHAPES_PER_PROGRAM))
    if isinstance(n_programs, int) and n_programs > n_shapes:
        raise ValueError(
            f"n_programs is {n_programs}, and there are {n_shapes} shapes to train on: ask for fewer programs, a third of the "
            "shapes or less"
        )
    return n_programs


def panels_alone(tables: Tables) -> bool:
    """Return whether the totals of all tables are those of their panels."""
    return all(t.within_panel for found in tables.values() for t in found.values())


def check_quantity(tables: Tables, quantity: Quantity, n_programs: int | None) -> None:
    """Refuse a quantity whose total the tables do not tell, for a model that has not learned it yet."""
    if n_programs is not None:  # which add up to the total, whatever it counts
        return
    if quantity == "density" and panels_alone(tables):
        raise ValueError(
            "quantity='density' predicts the total of all transcripts, and all tables are of panels (totals=), which do not "
            "tell it; take quantity='panel_density'"
        )
    if quantity == "panel_density" and not panels_alone(tables):
        raise ValueError(
            "quantity='panel_density' is for tables that are all of panels; say which are with totals='panel'"
        )


def check_panels(tables: Tables, quantity: str | None) -> None:
    """Refuse panels of which a model names one gene only, and those of models whose values are logs."""
    for table in (table for found in tables.values() for table in found.values() if table.within_panel):
        if quantity == "log_sum":
            raise ValueError(
                "totals='panel' compares a gene with the sum over its panel, and quantity='log_sum' predicts logs, which do "
                "not add up: train on densities, or leave totals= out"
            )
        n = len(table.genes) if table.panel is None else len(table.panel)
        if n < 2:
            raise ValueError(
                f"table {table.name!r} has {n} of the genes to predict, and totals='panel' compares a gene with the sum over "
                "those: name all genes of the panel (genes=)"
            )


def _check_measured(genes: Sequence[str], tables: Sequence[MeasuredTable]) -> None:
    """Refuse genes that no training table measured, where tables are of panels."""
    missing = [gene for gene in genes if not any(gene in table.genes for table in tables)]
    if missing and len(tables) > 1:
        raise KeyError(
            f"no training table has {len(missing)} of the {len(genes)} genes: {listed(missing[:5])}; they cannot be learned"
        )
