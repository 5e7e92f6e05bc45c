"""Zarr arrays behind lazy arrays: which they are, and whether they are still what was opened.

Zarr fills in what is missing. A store that was moved or deleted reads as zeros or NaN without a word, and one whose
array was replaced reads as the new one. So whoever reads pixels asks :func:`check_stored` first.
"""

from __future__ import annotations

from typing import Any

import dask.array as da
import zarr
from zarr.storage import FsspecStore, LocalStore

AGAIN = "read the store again with spatialdata.read_zarr"


def stored_array(array: Any) -> zarr.Array | None:
    """Return the zarr array behind a dask array that is nothing but its contents, else None."""
    if not isinstance(array, da.Array):
        return None
    layers = dict(array.dask.layers)
    # dask.array.from_zarr makes these two layers; anything done to the array since would have added another
    original = layers.pop(f"original-{array.name}", None)
    if original is None or set(layers) != {array.name}:
        return None
    found = dict(original).get(f"original-{array.name}")
    same = isinstance(found, zarr.Array) and found.shape == array.shape and found.dtype == array.dtype
    return found if same else None


def stored_arrays(array: Any) -> list[zarr.Array]:
    """Return all zarr arrays that an array (zarr, or lazy) takes its pixels from."""
    if isinstance(array, zarr.Array):
        return [array]
    if not isinstance(array, da.Array):
        return []
    layers = [layer for name, layer in array.dask.layers.items() if name.startswith("original-")]
    return [value for layer in layers for value in dict(layer).values() if isinstance(value, zarr.Array)]


def identity(array: zarr.Array) -> str | None:
    """Return what tells an array that pixnet wrote from any other, None for others' arrays."""
    entry = array.attrs.get("pixnet")
    return entry.get("id") if isinstance(entry, dict) else None


def check_stored(array: Any, what: str) -> None:
    """Refuse an array whose pixels on disk are gone or others than when it was opened.

    Raises
    ------
    FileNotFoundError
        If the store is gone.
    RuntimeError
        If another array is in its place.
    """
    for bound in stored_arrays(array):
        if not isinstance(bound.store, LocalStore | FsspecStore):
            continue
        try:
            now = zarr.open_array(bound.store, path=bound.path, mode="r", zarr_format=bound.metadata.zarr_format)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{what} is no longer at {bound.store_path}: the store was moved or deleted, or the element was, since "
                f"this object was read; {AGAIN}, from where it is now"
            ) from error
        changed = [name for name, was in _layout(bound).items() if _layout(now)[name] != was]
        if changed or identity(now) != identity(bound):
            how = ", ".join(f"{name} {_layout(bound)[name]}, now {_layout(now)[name]}" for name in changed)
            raise RuntimeError(
                f"{what} was replaced at {bound.store_path} since this object was read "
                f"({how or 'another one of the same shape'}); {AGAIN}"
            )


def _layout(array: zarr.Array) -> dict[str, str]:
    return {name: str(value) for name, value in array.metadata.to_dict().items() if name != "attributes"}
