"""Move a prepared element into its place in a store, so that no crash leaves a broken store or half a change.

Everything is written to a work folder first, ``<store>/.pixnet/<id>/``, which readers do not see. Then, under the lock
of the store:

1. ``commit.json``, a journal that says what goes where, is written. This is the commit point: from here on the new
   element is the one that counts.
2. The store's consolidated metadata is dropped, so that the store opens at every moment of what follows.
3. The element that is replaced, if any, moves to the work folder; the new one moves to its place.
4. The entries of the new element are merged into the record on disk, and the metadata is consolidated again.
5. The journal is deleted, and then the work folder with the old element.

A failure before step 1 leaves the old element as it was. What a failure after it left undone is completed by
`pixnet._sdata.store.element_store.heal`, which every pixnet function calls before it looks at an object. Each step
looks at the files to tell whether it was done. The journal names the new element and its own entries of the record
only, so healing brings back nothing that was changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pixnet._logging import logger
from pixnet._sdata.record import Entries
from pixnet._sdata.store import metadata
from pixnet._sdata.store.workspace import JOURNAL, NEW, OLD, Workspace, read_json, work_folders, write_json


class CommittedError(OSError):
    """The new element counts and is whole, but the disk failed before all was in its place."""


def commit(
    root: Path,
    work: Workspace,
    kind: str,
    key: str,
    *,
    overwrite: bool,
    entries: Entries | None = None,
    companions: Mapping[str, str] | None = None,
    replaced: Collection[str] = (),
) -> None:
    """Move a whole new element from its work folder to its place in a store (steps 1 to 5).

    The caller holds the store's lock, reads the element before it gives the lock back, and then removes the work
    folder, with the old element in it.

    Parameters
    ----------
    root
        The store.
    work
        The work folder. Its ``new.zarr`` holds the element.
    kind, key
        The element's type, ``"images"`` say, and its name.
    overwrite
        Whether an element of that name may be replaced.
    entries
        What is recorded of it.
    companions
        Other elements in ``new.zarr`` that belong to it: their types by name. They go with it.
    replaced
        Those of them that take the place of one of the same name and type, whatever ``overwrite`` says.
    """
    finish_interrupted(root, work)
    others = dict(companions or {})
    for name in (key, *others):
        same = name in replaced and {*metadata.stored_elements(root, name)} <= {others[name]}
        check_free_on_disk(root, name, overwrite or same)
    journal = {
        "kind": kind,
        "key": key,
        "entries": dict(entries or {}),
        "consolidated": metadata.is_consolidated(root),
        "replaces": metadata.stored_elements(root, key),
        "new": metadata.stored_elements(work.path / NEW, key)[kind],
        "companions": [
            {"kind": other, "key": name, "replaces": metadata.stored_elements(root, name)}
            for name, other in others.items()
        ],
    }
    try:
        write_json(work.path / JOURNAL, journal)
        complete(root, work)
    except BaseException as error:
        if not work.committed:
            raise
        work.release()  # before the store's lock: who gets that next completes the change
        if isinstance(error, OSError):
            raise committed(root, key, error) from error
        raise


def committed(root: Path, key: str, error: OSError) -> CommittedError:
    """Return the error that says that the change counts, though the disk failed before all was done."""
    return CommittedError(
        error.errno,
        f"the new {key!r} is whole in {root} and counts, but the metadata of the store could not be brought up to date "
        f"({error.strerror}). Once that is put right (a full disk?), the next call of a pixnet function on this object, or "
        "on the store opened again, completes it",
    )


def check_free_on_disk(root: Path, key: str, overwrite: bool) -> None:
    """Refuse a name that the store holds, unless it may be replaced: the object may not know of it. The lock is held."""
    if not overwrite and metadata.stored_elements(root, key):
        raise ValueError(
            f"{key!r} exists in {root}, not in this object: another process wrote it since the store was read, or it was "
            "deleted from the object only. Read the store again, pass overwrite=True to replace it, or another key_added="
        )


def finish_interrupted(root: Path, own: Workspace | None = None) -> list[dict[str, Any]]:
    """Complete what was committed and clear what was not, of processes that are gone; the lock is held."""
    done = []
    for folder in work_folders(root):
        work = Workspace.adopt(folder) if own is None or folder != own.path else None
        if work is None:  # its process is alive, and waits for the lock or is at work in the folder
            continue
        try:
            if work.committed:
                done.append(complete(root, work))
                logger.warning("completed a change of %r in %s that was interrupted", done[-1]["key"], root)
                work.remove()
            elif not work.resumable:
                work.remove()
        finally:
            work.release()
    return done


def complete(root: Path, work: Workspace) -> dict[str, Any]:
    """Do steps 2 to 5, but for the work folder. Each looks at the files to tell whether it was done."""
    journal = read_json(work.path / JOURNAL)
    kind, key = journal["kind"], journal["key"]
    if kind is not None:
        metadata.drop_consolidated(root, work)
        for companion in journal.get("companions", ()):
            if not _move(root, work, companion):
                logger.warning("%r in %s was changed after a change of %r was interrupted", companion["key"], root, key)
        if _move(root, work, journal):
            there = metadata.stored_elements(root, key).get(kind)
            if there != journal.get("new", there):  # changed since by another hand: our entries may not hold
                journal["entries"] = {}
            metadata.list_label(root, work, key)
            if "entries" in journal:
                metadata.write_entries(root, work, key, journal["entries"])
            else:  # of version 0.0
                metadata.write_earlier_entries(root, work, key, journal["pixnet"])
        else:
            there = None
            logger.warning("%r in %s was changed after a change of it was interrupted, which is dropped", key, root)
        journal["kind"] = None if there is None else kind
    if journal["consolidated"]:
        metadata.consolidate(root)
    (work.path / JOURNAL).unlink()
    return journal


def _move(root: Path, work: Workspace, journal: dict[str, Any]) -> bool:
    """Move the old element out and the new one in; False if what is in place is neither."""
    kind, key = journal["kind"], journal["key"]
    new, old = work.path / NEW / kind / key, work.path / OLD
    if not new.exists():
        return True
    there = metadata.stored_elements(root, key)
    replaces = journal.get("replaces", there)
    if there != {other: told for other, told in replaces.items() if not (old / other / key).exists()}:
        return False
    for other in there:
        (old / other).mkdir(parents=True, exist_ok=True)
        (root / other / key).rename(old / other / key)
    metadata.make_type_group(root, work, kind)
    new.rename(root / kind / key)
    return True
