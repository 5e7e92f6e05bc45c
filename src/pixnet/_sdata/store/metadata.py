"""A store's metadata: what pixnet reads and changes in ``zarr.json`` files that SpatialData and zarr wrote.

SpatialData rewrites attributes in place and knows no transactions, so a few facts about the format are used here and in
``map_writer._write_empty`` only; ``tests/sdata/test_metadata.py`` fails where a library changes one of them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zarr
from spatialdata.transformations import BaseTransformation

from pixnet._sdata.legacy import with_earlier_entries
from pixnet._sdata.record import Entries, merged
from pixnet._sdata.store.workspace import NEW, Workspace, read_json, write_json

TYPES = ("images", "labels", "points", "shapes", "tables")
METADATA = "zarr.json"


def stored_elements(root: Path, key: str) -> dict[str, str]:
    """Return the types under which a store holds an element of a name, each with what tells it from others."""
    return {kind: _hash(root / kind / key) for kind in TYPES if (root / kind / key).is_dir()}


def _hash(element: Path) -> str:
    """Return a hash of an element's metadata, that of its arrays, and the sizes of other files."""
    digest = hashlib.sha256()
    for path in sorted(element.iterdir()):
        inner = path / METADATA
        if path.name == METADATA or inner.exists():
            digest.update((path if path.name == METADATA else inner).read_bytes())
        digest.update(f"{path.name} {path.stat().st_size if path.is_file() else ''}".encode())
    return digest.hexdigest()


def is_consolidated(root: Path) -> bool:
    """Whether the metadata of all elements is repeated in the root's."""
    return bool(read_json(root / METADATA).get("consolidated_metadata"))


def drop_consolidated(root: Path, work: Workspace) -> None:
    """Remove what was consolidated, so that the store opens whatever happens to its elements."""
    content = read_json(root / METADATA)
    if content.pop("consolidated_metadata", None):
        write_json(root / METADATA, content, through=work.path)


def consolidate(root: Path) -> None:
    """Repeat the metadata of all elements in the root's, and clear what a killed process left of an attempt."""
    for partial in root.glob("zarr.*.partial"):
        partial.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)  # parquet files are not zarr
        zarr.consolidate_metadata(root)


def make_type_group(root: Path, work: Workspace, kind: str) -> None:
    """Make the group of a type of elements, where the store has none, as SpatialData made it for the new element."""
    if not (root / kind / METADATA).exists():
        (root / kind).mkdir(exist_ok=True)
        os.replace(work.path / NEW / kind / METADATA, root / kind / METADATA)


def list_label(root: Path, work: Workspace, key: str) -> None:
    """Name an element in the list of labels that OME keeps in their group, or take it out: as the store is."""
    if not (root / "labels" / METADATA).exists():
        return
    content = read_json(root / "labels" / METADATA)
    ome = content["attributes"].get("ome", {})
    before = ome.get("labels", [])
    names = [name for name in before if name != key] + [key] * (root / "labels" / key).exists()
    if names != before:
        content["attributes"]["ome"] = {**ome, "labels": names}
        write_json(root / "labels" / METADATA, content, through=work.path)


def write_entries(root: Path, work: Workspace, key: str | None, entries: Entries) -> None:
    """Merge entries into the record of a store; whatever else is in its attributes stays."""
    _update_attrs(root, work, lambda attrs: merged(attrs, key, entries))


def write_earlier_entries(root: Path, work: Workspace, key: str, record: Mapping[str, Any]) -> None:
    """Merge what a record of version 0.0 says of an element into that of a store, to be brought over with it."""
    _update_attrs(root, work, lambda attrs: with_earlier_entries(attrs, key, record))


def _update_attrs(root: Path, work: Workspace, update: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = read_json(root / METADATA)
    attrs = update(content["attributes"])
    if attrs != content["attributes"]:
        write_json(root / METADATA, {**content, "attributes": attrs}, through=work.path)


def with_transformation(
    attrs: dict[str, Any], coordinate_system: str, transformation: BaseTransformation, replaces: Callable[[str], bool]
) -> dict[str, Any]:
    """Return a raster's attributes with a transformation added, in place of those to the systems that it replaces."""
    (multiscale,) = attrs["ome"]["multiscales"]
    axes = tuple(axis["name"] for axis in multiscale["axes"])
    new = transformation.to_ngff(axes, axes, output_coordinate_system_name=coordinate_system).to_dict()
    kept = [t for t in multiscale["coordinateTransformations"] if not replaces(t["output"]["name"])]
    return {
        **attrs,
        "ome": {**attrs["ome"], "multiscales": [{**multiscale, "coordinateTransformations": [*kept, new]}]},
    }


def level_paths(element: Path) -> list[str]:
    """Return the paths of a raster's levels in its group, finest first."""
    attributes = read_json(element / METADATA)["attributes"]
    return [dataset["path"] for dataset in attributes["ome"]["multiscales"][0]["datasets"]]


def channel_labels(element: Path) -> list[str] | None:
    """Return the names of a stored image's channels; None where it names none."""
    try:
        channels = read_json(element / METADATA)["attributes"]["ome"]["omero"]["channels"]
    except (KeyError, OSError):
        return None
    return [str(channel["label"]) for channel in channels]


def stamp(element: Path, identity: str) -> None:
    """Write into each level of a raster what tells it from others, and how many chunks it has."""
    for path in level_paths(element):
        array = zarr.open_array(element / path, mode="r+")
        array.attrs["pixnet"] = {"id": identity, "chunks": count_chunks(element / path)}


def count_chunks(array: Path) -> int:
    """Return how many chunks of an array are stored (zarr's own count takes minutes for a large one)."""
    return sum(name != METADATA and not name.endswith(".partial") for _, _, names in os.walk(array) for name in names)
