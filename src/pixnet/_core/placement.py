"""Where points lie on a slide, as they are placed and as they would lie mirrored, turned or shifted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def on_mask(mask: NDArray[np.bool_], to_mask: NDArray[np.float64], x: NDArray, y: NDArray) -> NDArray[np.bool_]:
    """Return whether each point (pixels of the slide) is on a mask; nothing outside it is."""
    col, row = np.floor(to_mask[:2, :2] @ np.stack([x, y]) + to_mask[:2, 2:]).astype(np.int64)
    found = (row >= 0) & (col >= 0) & (row < mask.shape[0]) & (col < mask.shape[1])
    found[found] = mask[row[found], col[found]]
    return found
