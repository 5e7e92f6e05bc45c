"""What pixnet has recorded about the elements of an object."""

from __future__ import annotations

from typing import Any

from spatialdata import SpatialData

_ROLES = ("mpp", "defaults", "images", "tables", "masks")


def record(sdata: SpatialData) -> dict[str, Any]:
    """``sdata.attrs["pixnet"]``, with every sub-dictionary present: what pixnet knows of this object (JSON-plain)."""
    found = sdata.attrs.setdefault("pixnet", {})
    for role in _ROLES:
        found.setdefault(role, {})
    return found


def recorded(sdata: SpatialData, role: str) -> dict[str, Any]:
    """Return one part of the record, without creating it."""
    return sdata.attrs.get("pixnet", {}).get(role, {})


def is_predicted_table(sdata: SpatialData, table_key: str) -> bool:
    """Whether a table was aggregated from an image by pixnet, so that it is no measurement."""
    entry = recorded(sdata, "tables").get(table_key)
    if entry is None:
        entry = sdata.tables[table_key].uns.get("pixnet")
    return isinstance(entry, dict) and entry.get("kind") == "aggregate"
