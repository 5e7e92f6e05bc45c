"""The memory of forward passes, kept by the process between one pass and the next."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Have glibc keep freed memory until the end of the block.

    A forward pass allocates and frees hundreds of megabytes over and over. By default glibc asks the kernel for each
    large array anew, and the kernel clears its pages.
    """
    libc = None
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.gnu_get_libc_version  # noqa: B018  other libraries do not have it
            libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        if libc is not None:
            with contextlib.suppress(AttributeError):
                # the values that glibc itself arrives at in a process that frees large arrays
                libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
                libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
                libc.malloc_trim(0)
