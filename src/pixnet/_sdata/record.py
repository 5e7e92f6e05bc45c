"""Provenance of elements, in ``sdata.attrs["pixnet"]``: losing it loses no number.

SpatialData shares these attributes between an object and those made from it (``subset``, ``query``, ...), so they are
replaced when they change, never changed in place. An entry applies as long as the element that it was written for has
its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from anndata import AnnData
from spatialdata import SpatialData
from xarray import DataArray, DataTree

from pixnet._sdata.rasters import channel_names, full_resolution

Entries = Mapping[str, Mapping[str, Any]]
"""Entries of the record, by role and name: ``{"masks": {"he": {...}}}``; None removes one."""

KEY = "pixnet"
FORMAT = 2
"""Version of the record; without one, it was written before pixel sizes and quantities went to the elements."""


def recorded(sdata: SpatialData, role: str) -> dict[str, Any]:
    """Return a copy of one part of the record ("defaults", "images", "masks"); reading creates nothing."""
    record = sdata.attrs.get(KEY)
    part = record.get(role) if isinstance(record, Mapping) else None
    return dict(part) if isinstance(part, Mapping) else {}


def find_entry(sdata: SpatialData, role: str, image_key: str | None) -> dict[str, Any] | None:
    """Return what is recorded about an image, if it is about the image that has this name now."""
    found = None if image_key is None else recorded(sdata, role).get(image_key)
    return found if _applies(sdata, image_key, found) else None


def note(sdata: SpatialData, role: str, key: str, value: Any) -> None:
    """Record a value in memory, or remove it (None)."""
    update(sdata, None, {role: {key: value}})


def update(sdata: SpatialData, key: str | None, entries: Entries) -> None:
    """Merge entries into the record in memory as `merged` does; those of images that are gone go, lest they come back."""
    gone = {
        role: {name: None for name, entry in recorded(sdata, role).items() if not _applies(sdata, name, entry)}
        for role in ("images", "masks")
    }
    attrs = merged(sdata.attrs, None, gone) if any(gone.values()) else sdata.attrs
    sdata.attrs = merged(attrs, key, entries)


def merged(attrs: Mapping[str, Any], key: str | None, entries: Entries) -> dict[str, Any]:
    """Return attributes with entries added to the record (None removes one), and without those of an older ``key``.

    What an earlier version recorded goes, but for the defaults: `pixnet._sdata.legacy` has brought it over.
    """
    old = attrs.get(KEY)
    old = old if isinstance(old, Mapping) else {}
    roles = old if "format" in old else {"defaults": old.get("defaults")}
    record: dict[str, Any] = {"format": FORMAT}
    for role in {*roles, *entries} - {"format"}:
        part = roles.get(role)
        part = part if isinstance(part, Mapping) else {}  # edited by hand
        kept = {name: entry for name, entry in part.items() if role == "defaults" or name != key}
        new = {name: e for name, e in {**kept, **entries.get(role, {})}.items() if e is not None}
        if new or part:
            record[role] = new
    return {**attrs, KEY: record} if old or entries else dict(attrs)


def identity(channels: Sequence[str], shape: Sequence[int]) -> str:
    """Return what an image is recognised by: a hash of the names of its channels and of its size ``(y, x)``."""
    return hashlib.sha256(json.dumps([list(channels), [int(n) for n in shape]]).encode()).hexdigest()[:16]


def identity_of(image: DataArray | DataTree) -> str:
    """Return the identity of an image."""
    return identity(channel_names(image), full_resolution(image).shape[-2:])


def made_by_pixnet(table: AnnData) -> dict[str, Any]:
    """Return what a table says of how pixnet made it; empty for a measured one."""
    made = table.uns.get(KEY)
    return dict(made) if isinstance(made, Mapping) else {}


def is_predicted_table(table: AnnData) -> bool:
    """Whether a table was aggregated from an image by pixnet: it is not a measurement then."""
    return made_by_pixnet(table).get("kind") == "aggregate"


def _applies(sdata: SpatialData, image_key: str | None, entry: Any) -> bool:
    known = isinstance(entry, Mapping) and image_key in sdata.images
    return known and entry.get("identity") == identity_of(sdata.images[image_key])
