"""Pearson's correlation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pearson(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Return Pearson's r over the first axis: of ``(rows,)`` one value, of ``(rows, columns)`` one for each column.

    It is NaN where it is not defined: with fewer than two rows, or where ``a`` or ``b`` is constant.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2:
        return np.full(a.shape[1:], np.nan)
    # Equal values may differ from their mean by rounding: whether they are equal is asked of the values themselves.
    constant = (np.ptp(a, axis=0) == 0) | (np.ptp(b, axis=0) == 0)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(constant, np.nan, r)
