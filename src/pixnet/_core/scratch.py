"""The folder of this process for what goes at exit: maps of objects in memory, and features of slides."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixnet._settings import settings

_scratch: Path | None = None


def scratch_root() -> Path:
    """Return this process's folder under ``settings.scratch_dir``, made when it is first asked for.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    global _scratch
    if _scratch is None or not _scratch.exists() or _scratch.parent != Path(settings.scratch_dir):
        path = Path(settings.scratch_dir) / f"pixnet-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"no folder can be made in settings.scratch_dir, {str(settings.scratch_dir)!r} ({error.strerror}): set it "
                "to a folder with room for maps (or PIXNET_SCRATCH_DIR)",
            ) from error
        _scratch = path
        atexit.register(_clear_scratch, path, os.getpid())
    return _scratch


def on_disk(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return flat copies of arrays in one memory map; its file has no name and goes with the last of them."""
    ends = np.cumsum([0, *(a.nbytes for a in arrays)])
    if not ends[-1]:
        return [a.ravel() for a in arrays]
    root = scratch_root()
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            for values in arrays:
                file.write(np.ascontiguousarray(values).data)
            file.flush()
            mapped = np.asarray(np.memmap(file, mode="r"))
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cannot write to settings.scratch_dir, {str(settings.scratch_dir)!r} ({error.strerror}): set it to a folder with "
            "room (or PIXNET_SCRATCH_DIR)",
        ) from error
    return [mapped[start:stop].view(a.dtype) for a, start, stop in zip(arrays, ends, ends[1:])]


def _clear_scratch(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not clear its parent's
        shutil.rmtree(path, ignore_errors=True)
