"""Where a new element goes: its name, and the store that backs the object."""

from __future__ import annotations

from pathlib import Path

import zarr
from spatialdata import SpatialData


def check_target(sdata: SpatialData, key: str, kind: str, *, overwrite: bool, source: str | None = None) -> None:
    """Refuse a name under which an element cannot be set.

    Parameters
    ----------
    sdata
        The object.
    key
        Name of the new element (``key_added=``).
    kind
        Its type: ``"images"``, ``"labels"``, ``"shapes"`` or ``"tables"``.
    overwrite
        Whether an element of that name and type may be replaced.
    source
        The element that the new one is made from, which it cannot replace.

    Raises
    ------
    FileNotFoundError
        If the store of the object is gone.
    TypeError
        If the name is not a string.
    ValueError
        If the name is not allowed, taken, of an element of another type, or that of the source; or if the store is
        remote or of an old format.
    """
    check_key_free(sdata, key, overwrite)
    if key == source:
        raise ValueError(f"key_added is {key!r}, the element that the new one is made from; choose another name")
    for element_type, name, _ in sdata.gen_elements():
        if name == key and element_type != kind:
            raise ValueError(
                f"{key!r} exists as one of the object's {element_type}, not {kind}; choose another key_added="
            )
    local_store(sdata)


def check_key_free(sdata: SpatialData, key: str, overwrite: bool = False) -> None:
    """Refuse a key that is taken (names are unique across element types), unless it may be replaced."""
    if not isinstance(key, str) or not key:
        raise TypeError(f"key_added is {key!r}; a name (str) is needed")
    if not all(c.isalnum() or c in "_-." for c in key) or key.startswith("__") or key in {".", ".."}:
        raise ValueError(
            f"key_added is {key!r}; SpatialData takes letters, digits, '_', '-' and '.', not starting with '__'"
        )
    taken = [name for _, name, _ in sdata.gen_elements()]
    if key in taken and not overwrite:
        raise ValueError(f"{key!r} exists in this object; pass overwrite=True to replace it, or another key_added=")


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
