"""Draw shapes and labels: as outlines, or filled by a value for each."""

from __future__ import annotations

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.path import Path
from pandas import Series

from pixnet.pl._frame import Frame, draw_image, panel_pixels, read_pixels

_MANY = 3000  # more shapes than this are one picture in a vector file


def draw_outlines(ax: Axes, frame: Frame, key: str, *, color: str, linewidth: float) -> None:
    """Draw the outlines of a shapes or labels element.

    Parameters
    ----------
    ax
        Axes in frame units.
    frame
        Frame of the figure.
    key
        The element.
    color
        A matplotlib colour.
    linewidth
        Line width in points; thinner where there are many shapes.
    """
    if key in frame.sdata.labels:
        labels = read_pixels(frame, key, panel_pixels(ax))
        segments = _boundaries(labels.values)
        placed = segments @ labels.affine[:2, :2].T + labels.affine[:2, 2]
        lines = LineCollection(
            placed,
            colors=color,
            linewidths=linewidth if len(placed) <= 20_000 else max(0.25, linewidth / 2),
            zorder=3,
            capstyle="projecting",
            rasterized=len(placed) > _MANY,
            gid=f"outlines-{key}",
        )
        ax.add_collection(lines, autolim=False)
        return
    geometries, _ = _visible(frame, key)
    if len(geometries) > 1000:
        linewidth = max(0.25, linewidth * (1000 / len(geometries)) ** 0.3)
    ax.add_collection(
        PathCollection(
            _paths(geometries),
            facecolors="none",
            edgecolors=color,
            linewidths=linewidth,
            zorder=3,
            rasterized=len(geometries) > _MANY,
            gid=f"outlines-{key}",
        ),
        autolim=False,
    )


def draw_filled(ax: Axes, frame: Frame, key: str, values: Series, cmap: Colormap, norm: Normalize) -> ScalarMappable:
    """Fill each shape by its value; shapes without one stay empty.

    Parameters
    ----------
    ax
        Axes in frame units.
    frame
        Frame of the figure.
    key
        A shapes or labels element.
    values
        A value for each instance, by the element's own index (or label).
    cmap, norm
        Colours.

    Returns
    -------
    ScalarMappable
        The drawing that a colour bar is made from.
    """
    if key in frame.sdata.labels:
        labels = read_pixels(frame, key, panel_pixels(ax))
        names, where = np.unique(labels.values, return_inverse=True)
        by_name = values.reindex(names).to_numpy(dtype=np.float64, copy=True)
        by_name[names == 0] = np.nan  # background
        picture = by_name[where].reshape(labels.values.shape)
        return draw_image(ax, picture, labels.affine, cmap=cmap, norm=norm, interpolation="nearest")
    geometries, index = _visible(frame, key)
    shown = values.reindex(index).to_numpy(dtype=np.float64)
    known = np.isfinite(shown)
    collection = PathCollection(
        _paths(geometries[known]),
        cmap=cmap,
        norm=norm,
        linewidths=0.3,  # neighbouring bins would show seams
        edgecolors="face",
        rasterized=bool(known.sum() > _MANY),
        gid=f"filled-{key}",
    )
    collection.set_array(shown[known])
    ax.add_collection(collection, autolim=False)
    return collection


def shown_box(frame: Frame, key: str, margin: float = 0.03) -> tuple[float, float, float, float]:
    """Return the box that holds a shapes element, in frame units, with a margin; for labels, all of the frame."""
    if key in frame.sdata.labels or len(frame.sdata[key]) == 0:
        return frame.box
    x0, y0, x1, y1 = shapely.total_bounds(_placed(frame, key))
    pad = margin * max(x1 - x0, y1 - y0)
    return float(x0 - pad), float(y0 - pad), float(x1 + pad), float(y1 + pad)


def _placed(frame: Frame, key: str) -> np.ndarray:
    """Return the polygons of an element in frame units; circles as polygons, so that any affine works."""
    element = frame.sdata[key]
    geometries = element.geometry.to_numpy()
    if "radius" in element.columns:
        points = shapely.get_type_id(geometries) == shapely.GeometryType.POINT
        if points.any():
            quad_segs = 8 if len(geometries) <= 20_000 else 3
            radius = element["radius"].to_numpy(dtype=np.float64)
            geometries = np.where(points, shapely.buffer(geometries, radius, quad_segs=quad_segs), geometries)
    matrix = frame.affine(key)
    return shapely.transform(geometries, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])


def _visible(frame: Frame, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the polygons that touch what is shown, and their index."""
    placed = _placed(frame, key)
    bounds = shapely.bounds(placed)
    x0, y0, x1, y1 = frame.box
    seen = (bounds[:, 2] >= x0) & (bounds[:, 0] <= x1) & (bounds[:, 3] >= y0) & (bounds[:, 1] <= y1)
    return placed[seen], frame.sdata[key].index.to_numpy()[seen]


def _paths(geometries: np.ndarray) -> list[Path]:
    """Return one compound path for each geometry: holes stay open because rings are oriented."""
    parts, owner = shapely.get_parts(shapely.orient_polygons(geometries), return_index=True)
    rings, ring_owner = shapely.get_rings(parts, return_index=True)
    points, point_owner = shapely.get_coordinates(rings, return_index=True)
    lengths = np.bincount(point_owner, minlength=len(rings))
    codes = np.full(len(points), Path.LINETO, dtype=Path.code_type)
    ends = np.cumsum(lengths)
    codes[ends - lengths] = Path.MOVETO
    codes[ends - 1] = Path.CLOSEPOLY
    rings_of_shape = np.bincount(owner[ring_owner], minlength=len(geometries)) if len(rings) else np.zeros(0, int)
    last_ring = np.cumsum(rings_of_shape)
    last_point = np.concatenate([[0], ends])
    starts = last_point[last_ring - rings_of_shape]
    stops = last_point[last_ring]
    return [Path(points[a:b], codes[a:b]) for a, b in zip(starts, stops, strict=True)]


def _boundaries(labels: np.ndarray) -> np.ndarray:
    """Return lines between pixels of different labels, ``(n, 2 ends, x and y)`` in pixels."""
    found = []
    for turned, picture in ((False, labels), (True, labels.T)):
        differs = np.zeros((picture.shape[0] + 1, picture.shape[1]), dtype=np.int8)
        differs[1:-1] = picture[:-1] != picture[1:]  # the edge of what is shown is not a boundary
        steps = np.diff(differs, axis=1, prepend=0, append=0)
        (line, start), stop = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]  # runs along each line
        ends = np.stack([np.column_stack([start, line]), np.column_stack([stop, line])], axis=1)
        found.append(ends[..., ::-1] if turned else ends)
    return np.concatenate(found).astype(np.float64)
