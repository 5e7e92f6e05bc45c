"""Put elements into a SpatialData object, and into its store where it has one, so that no crash leaves a broken store.

How a backed object is written to
---------------------------------
Everything is written to a work folder first, ``<store>/.pixnet/<id>/``, which readers do not see, and renamed into
place when it is whole:

1. SpatialData writes the new element into a small store of its own in the work folder.
2. ``commit.json``, a journal that says what goes where, is written; from here on the new element is the one that counts.
3. The store's consolidated metadata is dropped, so that the store opens at every moment of what follows.
4. The element that is replaced, if any, moves to the work folder; the new one moves to its place.
5. The object's attributes and the consolidated metadata are written, and the work folder goes.

A crash before step 2 leaves the old element as it was. A crash after it is mended by the next pixnet call that writes
to the store: :func:`heal` goes on from the journal. Until then the store opens, with the old element, with the new one,
or (a crash between the two renames of step 4) without either.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import spatialdata as sd
import zarr
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData

from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.keys import check_key_free
from pixnet._sdata.legacy import write_brought_over
from pixnet._sdata.store.workspace import JOURNAL, NEW, OLD, Workspace, read_json, work_folder, work_folders, write_json

TYPES = ("images", "labels", "points", "shapes", "tables")


# the three things others call --------------------------------------------------------------------------------------


def put(sdata: SpatialData, key: str, element: Any, *, overwrite: bool = False) -> None:
    """Set an element of an object and, where the object is backed, store it.

    Parameters
    ----------
    sdata
        The object. If it is backed, the element is written into its store, in one step (see the module), and the
        object's attributes with it.
    key
        Name of the element.
    element
        A labels, shapes, points, table or (small) image element. Rasters and points of a backed object are bound to
        what was stored, so that nothing lazy is computed twice; tables and shapes stay in memory.
    overwrite
        Replace an element of that name, of whatever type.

    Raises
    ------
    ValueError
        If the name is taken and ``overwrite`` is False.
    OSError
        If the store cannot be written; it is as it was then.

    Examples
    --------
    >>> from spatialdata import SpatialData
    >>> from spatialdata.models import ShapesModel
    >>> sdata = SpatialData()
    >>> put(sdata, "spots", ShapesModel.parse([[5.0, 5.0]], geometry=0, radius=2.0))
    >>> "spots" in sdata
    True
    """
    check_key_free(sdata, key, overwrite)
    root = local_store(sdata)
    if root is None:
        set_element(sdata, key, element)
        return
    heal(sdata)
    write_brought_over(sdata)
    with work_folder(root, {"key": key, "resumable": False}) as work:
        single = _single(key, element)
        kind = _type_of(single, key)
        with warnings.catch_warnings():
            # the table's region is not in the small store, on purpose
            warnings.filterwarnings("ignore", message=".*not present in the SpatialData object.*")
            single.write(work.path / NEW, consolidate_metadata=False, update_sdata_path=False)
        commit(sdata, work, kind, key)
    if isinstance(element, AnnData | GeoDataFrame):
        set_element(sdata, key, element)
    else:
        set_element(sdata, key, read_element(root, kind, key))


def forget(sdata: SpatialData, key: str) -> None:
    """Remove an element from an object, from its store and from what pixnet recorded about it.

    Parameters
    ----------
    sdata
        The object.
    key
        Name of the element.

    Raises
    ------
    KeyError
        If there is no such element.
    """
    if key not in sdata:
        raise KeyError(f"no element {key!r} in this object; it has: {listed(n for _, n, _ in sdata.gen_elements())}")
    root = local_store(sdata)
    if root is not None:
        heal(sdata)
    del sdata[key]
    recorded = sdata.attrs.get("pixnet", {})
    for role in ("images", "tables", "mpp"):
        recorded.get(role, {}).pop(key, None)
    for image in [i for i, mask in recorded.get("masks", {}).items() if mask == key]:
        del recorded["masks"][image]
    if root is not None:
        with work_folder(root, {"key": key, "resumable": False}) as work:
            commit(sdata, work, None, key)


def heal(sdata: SpatialData) -> list[str]:
    """Finish what a crash interrupted, and clear what it left behind.

    Parameters
    ----------
    sdata
        An object; one in memory has nothing to heal.

    Returns
    -------
    list of str
        The elements whose replacement was completed. They are bound in ``sdata`` too, with what pixnet recorded.
    """
    root = local_store(sdata)
    if root is None:
        return []
    healed = []
    for folder in work_folders(root):
        work = Workspace.adopt(folder)
        if work is None:  # its process is alive
            continue
        if (folder / JOURNAL).exists():
            journal = read_json(folder / JOURNAL)
            _move(root, work, journal)
            if journal["kind"] is not None:
                set_element(sdata, journal["key"], read_element(root, journal["kind"], journal["key"]))
                healed.append(journal["key"])
            sdata.attrs["pixnet"] = journal["pixnet"]
            _write_metadata(sdata, journal["consolidated"])
            logger.warning("completed the replacement of %r in %s, which a crash had interrupted", journal["key"], root)
            work.remove()
        elif work.job.get("resumable"):
            work.release()
        else:
            work.remove()
    return healed


# stores ------------------------------------------------------------------------------------------------------------


def local_store(sdata: SpatialData) -> Path | None:
    """Return the folder of the store that backs an object; None for an object in memory.

    Raises
    ------
    ValueError
        If the store is remote, or in the Zarr v2 format of early SpatialData versions.
    FileNotFoundError
        If it is gone.
    """
    if not sdata.is_backed():
        return None
    if "://" in str(sdata.path):
        raise ValueError(
            f"the store {sdata.path} is remote; pixnet writes to local stores: write the object to a local one "
            "(sdata.write), and copy that when all is done"
        )
    root = Path(sdata.path)
    if not root.exists():
        raise FileNotFoundError(f"the store {root} of this object is gone; write it again with sdata.write")
    if zarr.open_group(root, mode="r").metadata.zarr_format != 3:
        raise ValueError(
            f"the store {root} is in an old format (Zarr v2); bring it up to date by writing it to another place: "
            'spatialdata.read_zarr(path).write("new.zarr")'
        )
    return root


def read_element(root: Path, kind: str, key: str) -> Any:
    """Return one element of a store as SpatialData reads it (rasters and points lazily)."""
    return getattr(sd.read_zarr(root, selection=(kind,)), kind)[key]


def commit(sdata: SpatialData, work: Workspace, kind: str | None, key: str) -> None:
    """Move a whole new element from its work folder to its place in the store of ``sdata`` (steps 2 to 5).

    Parameters
    ----------
    sdata
        A backed object; its attributes are written along.
    work
        The work folder. Its ``new.zarr`` holds the element.
    kind
        The element's type, ``"images"`` say. None deletes elements of that name.
    key
        The element's name.
    """
    root = Path(sdata.path)
    journal = {
        "kind": kind,
        "key": key,
        "consolidated": sdata.has_consolidated_metadata(),
        "pixnet": sdata.attrs.get("pixnet", {}),
    }
    if kind is not None:
        zarr.open_group(root, mode="r+", use_consolidated=False).require_group(kind)
    write_json(work.path / JOURNAL, journal)
    _move(root, work, journal)
    _write_metadata(sdata, journal["consolidated"])
    work.remove()


def _move(root: Path, work: Workspace, journal: dict[str, Any]) -> None:
    """Do steps 3 and 4. Each move is done only if it has not been done before, so that this can be run again."""
    key, kind = journal["key"], journal["kind"]
    group = zarr.open_group(root, mode="r+", use_consolidated=False)
    group.attrs.put(dict(group.attrs))  # rewrites the metadata without what was consolidated
    new = None if kind is None else work.path / NEW / kind / key
    if new is None or new.exists():
        for other in TYPES:
            there = root / other / key
            if there.exists():
                (work.path / OLD / other).mkdir(parents=True, exist_ok=True)
                there.rename(work.path / OLD / other / key)
        if new is not None:
            new.rename(root / kind / key)
    if "labels" in group:  # OME lists a store's labels in their group
        labels = group["labels"]
        ome = dict(labels.attrs.get("ome", {}))
        names = [name for name in ome.get("labels", []) if name != key] + ([key] if kind == "labels" else [])
        if names != ome.get("labels", []):
            labels.attrs["ome"] = {**ome, "labels": names}


def _write_metadata(sdata: SpatialData, consolidated: bool) -> None:
    sdata.write_attrs()
    if consolidated:
        sdata.write_consolidated_metadata()


def _single(key: str, element: Any) -> SpatialData:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not present in the SpatialData object.*")
        return SpatialData.init_from_elements({key: element})


def _type_of(sdata: SpatialData, key: str) -> str:
    return next(kind for kind, name, _ in sdata.gen_elements() if name == key)


def set_element(sdata: SpatialData, key: str, element: Any) -> None:
    """Set an element in memory, in place of one of any type."""
    if key in sdata:
        del sdata[key]
    sdata[key] = element
