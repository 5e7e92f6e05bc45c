"""Names of programs. They carry a fingerprint of their loadings, so that a map is never multiplied by those of another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_NAME = re.compile(r"P\d{2,}\.([0-9a-f]{8})")


def program_names(loadings: NDArray[np.float32], genes: Sequence[str]) -> list[str]:
    """Return the names of programs, ``"P01.3f9a2c41"`` and so on.

    Parameters
    ----------
    loadings
        Share of each program's transcripts that each gene has, ``(programs, genes)``.
    genes
        Names of the genes.
    """
    mark, n = fingerprint(loadings, genes), len(loadings)
    width = max(2, len(str(n)))
    return [f"P{i:0{width}d}.{mark}" for i in range(1, n + 1)]


def is_program(channel: str) -> bool:
    """Return whether a channel is named as programs are."""
    return _NAME.fullmatch(channel) is not None


def fingerprint_in(channel: str) -> str:
    """Return the fingerprint that the name of a program carries."""
    found = _NAME.fullmatch(channel)
    assert found is not None
    return found.group(1)


def fingerprint(loadings: NDArray[np.float32], genes: Sequence[str]) -> str:
    """Return a fingerprint of loadings, whatever the order of the genes."""
    order = np.argsort(np.asarray(list(genes), dtype=object), kind="stable")
    digest = hashlib.sha256("\n".join(str(genes[i]) for i in order).encode())
    digest.update(np.ascontiguousarray(np.asarray(loadings, dtype=np.float32)[:, order]).tobytes())
    return digest.hexdigest()[:8]
