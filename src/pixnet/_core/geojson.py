"""GeoJSON as QuPath reads and writes it: features as arrays and back, a few at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import ijson
import numpy as np
import shapely
from numpy.typing import NDArray

BATCH = 20_000
"""Features whose geometries are built, or that are written, at once."""

RESERVED = ("geometry", "radius", "object_type", "classification", "name")
"""Columns of the result that are not measurements."""


@dataclass
class Features:
    """The features of a file.

    Attributes
    ----------
    geometries
        Polygons and multipolygons, valid; None where nothing with an area was left.
    ids
        As the file has them; None where there is none.
    columns
        ``object_type``, ``classification`` and ``name`` of each feature: text or None.
    measurements
        Numbers by name, NaN where a feature has none.
    repaired
        Which geometries had to be changed.
    kinds
        Number of features of each type that has no area, such as "Point".
    """

    geometries: NDArray[np.object_]
    ids: list[Any]
    columns: dict[str, list[str | None]]
    measurements: dict[str, NDArray[np.float64]]
    repaired: NDArray[np.bool_]
    kinds: dict[str, int]


def read_features(path: Path) -> Features:
    """Read a FeatureCollection, a list of features or one feature; gzip is told by its first bytes.

    Raises
    ------
    ValueError
        If it is not GeoJSON, is damaged, or holds a geometry that is not one.
    """
    reader = _Reader()
    done: list[NDArray] = []
    repaired: list[NDArray] = []
    try:
        for feature in _stream(path):
            try:
                reader.add(feature)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
                what = feature.get("id", "no id") if isinstance(feature, dict) else type(feature).__name__
                raise ValueError(f"feature {reader.n + 1} ({what}) is not a GeoJSON feature: {error!r}") from error
            if reader.n % BATCH == 0:
                _append(reader.geometries(), done, repaired)
        _append(reader.geometries(), done, repaired)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    measurements = {name: np.frombuffer(values, dtype=np.float64) for name, values in reader.padded().items()}
    return Features(
        np.concatenate(done),
        reader.ids,
        reader.columns,
        measurements,
        np.concatenate(repaired),
        reader.kinds,
    )


def _append(found: tuple[NDArray, NDArray], geometries: list[NDArray], repaired: list[NDArray]) -> None:
    geometries.append(found[0])
    repaired.append(found[1])


def _stream(path: Path) -> Iterator[Any]:
    """Yield the features of a file, one after the other."""
    # A list of features is QuPath's older form; a file may also be one feature.
    prefixes = ["item"] if _first(path) == b"[" else ["features.item", ""]
    found = False
    for prefix in prefixes:
        with _opened(path) as file:
            try:
                for feature in ijson.items(file, prefix, use_float=True):
                    if not prefix and feature.get("type") != "Feature":
                        if feature.get("type") == "FeatureCollection":
                            break
                        raise ValueError(f"a FeatureCollection is needed; this is of type {feature.get('type')!r}")
                    found = True
                    yield from _with_children(feature)
            except (ijson.JSONError, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                what = " ".join(str(error).split())  # ijson draws where it is, over three lines
                raise ValueError(f"not readable as GeoJSON, damaged or truncated ({what})") from error
        if found:
            return
    raise ValueError("the file contains no feature")


def _with_children(feature: Any) -> Iterator[Any]:
    """Yield an object and those that QuPath nests in it."""
    yield feature
    properties = feature.get("properties") if isinstance(feature, dict) else None
    for child in (properties or {}).get("childObjects") or []:
        yield from _with_children(child)


def _first(path: Path) -> bytes:
    """Return the first byte that is neither white space nor a byte order mark."""
    with _opened(path) as file:
        try:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"not readable as gzip, damaged or truncated ({error})") from error


def _opened(path: Path) -> IO[bytes]:
    """Open a file to read, unpacked where it is gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return io.BufferedReader(cast("Any", gzip.open(path)), 1 << 20)
    return path.open("rb")


@dataclass
class _Reader:
    """Features that were read, as flat arrays; the geometries are built a batch at a time."""

    n: int = 0
    ids: list[Any] = field(default_factory=list)
    columns: dict[str, list[str | None]] = field(
        default_factory=lambda: {"object_type": [], "classification": [], "name": []}
    )
    measurements: dict[str, array] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    broken: list[int] = field(default_factory=list)
    xy: array = field(default_factory=lambda: array("d"))
    rings: list[int] = field(default_factory=lambda: [0])  # end of each ring in points, of each polygon in rings, ...
    polygons: list[int] = field(default_factory=lambda: [0])
    features: list[int] = field(default_factory=lambda: [0])

    def add(self, feature: Mapping[str, Any]) -> None:
        geometry = feature["geometry"] or {}
        kind = geometry.get("type")
        parts = {"Polygon": 1, "MultiPolygon": 2}.get(str(kind))
        if parts is None:
            self.kinds[str(kind)] = self.kinds.get(str(kind), 0) + 1
        else:
            for polygon in [geometry["coordinates"]] if parts == 1 else geometry["coordinates"]:
                self._polygon(polygon)
        self.features.append(len(self.polygons) - 1)
        self._properties(feature.get("properties") or {})
        self.ids.append(feature.get("id"))
        self.n += 1

    def _polygon(self, rings: Sequence[Sequence[Sequence[float]]]) -> None:
        for i, ring in enumerate(rings):
            points = ring if ring and ring[0] == ring[-1] else [*ring, *ring[:1]]
            if points is not ring or len(points) < 4:
                self.broken.append(len(self.features) - 1)
            if len(points) < 4:  # no area: without its outer ring a polygon is nothing
                if i == 0:
                    return
                continue
            before = len(self.xy)
            self.xy.extend(chain.from_iterable(points))
            if len(self.xy) - before != 2 * len(points):  # with a height
                del self.xy[before:]
                self.xy.extend(chain.from_iterable((point[0], point[1]) for point in points))
            self.rings.append(len(self.xy) // 2)
        if rings:
            self.polygons.append(len(self.rings) - 1)

    def _properties(self, properties: Mapping[str, Any]) -> None:
        label = properties.get("classification")
        if isinstance(label, Mapping):
            label = label.get("name") or ": ".join(label.get("names") or []) or None
        # QuPath takes all three, and wrote object_type before 0.4
        kind = properties.get("objectType") or properties.get("object_type") or properties.get("type")
        for name, value in (("object_type", kind), ("classification", label), ("name", properties.get("name"))):
            self.columns[name].append(None if value is None else str(value))
        measured = properties.get("measurements") or {}
        if not isinstance(measured, Mapping):  # QuPath before 0.4
            measured = {one["name"]: one.get("value") for one in measured}
        for name, value in measured.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = self.measurements.get(name)
                if column is None:
                    column = self.measurements[name] = array("d")
                if len(column) < self.n:
                    column.extend([np.nan] * (self.n - len(column)))
                column.append(value)

    def padded(self) -> dict[str, array]:
        """Return the measurements, NaN after the last feature that has one."""
        for column in self.measurements.values():
            column.extend([np.nan] * (self.n - len(column)))
        return self.measurements

    def geometries(self) -> tuple[NDArray, NDArray]:
        """Return the geometries that were added since the last call, and which were repaired."""
        n = len(self.features) - 1
        xy = np.frombuffer(self.xy, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(xy).all():
            raise ValueError("it has coordinates that are not finite numbers")
        offsets = tuple(np.asarray(part, dtype=np.int64) for part in (self.rings, self.polygons, self.features))
        found = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, xy, offsets) if n else np.empty(0, object)
        single = shapely.get_num_geometries(found) == 1
        found[single] = shapely.get_geometry(found[single], 0)
        changed = np.zeros(n, dtype=bool)
        changed[self.broken] = True
        invalid = ~shapely.is_valid(found)
        found[invalid] = shapely.make_valid(found[invalid], method="structure", keep_collapsed=False)
        found[shapely.area(found) == 0] = None
        self.xy, self.broken = array("d"), []
        self.rings, self.polygons, self.features = [0], [0], [0]
        return found, changed | invalid


# writing -----------------------------------------------------------------------------------------------------------


def write_features(file: IO[str], batches: Iterable[tuple[NDArray, Sequence[Any], Sequence[Mapping[str, Any]]]]) -> int:
    """Write a FeatureCollection: geometries, ids and properties (values that are str are JSON already), batch by batch.

    Returns the number of features.
    """
    n = 0
    file.write('{"type":"FeatureCollection","features":[')
    for geometries, ids, properties in batches:
        # GeoJSON wants outer rings counterclockwise
        shapes = shapely.to_geojson(shapely.orient_polygons(geometries))
        parts = []
        for shape, identity, values in zip(shapes, ids, properties):
            held = ",".join(f"{name}:{value}" for name, value in values.items())
            parts.append(f'{{"type":"Feature","id":{encoded(identity)},"geometry":{shape},"properties":{{{held}}}}}')
        file.write(("\n" if n == 0 else ",\n") + ",\n".join(parts) if parts else "")
        n += len(parts)
    file.write("\n]}\n")
    return n


def encoded(value: Any) -> str:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False)


def measured(names: Sequence[str], values: NDArray[np.floating]) -> list[str]:
    """Return each row of numbers as a JSON object by name, without those that are not finite.

    Parameters
    ----------
    names
        Encoded names of the columns.
    values
        ``(rows, columns)``; the fewest digits that tell them apart are written.
    """
    texts = values.astype(str)
    finite = np.isfinite(values)
    whole = finite.all(axis=1)
    out = []
    for row, complete, use in zip(texts, whole, finite):
        pairs = zip(names, row) if complete else ((n, t) for n, t, u in zip(names, row, use) if u)
        out.append("{" + ",".join([f"{name}:{text}" for name, text in pairs]) + "}")
    return out
