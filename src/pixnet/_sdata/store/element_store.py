"""Put elements into a SpatialData object, and into its store where it has one, in one step (see `commit`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spatialdata as sd
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.transformations import Scale
from xarray import DataArray, DataTree

from pixnet._logging import logger
from pixnet._sdata.legacy import bring_over, is_unwritten, write_brought_over
from pixnet._sdata.pixel_size import PIXNET_UM, is_pixel_size, set_pixel_size
from pixnet._sdata.record import KEY, Entries, update
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.store.commit import CommittedError, commit, committed, complete, finish_interrupted
from pixnet._sdata.store.metadata import (
    METADATA,
    drop_consolidated,
    is_consolidated,
    stamp,
    with_transformation,
    write_entries,
)
from pixnet._sdata.store.workspace import (
    JOURNAL,
    NEW,
    WORK,
    Workspace,
    read_json,
    store_lock,
    work_folder,
    work_folders,
    write_json,
)
from pixnet._sdata.target import check_key_free, local_store


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
            stamp(work.path / NEW / kind / key, uuid.uuid4().hex)
        with store_lock(root):
            commit(root, work, kind, key, overwrite=overwrite, entries=entries)
            if not isinstance(element, AnnData | GeoDataFrame):
                element = read_element(root, kind, key)
    set_element(sdata, key, element, entries)


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
    root, done = Path(path), []
    try:
        with store_lock(root):
            done = [journal for journal in finish_interrupted(root) if journal["kind"] is not None]
            elements = [read_element(root, journal["kind"], journal["key"]) for journal in done]
            companions = [
                {c["key"]: read_element(root, c["kind"], c["key"]) for c in journal.get("companions", ())}
                for journal in done
            ]
            record = read_json(root / METADATA)["attributes"].get(KEY)
    except OSError as error:
        if not done and not any((folder / JOURNAL).exists() for folder in work_folders(root)):
            return []  # a store that is only read is left as it is
        raise type(error)(
            error.errno, f"a change of {root} was interrupted and has to be completed first; {error.strerror}"
        ) from error
    for journal, element, others in zip(done, elements, companions):
        for name, other in others.items():
            set_element(sdata, name, other, None)
        if "entries" in journal:
            set_element(sdata, journal["key"], element, journal["entries"])
        else:  # of version 0.0, which the element is brought over from as the object is
            replace(sdata, journal["key"], element)
            sdata.attrs = {**sdata.attrs, KEY: record}
    return [journal["key"] for journal in done]


def write_earlier(sdata: SpatialData) -> None:
    """Bring the store of an earlier version over, before its old record goes with the next change."""
    root = local_store(sdata)
    bring_over(sdata)
    if root is not None and is_unwritten(sdata):
        with store_lock(root):
            entries = write_brought_over(sdata)
        record_entries(sdata, entries)


def record_entries(sdata: SpatialData, entries: Entries) -> None:
    """Merge entries into what is recorded of an object, and into its store; other entries on disk stay as they are."""
    root = local_store(sdata)
    if root is not None:
        with work_folder(root, "") as work, store_lock(root):
            finish_interrupted(root, work)
            write_entries(root, work, None, entries)
    update(sdata, None, entries)


def write_mpp(sdata: SpatialData, image_key: str, mpp: float) -> None:
    """Set the pixel size of an image (µm/px, full-resolution level), in its store too where the object is backed."""
    try:
        root = local_store(sdata)
    except ValueError as error:
        logger.warning("the pixel size of %r is set in this object alone: %s", image_key, error)
        root = None
    if root is not None and _is_stored(root / "images" / image_key, root):
        scale = Scale([mpp, mpp], axes=("x", "y"))
        try:
            update_element_attrs(
                sdata, "images", image_key, lambda attrs: with_transformation(attrs, PIXNET_UM, scale, is_pixel_size)
            )
        except CommittedError:
            set_pixel_size(sdata.images[image_key], mpp)
            raise
    set_pixel_size(sdata.images[image_key], mpp)


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
    CommittedError
        If the disk fails after the attributes were written.
    OSError
        If the store cannot be written; the attributes are as they were then.
    """
    root = local_store(sdata)
    if root is None:
        raise ValueError("the object is in memory; only a backed one has attributes on disk")
    element = root / kind / key
    with work_folder(root, key) as work, store_lock(root):
        finish_interrupted(root, work)
        if not (element / METADATA).exists():
            raise FileNotFoundError(f"the store {root} holds no {key!r} among its {kind}; write the element first")
        content = read_json(element / METADATA)
        content["attributes"] = update(content["attributes"])
        journal: dict[str, Any] = {
            "kind": None,
            "key": key,
            "entries": {},
            "consolidated": is_consolidated(root),
        }
        write_json(work.path / JOURNAL, journal)  # should all end here: the metadata has to be consolidated again
        drop_consolidated(root, work)
        write_json(element / METADATA, content, through=work.path)
        try:
            complete(root, work)
        except OSError as error:
            raise committed(root, key, error) from error


# elements ----------------------------------------------------------------------------------------------------------


def read_element(root: Path, kind: str, key: str) -> Any:
    """Return one element of a store as SpatialData reads it (rasters and points lazily)."""
    return getattr(sd.read_zarr(root, selection=(kind,)), kind)[key]


def _is_stored(element: Path, root: Path) -> bool:
    """Whether a store holds an element; one that another process is replacing is away for a moment."""
    if element.exists():
        return True
    with contextlib.suppress(PermissionError), store_lock(root):
        return element.exists()
    return False


def prepare(work: Workspace, key: str, element: Any) -> str:
    """Write a further element into the small store of a work folder; return its type."""
    single = work.path / "single.zarr"
    shutil.rmtree(single, ignore_errors=True)  # of an interrupted run
    kind = _write_single(single, key, element)
    place = work.path / NEW / kind / key
    if place.parent.exists():
        shutil.rmtree(place, ignore_errors=True)
        (single / kind / key).rename(place)
    else:
        (single / kind).rename(place.parent)  # with the metadata of the group
    shutil.rmtree(single)
    return kind


def _write_single(path: Path, key: str, element: Any) -> str:
    """Write one element into a small store of its own, and return its type."""
    with warnings.catch_warnings():
        # a table's region is not in the small store, on purpose
        warnings.filterwarnings("ignore", message=".*not present in the SpatialData object.*")
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")  # which anndata says of every array
        single = SpatialData.init_from_elements({key: element})
        single.write(path, consolidate_metadata=False, update_sdata_path=False)
    return next(kind for kind, _, _ in single.gen_elements())


def set_element(sdata: SpatialData, key: str, element: Any, entries: Entries | None) -> None:
    """Set an element in memory, in place of one of any type, and what is recorded of it."""
    replace(sdata, key, element)
    update(sdata, key, entries or {})


def replace(sdata: SpatialData, key: str, element: Any) -> None:
    """Set an element in memory, in place of one of any type."""
    if key in sdata:
        del sdata[key]
    sdata[key] = element
