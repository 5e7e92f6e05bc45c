"""Names of genes, and of the channel that holds all transcripts."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

TOTAL = "__total__"
"""Name of the channel that holds the density of all transcripts: the last one of every gene map."""

TOTALS = {"density": TOTAL, "log_sum": "__total_log_sum__"}
"""Name of that channel by quantity: it tells whether the genes beside it are densities or the published sums of logs."""

MOST_CHANNELS = 1000
"""Genes up to which a model and its map have a channel for each, unless told otherwise."""


def is_total(channel: str) -> bool:
    """Return whether a channel is the total of a gene map, of a known quantity or another."""
    return channel == TOTAL or (channel.startswith("__total_") and channel.endswith("__"))


def check_genes(genes: str | Iterable[str], *, among: Sequence[str] | None = None, where: str = "") -> list[str]:
    """Return one gene's name or several as a list of str, or refuse them.

    Parameters
    ----------
    genes
        A name, or a list, array or index of names.
    among
        The valid names; a total is refused unless it is one of them. None: any name will do.
    where
        Name, for the message, of the table or map that ``among`` belongs to.

    Raises
    ------
    KeyError
        If a gene is not in ``among``; the message names the nearest ones.
    TypeError
        If it is neither a string nor a collection of strings.
    ValueError
        If it is empty, names a gene twice, or names a total such as ``__total__``.
    """
    if not isinstance(genes, Iterable) or isinstance(genes, bytes):
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
    totals = [g for g in genes if is_total(g) and (among is None or g not in among)]
    if totals:
        raise ValueError(
            f"{totals[0]!r} is not a gene: it names the density of all transcripts, which always comes along"
        )
    if among is not None:
        known = set(among)
        missing = [g for g in genes if g not in known]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise KeyError(
                f"gene {missing[0]!r}{more} not in {where}{_nearest(missing[0], among)} It has {some(among)}"
            )
    return genes


def _nearest(name: str, names: Sequence[str]) -> str:
    """Return the part of a message that suggests similar names, whatever their case."""
    by_case = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), list(by_case), n=3)
    return f"; did you mean {', '.join(repr(by_case[n]) for n in near)}?" if near else "."


def listed(keys: Iterable[str]) -> str:
    """Return keys as the list that an error shows."""
    keys = [repr(str(key)) for key in keys]
    return ", ".join(keys) if keys else "none"


def some(names: Sequence[str], most: int = 12) -> str:
    """Return a list of names as an error shows it, cut where it is long."""
    shown = listed(names[:most])
    return shown if len(names) <= most else f"{len(names)} genes: {shown}, ..."
