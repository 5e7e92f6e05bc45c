"""Names of genes, and of the channel that holds all transcripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

TOTAL = "__total__"
"""Name of the channel that holds the density of all transcripts: the last one of every gene map."""

TOTALS = {"density": TOTAL, "log_sum": "__total_log_sum__"}
"""Name of that channel by quantity: it tells whether the genes beside it are densities or the published sums of logs."""


def is_total(channel: str) -> bool:
    """Whether a channel is the total of a gene map, of a quantity that is known here or not."""
    return channel == TOTAL or (channel.startswith("__total_") and channel.endswith("__"))


def check_genes(genes: str | Iterable[str]) -> list[str]:
    """Return gene names as a list of str, or refuse them.

    Raises
    ------
    TypeError
        If it is not a name or several names.
    ValueError
        If it is empty, names a gene twice, or names a total such as ``__total__``.
    """
    if not isinstance(genes, Iterable):
        raise TypeError(f"genes is {genes!r}; a name or a list of names is needed")
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
    totals = [g for g in genes if is_total(g)]
    if totals:
        raise ValueError(
            f"{totals[0]!r} is not a gene: it names the density of all transcripts, which always comes along"
        )
    return genes


def listed(keys: Iterable[str]) -> str:
    """Return keys as the list that an error shows."""
    keys = [repr(str(key)) for key in keys]
    return ", ".join(keys) if keys else "none"
