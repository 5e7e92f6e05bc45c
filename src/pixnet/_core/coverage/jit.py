"""Compilation of numeric kernels, with a cache on disk where one can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable)


def jit(function: Function) -> Function:
    """Compile a function with numba, without the GIL, when it is called first.

    numba keeps what it compiled beside the source file or in the user's cache folder (``NUMBA_CACHE_DIR`` names
    another), and raises where it can write to neither; then each process compiles for itself.
    """
    try:
        return cast(Function, numba.njit(function, cache=True, nogil=True))
    except RuntimeError:
        return cast(Function, numba.njit(function, nogil=True))
