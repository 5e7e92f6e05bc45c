"""One object, a list of them, or a dict of named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from anndata import AnnData
from spatialdata import SpatialData

from pixnet._sdata.legacy import bring_over
from pixnet._sdata.store.element_store import heal

SpatialDatas = SpatialData | Sequence[SpatialData] | Mapping[str, SpatialData]
"""One or several objects, as functions take them."""


def named_objects(sdata: Any, argument: str = "sdata") -> dict[str, SpatialData]:
    """Return objects by name: a single one and those of a list are called "0", "1", ...

    What a crash left undone in their stores is completed.

    Raises
    ------
    TypeError
        If anything in it is not a SpatialData object.
    ValueError
        If it is empty, or one object is in it twice.
    """
    if isinstance(sdata, SpatialData):
        objects = {"0": sdata}
    elif isinstance(sdata, Mapping):
        objects = {str(name): one for name, one in sdata.items()}
    elif isinstance(sdata, Sequence) and not isinstance(sdata, str):
        objects = {str(i): one for i, one in enumerate(sdata)}
    else:
        raise TypeError(
            f"{argument} is {type(sdata).__name__}; a SpatialData object, a list or a dict of them is needed{_hint(sdata)}"
        )
    if not objects:
        raise ValueError(f"{argument} is empty; at least one SpatialData object is needed")
    for name, one in objects.items():
        if not isinstance(one, SpatialData):
            raise TypeError(
                f"{argument} holds {type(one).__name__} ({name!r}); SpatialData objects are needed{_hint(one)}"
            )
    if len({id(one) for one in objects.values()}) < len(objects):
        raise ValueError(f"{argument} holds the same object twice")
    for one in objects.values():
        heal(one)
        bring_over(one)
    return objects


def check_sdata(sdata: Any) -> None:
    """Refuse anything but a SpatialData object; complete what a crash left undone, bring over earlier versions."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"sdata is {type(sdata).__name__}; a SpatialData object is needed{_hint(sdata)}")
    heal(sdata)
    bring_over(sdata)


def _hint(given: Any) -> str:
    """Return how to make a SpatialData object of what was given instead."""
    if isinstance(given, AnnData):
        return ". Make one of it and its H&E image with pixnet.io.from_anndata(adata, image)"
    if isinstance(given, str | PathLike):
        return ". Open a store with spatialdata.read_zarr(path), a slide with pixnet.io.slide(path)"
    return ""
