"""Shapes of a slide as GeoJSON, with measurements, for QuPath."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from pixnet._core.geojson import BATCH, RESERVED, encoded, measured, write_features
from pixnet._logging import logger
from pixnet._names import check_genes, listed
from pixnet._whole_file import whole_file

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

MAX_MEASUREMENTS = 500
"""QuPath holds each measurement of each object in memory."""

TYPES = ("annotation", "detection", "cell", "tile")


def write_geojson(
    sdata: SpatialData,
    shapes: str,
    path: str | PathLike[str],
    *,
    table_key: str | Literal[False] | None = None,
    genes: str | Sequence[str] | None = None,
    layer: str | None = None,
    classification: str | None = None,
    object_type: Literal["annotation", "detection", "cell", "tile"] | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write shapes as GeoJSON that QuPath opens, each with its genes as measurements.

    Drop the file on the open slide in QuPath, or take ``File > Import objects from file``. Coordinates are pixels of
    the slide at full resolution. The file is written a few thousand objects at a time, and replaced in one step.

    Parameters
    ----------
    sdata
        Object that holds the shapes and the slide.
    shapes
        The shapes element. Circles are written as polygons of 32 corners.
    path
        The file; packed with gzip if its name ends in ``.gz`` (QuPath opens ``.geojson.gz``).
    table_key
        Table that annotates the shapes, whose values are written as measurements. ``None`` takes ``"{shapes}_genes"``
        if it is there; ``False`` takes none. Shapes without a row in it get no measurements.
    genes
        Gene or genes to write; ``None``: all of the table.
    layer
        Layer of the table to write in place of ``X``.
    classification
        Column of the shapes, or of the table's ``obs``, that holds the class of each shape, such as clusters. ``None``
        takes the column ``"classification"`` of the shapes if there is one.
    object_type
        What QuPath makes of the shapes. ``None`` takes the column ``"object_type"`` of the shapes if there is one, else
        ``"detection"``, which QuPath shows fast in any number.
    image_key
        The slide; ``None``: the recorded one, else the only one.
    coordinate_system
        The coordinate system that shapes and image share; ``None`` takes "global" if shared, else the first shared one.
    overwrite
        Replace the file if it exists.

    Raises
    ------
    FileExistsError
        If the file exists and ``overwrite`` is False.
    FileNotFoundError
        If its folder does not exist.
    KeyError
        If an element, gene, layer or column is missing.
    ValueError
        If the shapes are not shapes with an area, the table does not annotate them, or there would be more than 500
        measurements for each.

    See Also
    --------
    pixnet.io.read_geojson : The way back: numbers in columns of the shapes are written as measurements, too.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> genes = sdata["spots_counts"].var_names[:3]
    >>> px.io.write_geojson(sdata, "spots", "spots.geojson.gz", table_key="spots_counts", genes=genes)
    """
    from pixnet._sdata.counts import annotated_regions, not_annotated
    from pixnet._sdata.inputs import check_sdata
    from pixnet._sdata.keys import resolve_image, resolve_shapes
    from pixnet._sdata.shapes import pack_element
    from pixnet._sdata.transforms import affine_to_pixels

    check_sdata(sdata)
    (shapes,) = resolve_shapes(sdata, [shapes] if isinstance(shapes, str) else shapes)
    if shapes not in sdata.shapes:
        raise ValueError(f"{shapes!r} is a labels element; write_geojson takes shapes: {listed(sdata.shapes)}")
    element = cast("GeoDataFrame", sdata.shapes[shapes])
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    if object_type not in {None, *TYPES}:
        raise ValueError(f"object_type is {object_type!r}; valid: {listed(TYPES)}")
    matrix = affine_to_pixels(sdata, shapes, resolve_image(sdata, image_key), coordinate_system)
    pack_element(element, shapes)  # which refuses what has no area

    table, rows = None, None
    if table_key is None:
        table_key = f"{shapes}_genes" if f"{shapes}_genes" in sdata.tables else False
    if table_key is not False:
        if table_key not in sdata.tables:
            raise KeyError(f"no table {table_key!r} in this object (table_key=); it has: {listed(sdata.tables)}")
        table = sdata.tables[table_key]
        if shapes not in annotated_regions(table):
            raise ValueError(not_annotated(table, table_key, shapes))
        rows = _rows(sdata, table_key, shapes)
        if layer is not None and layer not in table.layers:
            raise KeyError(f"table {table_key!r} has no layer {layer!r}; it has: {listed(table.layers)}")
    elif genes is not None or layer is not None:
        raise ValueError(f"genes and layer belong to a table: name one with table_key= ({listed(sdata.tables)})")
    columns = _Columns(element, table, rows, table_key, genes, layer, classification, object_type)

    with whole_file(path) as partial, _opened(partial, path) as file:
        n = write_features(file, _batches(element, matrix, columns))
    logger.info("%d shapes of %r written to %s", n, shapes, path)


def _opened(partial: Path, path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(partial, "wt", encoding="utf-8", compresslevel=5))
    return partial.open("w", encoding="utf-8")


def _rows(sdata: SpatialData, table_key: str, shapes: str) -> NDArray[np.int64]:
    """Return the row of the table for each shape; -1 where it has none."""
    from pixnet._sdata.counts import match_rows

    of_row = match_rows(sdata, table_key, shapes)
    rows = np.full(len(sdata.shapes[shapes]), -1, dtype=np.int64)
    rows[of_row[of_row >= 0]] = np.flatnonzero(of_row >= 0)
    if (missing := int((rows < 0).sum())) > 0:
        logger.info("%d of %d shapes of %r have no row in table %r", missing, len(rows), shapes, table_key)
    return rows


class _Columns:
    """What is written of each shape, a batch at a time."""

    def __init__(
        self,
        element: GeoDataFrame,
        table: AnnData | None,
        rows: NDArray[np.int64] | None,
        table_key: str | Literal[False],
        genes: str | Sequence[str] | None,
        layer: str | None,
        classification: str | None,
        object_type: str | None,
    ) -> None:
        self.rows = rows
        self.matrix: Any = None
        self.positions = np.empty(0, dtype=np.int64)
        names: list[str] = []
        if table is not None:
            known = [str(name) for name in table.var_names]
            names = known if genes is None else check_genes(genes, among=known, where=f"table {table_key!r}")
            self.positions = pd.Index(known).get_indexer(names)
            self.matrix = table.X if layer is None else table.layers[layer]
        numbers = element.select_dtypes("number").drop(columns=list(RESERVED), errors="ignore")
        numbers = numbers.drop(columns=[name for name in numbers.columns if name in set(names)])
        if len(names) + numbers.shape[1] > MAX_MEASUREMENTS:
            raise ValueError(
                f"each shape would have {len(names) + numbers.shape[1]:,} measurements, more than {MAX_MEASUREMENTS}; choose "
                "genes with genes="
            )
        self.numbers = numbers.to_numpy(dtype=np.float64)
        self.number_names = [encoded(str(name)) for name in numbers.columns]
        self.gene_names = [encoded(name) for name in names]
        self.classes = self._classes(element, table, classification)
        if object_type is None and "object_type" in element.columns:
            self.types = [kind if kind in TYPES else "detection" for kind in element["object_type"]]
        else:
            self.types = [object_type or "detection"] * len(element)
        self.labels = element["name"].tolist() if "name" in element.columns else None

    def _classes(self, element: GeoDataFrame, table: AnnData | None, column: str | None) -> list[Any] | None:
        """Return the class of each shape."""
        if column is None:
            return element["classification"].tolist() if "classification" in element.columns else None
        if column in element.columns:
            return element[column].tolist()
        if table is None or column not in table.obs:
            have = [*element.columns.drop("geometry"), *(() if table is None else table.obs)]
            raise KeyError(
                f"no column {column!r} (classification=) in the shapes or the table's obs; they have: {listed(have)}"
            )
        found = table.obs[column].astype(object).to_numpy()
        assert self.rows is not None
        return [found[row] if row >= 0 else None for row in self.rows]

    def batch(self, start: int, stop: int) -> list[dict[str, str]]:
        """Return the properties of some shapes: names and values as JSON."""
        n = stop - start
        held = ["{}"] * n
        if self.gene_names or self.number_names:
            held = measured(self.number_names, self.numbers[start:stop])
            if self.rows is not None and self.gene_names:
                rows = self.rows[start:stop]
                values = np.full((n, len(self.positions)), np.nan, dtype=np.float32)
                values[rows >= 0] = _dense(self.matrix, rows[rows >= 0], self.positions)
                more = measured(self.gene_names, values)
                held = [
                    f"{{{a[1:-1]},{b[1:-1]}}}" if len(a) > 2 and len(b) > 2 else max(a, b, key=len)
                    for a, b in zip(held, more)
                ]
        out = []
        for i, text in enumerate(held, start):
            one = {'"objectType"': encoded(self.types[i])}
            if self.classes is not None and not _missing(self.classes[i]):
                one['"classification"'] = f'{{"name":{encoded(str(self.classes[i]))}}}'
            if self.labels is not None and not _missing(self.labels[i]):
                one['"name"'] = encoded(str(self.labels[i]))
            if len(text) > 2:
                one['"measurements"'] = text
            out.append(one)
        return out


def _missing(value: Any) -> bool:
    return value is None or value != value


def _dense(matrix: Any, rows: NDArray, columns: NDArray) -> NDArray[np.float32]:
    """Return some rows and columns of a table's matrix: numpy, sparse, dask or on disk."""
    part = matrix[rows]
    part = part[:, columns]
    part = part.compute() if hasattr(part, "compute") else part
    part = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
    return part.astype(np.float32)


def _batches(
    element: GeoDataFrame, matrix: NDArray[np.float64], columns: _Columns
) -> Iterator[tuple[NDArray, Sequence[Any], Sequence[dict[str, str]]]]:
    """Yield geometries in pixels of the slide, ids and properties."""
    ids = element.index.to_numpy()
    shift, linear = matrix[:2, 2], matrix[:2, :2].T
    moves = not np.array_equal(matrix, np.eye(3))
    for start in range(0, len(element), BATCH):
        stop = min(start + BATCH, len(element))
        geometries = element.geometry.values[start:stop]
        geometries = np.asarray(geometries)
        points = shapely.get_type_id(geometries) == shapely.GeometryType.POINT
        if points.any():
            geometries = geometries.copy()
            radius = element["radius"].to_numpy(dtype=float)[start:stop][points]
            geometries[points] = shapely.buffer(geometries[points], radius, quad_segs=8)
        if moves:
            geometries = shapely.transform(geometries, lambda xy: xy @ linear + shift)
        yield geometries, [i.item() if hasattr(i, "item") else i for i in ids[start:stop]], columns.batch(start, stop)
