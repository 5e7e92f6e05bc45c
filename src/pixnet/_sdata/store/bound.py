"""Whether an element still is what its object was read from, to be asked before its pixels are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xarray import DataArray, DataTree
from zarr.storage import LocalStore

from pixnet._core.stored import AGAIN, check_stored, identity, stored_array, stored_arrays
from pixnet._names import TOTAL, TOTALS, listed
from pixnet._sdata.rasters import channel_names, levels
from pixnet._sdata.store.metadata import channel_labels, count_chunks


def check_bound(element: DataArray | DataTree, what: str) -> None:
    """Refuse a raster (or one level of it) whose pixels on disk are gone, incomplete or another raster's.

    Parameters
    ----------
    element
        An image or labels element. One in memory passes.
    what
        What to call it: ``"image 'he'"``.

    Raises
    ------
    FileNotFoundError
        If its store was moved or deleted, or lacks chunks that pixnet wrote.
    RuntimeError
        If something else is in its place: another shape, other channels, another prediction.
    """
    for level in levels(element):
        check_stored(level.data.data, what)
        for array in stored_arrays(level.data.data):
            if not isinstance(array.store, LocalStore):
                continue
            path = Path(array.store.root) / array.path
            if identity(array) is None:
                if array is stored_array(level.data.data):
                    _check_channels(level.data, path.parent, what)
                continue
            entry = array.attrs["pixnet"]
            missing = int(entry.get("chunks", 0)) - count_chunks(path)  # type: ignore[union-attr, arg-type]
            if missing > 0:
                raise FileNotFoundError(
                    f"{what} lacks {missing} of the {entry['chunks']} chunks that were written to {path}; "  # type: ignore[index, call-overload]
                    "they would read as missing values. Copy the store again, or make the element again with overwrite=True"
                )


@contextmanager
def bound(element: DataArray | DataTree, what: str) -> Iterator[None]:
    """Check an element before and after its pixels are read (see `check_bound`)."""
    check_bound(element, what)
    yield
    check_bound(element, what)


def _check_channels(data: DataArray, group: Path, what: str) -> None:
    stored = channel_labels(group)
    if stored is None or "c" not in data.dims:
        return
    names = channel_names(data)
    if [*map(_known, stored)] != [*map(_known, names)]:
        raise RuntimeError(
            f"{what} has channels {listed(names[:5])} in this object and {listed(stored[:5])} in {group}. "
            "If you renamed them, write the names with sdata.write_channel_names; if another process replaced the "
            f"image, {AGAIN}"
        )


def _known(channel: str) -> str:
    """Return a channel's name; that of the total of a map of an earlier version is changed when it is brought over."""
    return TOTAL if channel in TOTALS.values() else channel
