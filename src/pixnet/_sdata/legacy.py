"""Objects of earlier versions, which recorded in ``sdata.attrs["pixnet"]`` what elements tell themselves today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialdata import SpatialData
from xarray import DataArray, DataTree

from pixnet._logging import logger
from pixnet._names import TOTAL, listed
from pixnet._sdata.pixel_size import find_mpp, set_pixel_size
from pixnet._sdata.rasters import channel_names
from pixnet._sdata.record import FORMAT, KEY, Entries, identity_of, recorded

UNWRITTEN = "brought_over"
"""Part of the record: elements that were brought over in memory and not in the store yet."""


def bring_over(sdata: SpatialData) -> None:
    """Give elements what an earlier version recorded about them, in memory; reads no pixel.

    What was done to an object before with SpatialData alone is not known: the pixel size of an image that was resampled
    and then brought over is that of the old one.
    """
    record = sdata.attrs.get(KEY)
    if not isinstance(record, Mapping) or "format" in record:
        return
    told = {key for key, mpp in recorded(sdata, "mpp").items() if _set_mpp(sdata, key, mpp)}
    images = {}
    for key, entry in recorded(sdata, "images").items():
        if not isinstance(entry, Mapping) or not _about(sdata, key, entry):
            continue
        _set_mpp(sdata, key, entry.get("mpp"))
        _set_quantity(sdata, key, entry.get("quantity", "density"))
        told.add(key)
        kept = {name: value for name, value in entry.items() if name not in {"mpp", "quantity"}}
        images[key] = {**kept, "identity": identity_of(sdata.images[key])}
    masks = {
        key: {"mask_key": mask, "identity": identity_of(sdata.images[key])}
        for key, mask in recorded(sdata, "masks").items()
        if key in sdata.images and isinstance(mask, str)
    }
    roles = {"defaults": recorded(sdata, "defaults"), "images": images, "masks": masks}
    new: dict[str, Any] = {"format": FORMAT, **{role: part for role, part in roles.items() if part}}
    if told:
        logger.info(
            "an earlier version of pixnet recorded the pixel sizes and quantities of %s: the images carry them now",
            listed(sorted(told)),
        )
        if sdata.is_backed():
            new[UNWRITTEN] = sorted(told)
    sdata.attrs = {**sdata.attrs, KEY: new}


def is_unwritten(sdata: SpatialData) -> bool:
    """Whether elements were brought over in memory and not in the store."""
    record = sdata.attrs.get(KEY)
    return isinstance(record, Mapping) and UNWRITTEN in record


def write_brought_over(sdata: SpatialData) -> Entries:
    """Write the elements that were brought over to the store of a backed object; return what is to be recorded there.

    The store's lock is held.
    """
    record = sdata.attrs[KEY]
    for key in record[UNWRITTEN]:
        if key in sdata.images and find_mpp(sdata, key) is not None:
            sdata.write_transformations(key)
            sdata.write_channel_names(key)
    sdata.attrs = {**sdata.attrs, KEY: {name: part for name, part in record.items() if name != UNWRITTEN}}
    return {role: recorded(sdata, role) for role in ("images", "masks")}


def with_earlier_entries(attrs: Mapping[str, Any], key: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes with what the record of a journal of version 0.0 says of one element; the rest stays as it is.

    Such a journal holds the whole record of its object, in which other entries may be out of date.
    """
    here = attrs.get(KEY)
    here = here if isinstance(here, Mapping) else {}
    merged = dict(here)
    for role in ("mpp", "images", "tables", "masks"):
        ours, theirs = (
            {
                name: entry
                for name, entry in dict(of.get(role) or {}).items()
                if (key in {name, entry} if role == "masks" else name == key) == about
            }
            for of, about in ((here, False), (record, True))
        )
        merged[role] = {**ours, **theirs}
    return {**attrs, KEY: merged}


def _set_mpp(sdata: SpatialData, key: str, mpp: Any) -> bool:
    """Set a pixel size, unless one was stated since; return whether there is such an image and a number for it."""
    number = isinstance(mpp, int | float) and not isinstance(mpp, bool) and 0 < mpp < float("inf")
    if not number or key not in sdata.images:
        return False
    if find_mpp(sdata, key) is None:
        set_pixel_size(sdata.images[key], float(mpp))
    return True


def _about(sdata: SpatialData, key: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry is about the gene map that has its name now: the genes tell."""
    if key not in sdata.images:
        return False
    names = channel_names(sdata.images[key])
    return names[-1:] == [TOTAL] and entry.get("genes", names[:-1]) == names[:-1]


def _set_quantity(sdata: SpatialData, key: str, quantity: str) -> None:
    """Name the total of a map after what was recorded to be in it."""
    if quantity == "density":
        return
    image = sdata.images[key]
    del sdata.images[key]
    sdata.images[key] = _renamed(image, [*channel_names(image)[:-1], f"__total_{quantity}__"])


def _renamed(image: DataArray | DataTree, channels: list[str]) -> DataArray | DataTree:
    if isinstance(image, DataArray):
        return image.assign_coords(c=channels)
    return DataTree.from_dict(
        {name: node.to_dataset().assign_coords(c=channels) for name, node in image.children.items()}
    )
