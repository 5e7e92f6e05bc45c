"""One object, a list of them, or a dict of named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from anndata import AnnData
from spatialdata import SpatialData, read_zarr

from pixnet._sdata.legacy import bring_over
from pixnet._sdata.store.element_store import heal

SpatialDatas = SpatialData | Sequence[SpatialData] | Mapping[str, SpatialData | str | PathLike[str]]
"""One or several objects, as functions take them; in a dict, also the paths of their stores."""


def named_objects(sdata: Any, argument: str = "sdata") -> dict[str, SpatialData]:
    """Return objects by name: a single one and those of a list are called "0", "1", ...

    What a crash left undone in their stores is completed.

    Raises
    ------
    FileNotFoundError
        If a store that is given by its path is not there.
    TypeError
        If anything in it is not a SpatialData object.
    ValueError
        If it is empty, or one object is in it twice.
    """
    if isinstance(sdata, SpatialData):
        objects = {"0": sdata}
    elif isinstance(sdata, Mapping):
        objects = {str(name): _opened(one, f"{argument}[{str(name)!r}]") for name, one in sdata.items()}
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
    given = list(objects.values())
    if any(is_same(one, other) for i, one in enumerate(given) for other in given[:i]):
        raise ValueError(f"{argument} holds the same object twice")
    for one in objects.values():
        heal(one)
        bring_over(one)
    return objects


def is_same(one: SpatialData, other: SpatialData) -> bool:
    """Whether two objects are one, or of one store."""
    if one.path is None or other.path is None:
        return one is other
    return Path(one.path).resolve() == Path(other.path).resolve()


def _opened(given: Any, argument: str) -> Any:
    """Return the object of a store that is given by its path."""
    if not isinstance(given, str | PathLike):
        return given
    if not Path(given).is_dir():
        raise FileNotFoundError(f"{argument} is {str(given)!r}; there is no such store")
    return read_zarr(given)


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
