"""Maps of objects in memory, in the scratch folder: they do not read as NaN once it is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import zarr
from xarray import DataArray, DataTree

from pixnet._core.stored import stored_array
from pixnet._sdata.rasters import levels


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
