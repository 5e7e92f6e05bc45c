"""Find genes in a table, and say where they may be if it lacks them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from pixnet._names import listed

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{9,}(\.\d+)?")
_VERSION = re.compile(r"\.\d+$")

# Genes of the mitochondrial chromosome (13 of proteins, 2 of ribosomal RNA) by Ensembl id: human, then mouse.
_MITOCHONDRIAL = {
    "ENSG00000" + n
    for n in (
        [
            "198888",
            "198763",
            "198804",
            "198712",
            "228253",
            "198899",
            "198938",
            "198840",
            "212907",
            "198886",
            "198786",
            "198695",
            "198727",
            "211459",
            "210082",
        ]
    )
} | {
    "ENSMUSG000000" + n
    for n in [
        "64341",
        "64345",
        "64351",
        "64354",
        "64356",
        "64357",
        "64358",
        "64360",
        "65947",
        "64363",
        "64367",
        "64368",
        "64370",
        "64337",
        "64339",
    ]
}


def gene_positions(table: AnnData, table_key: str, genes: Sequence[str]) -> np.ndarray:
    """Return the column of each gene.

    Raises
    ------
    KeyError
        If genes are missing; the first few are named, and the column of ``var`` that holds them where there is one.
    ValueError
        If the table's names repeat.
    """
    check_names_unique(table, table_key)
    positions = table.var_names.get_indexer(list(genes))
    if (positions < 0).any():
        missing = [g for g, p in zip(genes, positions) if p < 0]
        raise KeyError(
            f"table {table_key!r} lacks {len(missing)} of the {len(positions)} genes: {listed(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; its names look like {listed(table.var_names[:3])}"
            f"{other_names(table, table_key, list(genes))}"
        )
    return positions


def beginning_with(table: AnnData, prefixes: Sequence[str]) -> set[str]:
    """Return the genes of a table that begin with a prefix, by name or by a column of var that holds symbols.

    "MT-" and "mt-" mean the mitochondrial genes, which are known by Ensembl id too.
    """
    prefixes = tuple(prefixes)
    if not prefixes:
        return set()
    names = table.var_names.astype(str)
    found = names.str.startswith(prefixes)
    for column in table.var.columns:
        values = table.var[column]
        if isinstance(values.dtype, pd.CategoricalDtype) or values.dtype.kind in "OSUT":
            found |= values.astype(str).str.startswith(prefixes).to_numpy()
    if {"MT-", "mt-"} & set(prefixes):
        found |= names.str.replace(_VERSION, "", regex=True).isin(_MITOCHONDRIAL)
    return set(names[found])


def check_names_unique(table: AnnData, table_key: str) -> None:
    """Refuse a table in which two columns have one name."""
    if not table.var_names.is_unique:
        twice = table.var_names[table.var_names.duplicated()].unique()
        raise ValueError(
            f"table {table_key!r} names {len(twice)} gene(s) more than once: {listed(twice[:5])}{', ...' if len(twice) > 5 else ''}; "
            "sum or drop the repeated columns, or keep them apart with table.var_names_make_unique()"
        )


def other_names(table: AnnData, table_key: str, genes: Sequence[str]) -> str:
    """Say where a table has more of the genes than in its names: in a column of var, or written another way.

    Returns
    -------
    str
        The end of a message, from its semicolon on; empty where nothing is known.
    """
    wanted = pd.Index(genes).unique()
    found = int(wanted.isin(table.var_names).sum())
    best, column = found, None
    for name in table.var.columns:
        values = table.var[name]
        if not (isinstance(values.dtype, pd.CategoricalDtype) or values.dtype.kind in "OSUT"):
            continue
        n = int(wanted.isin(values.dropna().astype(str)).sum())
        if n > best:
            best, column = n, name
    if column is not None:
        have, want = _kind(table.var_names), _kind(wanted)
        kinds = f" names are {have}, the genes asked for are {want};" if have != want else ""
        return (
            f".{' Its' + kinds if kinds else ''} var[{column!r}] holds {best} of them: use it with "
            f"table.var_names = table.var[{column!r}].astype(str), table being sdata.tables[{table_key!r}]"
        )
    for what, change in (
        ("without the version after the dot", lambda names: names.str.replace(_VERSION, "", regex=True)),
        ("in another case (of another species?)", lambda names: names.str.upper()),
    ):
        n = int(change(wanted).isin(change(table.var_names.astype(str))).sum())
        if n > max(found, len(wanted) // 2):
            return f"; {n} of them would be found {what}"
    have, want = _kind(table.var_names), _kind(wanted)
    if have != want:
        return (
            f". Its names are {have}, the genes asked for are {want}, and no column of its var holds those: "
            "add one and set table.var_names to it"
        )
    return ""


def _kind(names: pd.Index) -> str:
    looked = [str(name) for name in names[:200]]
    ids = sum(_ENSEMBL.fullmatch(name) is not None for name in looked)
    return "Ensembl ids" if looked and ids > len(looked) / 2 else "symbols"
