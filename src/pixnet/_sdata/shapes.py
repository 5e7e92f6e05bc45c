"""Shapes and labels elements as packed geometries in the pixel frame of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from spatialdata import SpatialData
from xarray import DataArray, DataTree

from pixnet._core.coverage import ShapeArrays
from pixnet._sdata.rasters import full_resolution
from pixnet._sdata.store.bound import bound
from pixnet._sdata.transforms import affine_to_pixels

_MAX_ID = np.iinfo(np.int64).max


@dataclass(frozen=True)
class PixelShapes:
    """The shapes of one element, as an image sees them.

    Attributes
    ----------
    geometries
        In level-0 pixels of the image: pixel ``j`` covers ``[j, j + 1)``.
    ids
        The element's own index (labels: the label numbers, ascending), one for each geometry.
    """

    geometries: ShapeArrays
    ids: pd.Index


def pixel_shapes(
    sdata: SpatialData, shapes_key: str, image_key: str, coordinate_system: str | None = None
) -> ShapeArrays:
    """Return the shapes of an element in level-0 pixels of an image, one for each row, in order.

    Parameters
    ----------
    sdata
        The object that holds both.
    shapes_key
        A shapes element (polygons, multipolygons, circles) or a labels element (one shape for each label but 0).
    image_key
        The image.
    coordinate_system
        Where they meet; None: "global" if shared, else the first shared one.

    Returns
    -------
    ShapeArrays
        Packed shapes; circles become ellipses where the affine makes them so.

    Raises
    ------
    TypeError
        If the index is neither text nor integers, or a geometry is not a polygon, multipolygon or circle.
    ValueError
        If ids repeat, or a geometry is missing, empty, invalid or three-dimensional (the first few are named by id).
    """
    return read_shapes(sdata, shapes_key, image_key, coordinate_system).geometries


def read_shapes(
    sdata: SpatialData, shapes_key: str, image_key: str, coordinate_system: str | None = None
) -> PixelShapes:
    """Return the shapes of an element in level-0 pixels of an image, with their ids; see :func:`pixel_shapes`."""
    matrix = affine_to_pixels(sdata, shapes_key, image_key, coordinate_system)
    element = sdata[shapes_key]
    if isinstance(element, GeoDataFrame):
        return PixelShapes(pack_element(element, shapes_key).transform(matrix), element.index)
    check_element(sdata, shapes_key)
    with bound(element, f"labels {shapes_key!r}"):
        geometries, ids = _label_rectangles(full_resolution(element))
    return PixelShapes(geometries.transform(matrix), pd.Index(label_ids(ids, shapes_key)))


def check_element(sdata: SpatialData, key: str) -> None:
    """Refuse anything but shapes with an area in the plane and unique ids, or a plane of labels; reads no pixel.

    Raises
    ------
    TypeError, ValueError
        As :func:`pixel_shapes` does.
    """
    element = sdata[key]
    if isinstance(element, GeoDataFrame):
        pack_element(element, key)
    elif isinstance(element, DataArray | DataTree) and "c" not in full_resolution(element).dims:
        check_labels(element, key)
    else:
        raise ValueError(f"{key!r} is neither a shapes nor a labels element")


def pack_element(element: GeoDataFrame, key: str) -> ShapeArrays:
    """Pack a shapes element; refuse geometries that have no area in the plane, and ids that are not unique."""
    ids = element.index
    if not (pd.api.types.is_integer_dtype(ids.dtype) or pd.api.types.is_string_dtype(ids.dtype)):
        raise TypeError(f"the index of {key!r} is {ids.dtype}; ids of shapes must be integers or text")
    if ids.dtype.kind == "u" and len(ids) and ids.max() > _MAX_ID:
        raise ValueError(f"the index of {key!r} goes up to {ids.max()}, beyond int64; renumber the shapes from 1")
    if not ids.is_unique:
        raise ValueError(
            f"the index of {key!r} has duplicate ids: {_some(ids, ids.duplicated())}; make them unique, for instance "
            f"sdata[{key!r}].index = range(len(sdata[{key!r}]))"
        )
    geometries = element.geometry.to_numpy()
    types = shapely.get_type_id(geometries)  # -1 where there is none
    point = types == shapely.GeometryType.POINT
    polygon = (types == shapely.GeometryType.POLYGON) | (types == shapely.GeometryType.MULTIPOLYGON)

    def refuse(wrong: NDArray[np.bool_], fault: str, fix: str, error: type[Exception] = ValueError) -> None:
        if wrong.any():
            raise error(f"{key!r} has geometries that {fault}: {_some(ids, wrong)}; {fix}")

    refuse(types < 0, "are missing", "drop those rows")
    refuse(~(point | polygon), "are not polygons, multipolygons or circles", "drop or buffer them", TypeError)
    refuse(shapely.is_empty(geometries), "are empty", "drop those rows")
    flatten = f"flatten them with sdata[{key!r}].geometry = sdata[{key!r}].geometry.force_2d()"
    refuse(shapely.has_z(geometries), "have z coordinates", flatten)
    radius = None
    if point.any():
        if "radius" not in element.columns:
            raise ValueError(f"{key!r} has points without a 'radius' column; points have no area: add the radius")
        radius = element["radius"].to_numpy(dtype=float)
        refuse(point & ~((radius > 0) & np.isfinite(radius)), "have no positive radius", "correct the 'radius' column")
    with np.errstate(invalid="ignore"):  # of coordinates that are not finite
        arrays = ShapeArrays.from_geometries(geometries, radius)
        finite = np.isfinite(arrays.bounds).all(axis=1) & np.isfinite(arrays.area)
        refuse(np.asarray(~finite), "have coordinates that are not finite", "drop them")
    # Rectangles are valid; testing a million bins would take a second.
    suspects = np.flatnonzero(polygon & ~arrays.is_box)
    wrong = np.zeros(len(ids), dtype=bool)
    wrong[suspects] = ~shapely.is_valid(geometries[suspects])
    if wrong.any():
        reason = shapely.is_valid_reason(geometries[np.flatnonzero(wrong)[0]])
        fix = f"fix them with sdata[{key!r}].geometry = sdata[{key!r}].geometry.make_valid()"
        refuse(wrong, f"are invalid (the first: {reason})", fix)
    return arrays


def check_labels(element: DataArray | DataTree, key: str) -> None:
    """Refuse labels that are not a plane of integers."""
    data = full_resolution(element)
    if data.dims != ("y", "x"):
        raise ValueError(f"labels {key!r} have dimensions {data.dims}; pixnet works on 2D labels (y, x)")
    if data.dtype.kind not in "iub":
        raise TypeError(f"labels {key!r} are {data.dtype}; integers are needed")


def label_ids(labels: NDArray, key: str) -> NDArray[np.int64]:
    """Return label numbers as int64, which tables hold as ids."""
    if labels.dtype.kind == "u" and labels.size and labels.max() > _MAX_ID:
        raise ValueError(f"labels {key!r} go up to {labels.max()}, beyond int64; renumber the objects from 1")
    return labels.astype(np.int64)


def _some(ids: pd.Index, wrong: NDArray[np.bool_], n: int = 5) -> str:
    """Name the first few ids, for a message."""
    found = ids[np.asarray(wrong)]
    shown = ", ".join(repr(i) for i in found[:n].tolist())
    return shown + (f" and {len(found) - n} more" if len(found) > n else "")


def _label_rectangles(labels: DataArray) -> tuple[ShapeArrays, NDArray]:
    """Return each label but 0 as a union of rectangles: runs of equal pixels, joined down the rows where they line up."""
    data = labels.data
    heights = getattr(data, "chunks", ((labels.shape[0],),))[0]
    found = []
    top = 0
    for height in heights:
        band = np.asarray(data[top : top + height])
        edge = np.ones((band.shape[0], band.shape[1] + 1), dtype=bool)
        edge[:, 1:-1] = band[:, 1:] != band[:, :-1]
        row, start = np.nonzero(edge[:, :-1])
        stop = np.nonzero(edge[:, 1:])[1] + 1
        value = band[row, start]
        keep = value != 0
        found.append([value[keep], start[keep], stop[keep], row[keep] + top])
        top += height
    value, start, stop, row = (np.concatenate(part) for part in zip(*found))
    if not value.size:
        return ShapeArrays.from_rectangles(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 0), value
    order = np.lexsort([row, stop, start, value])
    value, start, stop, row = value[order], start[order], stop[order], row[order]
    new = np.ones(len(value), dtype=bool)
    new[1:] = (
        (value[1:] != value[:-1]) | (start[1:] != start[:-1]) | (stop[1:] != stop[:-1]) | (row[1:] != row[:-1] + 1)
    )
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(value)) - 1
    ids, owners = np.unique(value[first], return_inverse=True)
    bounds = np.column_stack([start[first], row[first], stop[first], row[last] + 1])
    return ShapeArrays.from_rectangles(bounds, owners, len(ids)), ids
