"""Folders in which elements are prepared: ``<store>/.pixnet/<id>/``, which readers do not see, or in the scratch folder.

A work folder is locked as long as its process lives, so that no other process takes it for debris.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixnet._settings import settings

try:
    import fcntl
except ImportError:  # Windows has no such locks: there one process at a time may write to a store
    fcntl = None  # type: ignore[assignment]

WORK = ".pixnet"
JOB, JOURNAL, LOCK, NEW, OLD = "job.json", "commit.json", "lock", "new.zarr", "old"


class Workspace:
    """A work folder, ``<root>/.pixnet/<id>/``, locked by this process."""

    def __init__(self, path: Path, job: dict[str, Any], lock: Any) -> None:
        self.path, self.job, self._lock = path, job, lock

    @classmethod
    def create(cls, root: Path, job: dict[str, Any]) -> Workspace:
        """Make a work folder under a store; ``job`` says what it is for."""
        path = root / WORK / uuid.uuid4().hex
        try:
            path.mkdir(parents=True)
            lock = _lock(path)
            work = cls(path, job, lock)
            write_json(path / JOB, job)
        except PermissionError as error:
            raise PermissionError(
                f"the store {root} cannot be written to ({error.strerror}): predict on a copy "
                "(sdata.write to another place) or on an object in memory"
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise PermissionError(
                    f"the store {root} lies on a file system that is read-only: predict on a copy (sdata.write to "
                    "another place) or on an object in memory"
                ) from error
            shutil.rmtree(path, ignore_errors=True)
            raise
        return work

    @classmethod
    def adopt(cls, path: Path) -> Workspace | None:
        """Take over a work folder that was left behind; None if its process is alive."""
        try:
            lock = _lock(path)
        except BlockingIOError:
            return None
        try:
            job = read_json(path / JOB)
        except (OSError, ValueError):
            job = {}
        return cls(path, job, lock)

    def release(self) -> None:
        """Unlock the folder and leave it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Delete the folder, and ``.pixnet`` when it was the last one."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


@contextlib.contextmanager
def work_folder(root: Path, job: dict[str, Any]) -> Iterator[Workspace]:
    """Yield a new work folder and remove it at the end, whatever happens: unless its journal says to go on from it."""
    work = Workspace.create(root, job)
    try:
        yield work
    finally:
        if (work.path / JOURNAL).exists():
            work.release()
        else:
            work.remove()


def work_folders(root: Path) -> list[Path]:
    """Return the work folders of a store, the oldest first."""
    try:
        found = [path for path in (root / WORK).iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def _lock(path: Path) -> Any:
    handle = open(path / LOCK, "a")  # noqa: SIM115  it stays open as long as the lock is held
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise
        except OSError:  # a file system without locks
            pass
    return handle


_scratch: Path | None = None


def scratch_root() -> Path:
    """Return this process's folder under ``settings.scratch_dir``, which goes at exit: where objects in memory stream to."""
    global _scratch
    if _scratch is None or not _scratch.exists():
        _scratch = Path(settings.scratch_dir) / f"pixnet-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        _scratch.mkdir(parents=True)
        atexit.register(_clear_scratch, _scratch, os.getpid())
    return _scratch


def _clear_scratch(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not clear its parent's
        shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write_json` wrote."""
    return json.loads(path.read_text())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
