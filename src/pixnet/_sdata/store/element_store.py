"""Put elements into a SpatialData object, and into its store where it has one, so that no crash leaves a broken store.

How a backed object is written to
---------------------------------
Everything is written to a work folder first, ``<store>/.pixnet/<id>/``, which readers do not see. Then, under the lock
of the store:

1. ``commit.json``, a journal that says what goes where, is written. This is the commit point: from here on the new
   element is the one that counts.
2. The store's consolidated metadata is dropped, so that the store opens at every moment of what follows.
3. The element that is replaced, if any, moves to the work folder; the new one moves to its place.
4. The entries of the new element are merged into the record on disk, and the metadata is consolidated again.
5. The journal is deleted, and then the work folder with the old element.

A failure before step 1 leaves the old element as it was. What a failure after it left undone is completed by
:func:`heal`, which every pixnet function calls before it looks at an object. Each step looks at the files to tell
whether it was done. The journal names the new element and its own entries of the record only, so healing brings back
nothing that was changed meanwhile.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spatialdata as sd
import zarr
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from xarray import DataArray, DataTree

from pixnet._logging import logger
from pixnet._sdata.keys import check_key_free
from pixnet._sdata.legacy import write_brought_over
from pixnet._sdata.record import Entries, merged
from pixnet._sdata.store import metadata
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.store.workspace import (
    JOURNAL,
    NEW,
    OLD,
    WORK,
    Workspace,
    read_json,
    store_lock,
    work_folder,
    work_folders,
    write_json,
)


class CommittedError(OSError):
    """The new element counts and is whole, but the disk failed before all was in its place."""


# what others call ---------------------------------------------------------------------------------------------------


def put(sdata: SpatialData, key: str, element: Any, *, overwrite: bool = False, entries: Entries | None = None) -> None:
    """Set an element of an object and, where the object is backed, store it.

    Parameters
    ----------
    sdata
        The object. If it is backed, the element is written into its store in one step.
    key
        Name of the element.
    element
        A labels, shapes, points, table or (small) image element. Rasters and points of a backed object are bound to
        what was stored, so that nothing lazy is computed twice; tables and shapes stay in memory.
    overwrite
        Replace an element of that name, of whatever type.
    entries
        What is recorded of the element, in the object and in its store, together with it.

    Raises
    ------
    CommittedError
        If the disk fails after the commit.
    OSError
        If the store cannot be written; it is as it was then.
    ValueError
        If the name is taken, in the object or in its store, and ``overwrite`` is False.

    Examples
    --------
    >>> import numpy as np
    >>> from spatialdata import SpatialData
    >>> from spatialdata.models import ShapesModel
    >>> sdata = SpatialData()
    >>> put(sdata, "spots", ShapesModel.parse(np.array([[5.0, 5.0]]), geometry=0, radius=2.0))
    >>> "spots" in sdata
    True
    """
    check_key_free(sdata, key, overwrite)
    root = local_store(sdata)
    if root is None:
        set_element(sdata, key, element, entries)
        return
    write_earlier(sdata)
    with work_folder(root, key) as work:
        kind = _write_single(work.path / NEW, key, element)
        if isinstance(element, DataArray | DataTree):
            check_bound(element, f"what {key!r} is made of")  # while it was written, its pixels were read
        if kind in {"images", "labels"}:
            metadata.stamp(work.path / NEW / kind / key, uuid.uuid4().hex)
        commit(sdata, work, kind, key, overwrite=overwrite, entries=entries)
    in_memory = isinstance(element, AnnData | GeoDataFrame)
    set_element(sdata, key, element if in_memory else read_element(root, kind, key), entries)


def heal(sdata: SpatialData) -> list[str]:
    """Complete what a crash interrupted after its commit, and clear what it left behind.

    Returns
    -------
    list of str
        The elements that were completed. They are bound in ``sdata`` too, with what is recorded of them.

    Raises
    ------
    OSError
        If something has to be completed and cannot be.
    """
    path = sdata.path
    if path is None or "://" in str(path) or not os.path.exists(os.path.join(path, WORK)):
        return []
    root = Path(path)
    try:
        with store_lock(root):
            done = _finish(root)
    except OSError as error:
        if not any((folder / JOURNAL).exists() for folder in work_folders(root)):
            return []  # a store that is only read is left as it is
        raise type(error)(
            error.errno, f"a change of {root} was interrupted and has to be completed first; {error.strerror}"
        ) from error
    for journal in done:
        if journal["kind"] is not None:
            set_element(sdata, journal["key"], read_element(root, journal["kind"], journal["key"]), journal["entries"])
    return [journal["key"] for journal in done if journal["kind"] is not None]


def write_earlier(sdata: SpatialData) -> None:
    """Bring the store of an earlier version over, before its old record goes with the next change."""
    entries = write_brought_over(sdata)
    if entries:
        record_entries(sdata, entries)


def record_entries(sdata: SpatialData, entries: Entries) -> None:
    """Merge entries into what is recorded of an object, and into its store; other entries on disk stay as they are."""
    root = local_store(sdata)
    if root is not None:
        with work_folder(root, "") as work, store_lock(root):
            _finish(root, work)
            metadata.write_entries(root, work, None, entries)
    sdata.attrs = merged(sdata.attrs, None, entries)


def update_element_attrs(
    sdata: SpatialData, kind: str, key: str, update: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Change the attributes of a stored element in one step.

    Parameters
    ----------
    sdata
        A backed object.
    kind, key
        Type and name of the element: ``"images", "he"``.
    update
        Takes the attributes that are on disk and returns the new ones. It is called under the store's lock.

    Raises
    ------
    FileNotFoundError
        If the store has no such element.
    OSError
        If the store cannot be written; the attributes are as they were then.
    """
    root = local_store(sdata)
    if root is None:
        raise ValueError("the object is in memory; only a backed one has attributes on disk")
    element = root / kind / key
    with work_folder(root, key) as work, store_lock(root):
        _finish(root, work)
        if not (element / metadata.METADATA).exists():
            raise FileNotFoundError(f"the store {root} holds no {key!r} among its {kind}; write the element first")
        content = read_json(element / metadata.METADATA)
        content["attributes"] = update(content["attributes"])
        journal: dict[str, Any] = {
            "kind": None,
            "key": key,
            "entries": {},
            "consolidated": metadata.is_consolidated(root),
        }
        write_json(work.path / JOURNAL, journal)  # should all end here: the metadata has to be consolidated again
        metadata.drop_consolidated(root, work)
        write_json(element / metadata.METADATA, content, through=work.path)
        _complete(root, work)


# the commit ---------------------------------------------------------------------------------------------------------


def commit(
    sdata: SpatialData, work: Workspace, kind: str, key: str, *, overwrite: bool, entries: Entries | None = None
) -> None:
    """Move a whole new element from its work folder to its place in the store of ``sdata`` (steps 1 to 5).

    The caller removes the work folder, with the old element in it, when this has returned.

    Parameters
    ----------
    sdata
        A backed object.
    work
        The work folder. Its ``new.zarr`` holds the element.
    kind, key
        The element's type, ``"images"`` say, and its name.
    overwrite
        Whether an element of that name may be replaced.
    entries
        What is recorded of it.
    """
    root = Path(str(sdata.path))
    with store_lock(root):
        _finish(root, work)
        check_free_on_disk(root, key, overwrite)
        journal = {
            "kind": kind,
            "key": key,
            "entries": dict(entries or {}),
            "consolidated": metadata.is_consolidated(root),
            "replaces": metadata.stored_elements(root, key),
            "new": metadata.stored_elements(work.path / NEW, key)[kind],
        }
        try:
            write_json(work.path / JOURNAL, journal)
            _complete(root, work)
        except OSError as error:
            if not work.committed:
                raise
            raise CommittedError(
                error.errno,
                f"the new {key!r} is whole in {root} and counts, but its metadata could not be brought up to date "
                f"({error.strerror}). Once that is put right (a full disk?), the next call of a pixnet function on "
                "this object, or on the store opened again, completes it",
            ) from error


def check_free_on_disk(root: Path, key: str, overwrite: bool) -> None:
    """Refuse a name that the store holds, unless it may be replaced: the object may not know of it."""
    if not overwrite and metadata.stored_elements(root, key):
        raise ValueError(
            f"{key!r} exists in {root}, not in this object: another process wrote it since the store was read, or it was "
            "deleted from the object only. Read the store again, pass overwrite=True to replace it, or another key_added="
        )


def _finish(root: Path, own: Workspace | None = None) -> list[dict[str, Any]]:
    """Complete what was committed and clear what was not, of processes that are gone; the lock is held."""
    done = []
    for folder in work_folders(root):
        work = Workspace.adopt(folder) if own is None or folder != own.path else None
        if work is None:  # its process is alive, and waits for the lock or is at work in the folder
            continue
        try:
            if work.committed:
                done.append(_complete(root, work))
                logger.warning("completed a change of %r in %s that was interrupted", done[-1]["key"], root)
                work.remove()
            elif not work.resumable:
                work.remove()
        finally:
            work.release()
    return done


def _complete(root: Path, work: Workspace) -> dict[str, Any]:
    """Do steps 2 to 5, but for the work folder. Each looks at the files for whether it was done, so that all can be run again."""
    journal = read_json(work.path / JOURNAL)
    kind, key = journal["kind"], journal["key"]
    if kind is not None:
        metadata.drop_consolidated(root, work)
        if _move(root, work, journal):
            there = metadata.stored_elements(root, key).get(kind)
            if there != journal["new"]:  # changed since by another hand: what is recorded of ours may not hold
                journal["entries"] = {}
            metadata.list_label(root, work, key)
            metadata.write_entries(root, work, key, journal["entries"])
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
    if not old.exists() and there != journal["replaces"]:
        return False
    for other in there:
        (old / other).mkdir(parents=True, exist_ok=True)
        (root / other / key).rename(old / other / key)
    metadata.make_type_group(root, work, kind)
    new.rename(root / kind / key)
    return True


# stores ------------------------------------------------------------------------------------------------------------


def local_store(sdata: SpatialData) -> Path | None:
    """Return the folder of the store that backs an object; None for an object in memory.

    Raises
    ------
    FileNotFoundError
        If it is gone.
    ValueError
        If the store is remote, or in the Zarr v2 format of early SpatialData versions.
    """
    if not sdata.is_backed():
        return None
    if "://" in str(sdata.path):
        raise ValueError(
            f"the store {sdata.path} is remote; pixnet writes to local stores: write the object to a local one "
            "(sdata.write), and copy that when all is done"
        )
    root = Path(str(sdata.path))
    try:
        group = zarr.open_group(root, mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"the store {root} of this object is gone; write it again with sdata.write") from None
    if group.metadata.zarr_format != 3:
        raise ValueError(
            f"the store {root} is in an old format (Zarr v2); bring it up to date by writing it to another place: "
            'spatialdata.read_zarr(path).write("new.zarr")'
        )
    return root


def read_element(root: Path, kind: str, key: str) -> Any:
    """Return one element of a store as SpatialData reads it (rasters and points lazily)."""
    return getattr(sd.read_zarr(root, selection=(kind,)), kind)[key]


def _write_single(path: Path, key: str, element: Any) -> str:
    """Write one element into a small store of its own, and return its type."""
    with warnings.catch_warnings():
        # a table's region is not in the small store, on purpose
        warnings.filterwarnings("ignore", message=".*not present in the SpatialData object.*")
        single = SpatialData.init_from_elements({key: element})
        single.write(path, consolidate_metadata=False, update_sdata_path=False)
    return next(kind for kind, _, _ in single.gen_elements())


def set_element(sdata: SpatialData, key: str, element: Any, entries: Entries | None) -> None:
    """Set an element in memory, in place of one of any type, and what is recorded of it."""
    if key in sdata:
        del sdata[key]
    sdata[key] = element
    sdata.attrs = merged(sdata.attrs, key, entries or {})
