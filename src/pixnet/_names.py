"""Names of genes and of the channel that holds all transcripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

TOTAL = "__total__"
"""Name of the channel that holds the density of all transcripts: the last one of every gene map."""


def check_genes(genes: str | Iterable[str]) -> list[str]:
    """Return one gene's name or several as a list of str, or refuse them.

    Raises
    ------
    TypeError
        If it is neither a string nor a collection of strings.
    ValueError
        If it is empty, names a gene twice, or names one ``__total__``.
    """
    if not isinstance(genes, Iterable):
        raise TypeError(f"genes is {genes!r}; a gene's name or a list of names is needed")
    genes = [genes] if isinstance(genes, str) else list(genes)
    wrong = [g for g in genes if not isinstance(g, str)]
    if wrong:
        raise TypeError(f"genes holds {wrong[0]!r}, which is not a name (str)")
    genes = [str(g) for g in genes]
    if not genes:
        raise ValueError("genes is empty; at least one gene is needed")
    twice = [g for g, n in Counter(genes).items() if n > 1]
    if twice:
        raise ValueError(f"genes names {len(twice)} gene(s) more than once: {', '.join(twice[:5])}")
    if TOTAL in genes:
        raise ValueError(f"{TOTAL!r} is not a gene: it names the density of all transcripts, which is always predicted")
    return genes


def listed(keys: Iterable[str]) -> str:
    """Return keys as the list that an error shows."""
    keys = [repr(str(key)) for key in keys]
    return ", ".join(keys) if keys else "none"
