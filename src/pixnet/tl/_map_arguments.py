"""Arguments of a map that can be checked one by one."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_scale_factors(scale_factors: Any) -> None:
    """Check the factors of a pyramid."""
    try:
        factors = list(scale_factors)
    except TypeError:
        raise TypeError(f"scale_factors is {scale_factors!r}; a sequence such as (2, 2) is needed") from None
    if any(isinstance(f, bool) or not isinstance(f, int | np.integer) or f < 2 for f in factors):
        raise ValueError(
            f"scale_factors is {scale_factors!r}; whole numbers of at least 2 are needed, or () for one level"
        )


def check_map_arguments(scale_factors: Any, tile_size: Any, out_mpp: Any, resume: bool, inplace: bool) -> None:
    """Check the arguments that can be checked one by one."""
    check_scale_factors(scale_factors)
    if tile_size is not None and (isinstance(tile_size, bool) or not isinstance(tile_size, int | np.integer)):
        raise TypeError(f"tile_size is {tile_size!r}; a number of pixels (int) or None is needed")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size is {tile_size!r}; it must be positive")
    if out_mpp is not None and (isinstance(out_mpp, bool) or not isinstance(out_mpp, int | float | np.number)):
        raise TypeError(f"out_mpp is {out_mpp!r}; a pixel size in µm/px (a number) or None is needed")
    if out_mpp is not None and not (np.isfinite(out_mpp) and out_mpp > 0):
        raise ValueError(f"out_mpp is {out_mpp!r}; it must be positive")
    if resume and not inplace:
        raise ValueError("resume=True continues a stored map, and inplace=False does not store one: pass one of them")
