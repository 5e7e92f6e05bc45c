"""The folder to which maps of objects in memory stream. It goes at exit, and does not read as NaN then."""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import dask.array as da
import zarr
from xarray import DataArray, DataTree

from pixnet._core.stored import stored_array
from pixnet._sdata.rasters import levels
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
    if _scratch is None or not _scratch.exists():
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


def _clear_scratch(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not clear its parent's
        shutil.rmtree(path, ignore_errors=True)


class ScratchStore(zarr.storage.LocalStore):
    """A store that refuses to be read when it is gone: zarr would fill in NaN."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Return a value, None where there is none."""
        value = await super().get(key, *args, **kwargs)
        if value is None and not self.root.exists():
            raise FileNotFoundError(
                f"the scratch folder of this map, {self.root}, is gone: it goes with the process that predicted the map. "
                "Predict in the process that uses the map, or predict from an object with a store (sdata.write)"
            )
        return value


def bind_scratch(element: DataArray | DataTree, root: Path) -> None:
    """Bind a map that was read from scratch to a :class:`ScratchStore`."""
    store = ScratchStore(root, read_only=True)
    for level in levels(element):
        array = stored_array(level.data.data)
        if array is None or not isinstance(array.store, zarr.storage.LocalStore):
            raise RuntimeError(f"the map in {root} was not read lazily; this version of spatialdata is not supported")
        path = (array.store.root / array.path).relative_to(root).as_posix()
        level.data.variable.data = da.from_zarr(zarr.open_array(store, path=path, mode="r"))
