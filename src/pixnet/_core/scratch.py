"""The folder of this process for what goes at exit: maps of objects in memory, and features of slides."""

from __future__ import annotations

import atexit
import mmap
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
    """Return arrays of one dimension and type as parts of a memory map, whose file goes with the last of them."""
    if not sum(a.size for a in arrays):
        return list(arrays)
    root = scratch_root()
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            for values in arrays:
                file.write(np.ascontiguousarray(values).data)
            file.flush()
            whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), arrays[0].dtype)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"cannot write to settings.scratch_dir, {str(settings.scratch_dir)!r} ({error.strerror}): set it to a folder with "
            "room (or PIXNET_SCRATCH_DIR)",
        ) from error
    return np.split(whole, np.cumsum([a.size for a in arrays])[:-1])


def _clear_scratch(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not clear its parent's
        shutil.rmtree(path, ignore_errors=True)
