"""Compilation of the numeric kernels, with a cache that never stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numba

Function = TypeVar("Function", bound=Callable)


def jit(function: Function) -> Function:
    """Compile ``function`` with numba, without the GIL, kept on disk where any folder can be written.

    numba looks for a place beside the source file, then in the user's cache folder, and raises when neither can be
    written (an installation owned by root, a home that is read-only). Then a folder under ``settings.cache_dir`` is
    used, and where even that fails the function is compiled anew in every process. The temporary folder is not
    tried: whoever writes there first could have this process load their code.

    Parameters
    ----------
    function
        A function that numba compiles in nopython mode.

    Returns
    -------
    Callable
        The compiled function; it is compiled on its first call.
    """
    options = {"nogil": True, "fastmath": False}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        pass
    before = numba.config.CACHE_DIR
    try:
        from pixnet._settings import settings

        folder = Path(settings.cache_dir) / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        numba.config.CACHE_DIR = str(folder)
        return numba.njit(function, cache=True, **options)
    except (RuntimeError, OSError):
        return numba.njit(function, **options)
    finally:
        numba.config.CACHE_DIR = before
