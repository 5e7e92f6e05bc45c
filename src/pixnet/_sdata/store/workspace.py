"""Folders in which elements are prepared, ``<store>/.pixnet/<id>/``, and the locks of a store.

Readers do not see the folders. A folder is locked as long as its process lives, so that no other process takes it for
debris. The store's own lock is held while folders are made or taken over, and while metadata changes, for milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: one process at a time may write to a store there
    fcntl = None  # type: ignore[assignment]

WORK = ".pixnet"
JOB, JOURNAL, LOCK, NEW, OLD = "job.json", "commit.json", "lock", "new.zarr", "old"
DONE, NOVELTY = "done.txt", "novelty.npy"


class Workspace:
    """A work folder, ``<root>/.pixnet/<id>/``, locked by this process."""

    def __init__(self, path: Path, job: dict[str, Any], lock: Any) -> None:
        self.path, self.job, self._lock = path, job, lock

    @classmethod
    def create(cls, root: Path, job: dict[str, Any]) -> Workspace:
        """Make a work folder under a store, whose lock is held; ``job`` says what it is for."""
        path = root / WORK / uuid.uuid4().hex
        try:
            path.mkdir()
            work = cls(path, job, _lock(path))
            write_json(path / JOB, job)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return work

    @classmethod
    def adopt(cls, path: Path) -> Workspace | None:
        """Take over a work folder that was left behind; None if its process is alive or has just removed it.

        The store's lock is held, so that two processes which look at the folder do not take each other for its owner.
        """
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            return None
        try:
            job = read_json(path / JOB)
        except (OSError, ValueError):
            job = {}
        return cls(path, job, lock)

    @property
    def committed(self) -> bool:
        """Whether the new element counts already, though not all is done."""
        return (self.path / JOURNAL).exists()

    @property
    def resumable(self) -> bool:
        """Whether a later run can go on with what is here."""
        return bool(self.job.get("resumable")) and (self.path / DONE).exists()

    def release(self) -> None:
        """Unlock the folder and leave it."""
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder, and ``.pixnet`` when it was the last one.

        What says that the work can be resumed goes first, for a deletion may be killed, and the lock goes last.
        """
        with contextlib.suppress(OSError):
            (self.path / DONE).unlink(missing_ok=True)
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink(missing_ok=True)
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


@contextlib.contextmanager
def work_folder(root: Path, key: str) -> Iterator[Workspace]:
    """Yield a new work folder and remove it at the end, unless what it holds was committed and is not in place yet."""
    with store_lock(root):
        work = Workspace.create(root, {"key": key, "resumable": False})
    try:
        yield work
    finally:
        if work.committed:
            work.release()
        else:
            work.remove()


def work_folders(root: Path) -> list[Path]:
    """Return the work folders of a store, the oldest first."""
    found = []
    with contextlib.suppress(OSError), os.scandir(root / WORK) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # its process has just finished
                if entry.is_dir():
                    found.append((entry.stat().st_mtime, entry.name))
    return [root / WORK / name for _, name in sorted(found)]


@contextlib.contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """Hold a store's lock: one process at a time changes its metadata. It does not nest.

    Raises
    ------
    PermissionError
        If the store cannot be written to.
    """
    path = root / WORK / LOCK
    try:
        handle = _open_lock(path)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            why = "lies on a read-only file system" if error.errno == errno.EROFS else "cannot be written to"
            raise PermissionError(
                error.errno,
                f"{root} {why} ({error.strerror}): write a copy elsewhere (sdata.write), or use an object in memory",
            ) from error
        raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _unlock(handle)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _open_lock(path: Path) -> Any:
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
            handle = open(path, "a")  # noqa: SIM115  it stays open as long as the lock is held
        except (FileNotFoundError, FileExistsError):  # the last holder has just removed the folder
            if path.parent.parent.exists() and not path.parent.is_file():
                continue
            raise
        _flock(handle, wait=True)
        # the last holder removes the file: a lock on what it removed is worth nothing
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        _unlock(handle)


def _lock(path: Path) -> Any:
    handle = open(path / LOCK, "a")  # noqa: SIM115  it stays open as long as the lock is held
    try:
        _flock(handle, wait=False)
    except BlockingIOError:
        handle.close()
        raise
    return handle


def _unlock(handle: Any) -> None:
    """Give a lock back; closing alone does not where a child process that was forked meanwhile has the file open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_UN)
    handle.close()


def _flock(handle: Any, wait: bool) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write_json` wrote."""
    return json.loads(path.read_text())


def write_json(path: Path, content: dict[str, Any], through: Path | None = None) -> None:
    """Write a file that is either whole or not there, by way of a file in ``through`` (None: beside it)."""
    partial = (path.parent if through is None else through) / f"{path.name}.partial"
    try:
        with open(partial, "w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
