"""Shapes as flat arrays, in the form that the coverage kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class ShapeArrays:
    """Polygons, multipolygons, circles and ellipses as flat arrays.

    Attributes
    ----------
    coords
        ``(p, 2)`` float64, the ``x, y`` of the vertices of all rings. The last vertex of a ring repeats the first. An
        ellipse has one ring of three points: its centre, and the ends of two conjugate half-axes.
    ring_offsets
        ``(r + 1,)`` int64: ring ``k`` is ``coords[ring_offsets[k]:ring_offsets[k + 1]]``.
    ring_signs
        ``(r,)`` float64: 1 for outer rings, -1 for holes.
    shape_offsets
        ``(n + 1,)`` int64: shape ``i`` has rings ``shape_offsets[i]`` to ``shape_offsets[i + 1]``.
    is_ellipse
        ``(n,)`` bool: whether the shape is an ellipse (or a circle).
    area
        ``(n,)`` float64, in squared units of the coordinates.
    centroids
        ``(n, 2)`` float64: ``x, y``.
    bounds
        ``(n, 4)`` float64, the bounding boxes: ``x0, y0, x1, y1``; NaN for a shape without a ring.
    """

    coords: NDArray[np.float64]
    ring_offsets: NDArray[np.int64]
    ring_signs: NDArray[np.float64]
    shape_offsets: NDArray[np.int64]
    is_ellipse: NDArray[np.bool_]
    area: NDArray[np.float64]
    centroids: NDArray[np.float64]
    bounds: NDArray[np.float64]

    @classmethod
    def from_geometries(cls, geometries: ArrayLike, radius: ArrayLike | None = None) -> ShapeArrays:
        """Convert shapely geometries: polygons and multipolygons as they are, points with a radius as circles.

        Parameters
        ----------
        geometries
            Shapely geometries: Polygon, MultiPolygon, and Point where ``radius`` is given. They are taken to be valid,
            not empty and in the plane.
        radius
            Radius of each point, in the units of the coordinates: one number or one for each geometry.

        Returns
        -------
        ShapeArrays
            The shapes, in order.

        Raises
        ------
        TypeError
            If a geometry is of another type, or missing.
        ValueError
            If a point does not have a positive radius.

        Examples
        --------
        >>> import shapely
        >>> from pixnet._core.coverage import ShapeArrays
        >>> ShapeArrays.from_geometries([shapely.box(0, 0, 2, 3)]).area
        array([6.])
        """
        geometries = np.asarray(geometries, dtype=object).ravel()
        types = shapely.get_type_id(geometries)
        is_point = types == shapely.GeometryType.POINT
        is_polygon = (types == shapely.GeometryType.POLYGON) | (types == shapely.GeometryType.MULTIPOLYGON)
        if not (is_point | is_polygon).all():
            wrong = int(np.flatnonzero(~(is_point | is_polygon))[0])
            raise TypeError(
                f"geometry at position {wrong} is {geometries[wrong]!r}; valid: Polygon, MultiPolygon, Point"
            )
        if not is_point.any():
            return _from_polygons(geometries)
        radii = np.broadcast_to(np.asarray(np.nan if radius is None else radius, dtype=np.float64), len(geometries))
        if not (radii[is_point] > 0).all():
            raise ValueError("each point needs a radius above 0")
        circles = cls.from_circles(shapely.get_coordinates(geometries[is_point]), radii[is_point])
        if is_point.all():
            return circles
        order = np.concatenate([np.flatnonzero(~is_point), np.flatnonzero(is_point)])
        return cls.concatenate([_from_polygons(geometries[~is_point]), circles]).take(np.argsort(order))

    @classmethod
    def from_circles(cls, centres: ArrayLike, radius: ArrayLike) -> ShapeArrays:
        """Return circles from their centres, ``(n, 2)``, and radii, ``(n,)``."""
        centres, radius = np.asarray(centres, dtype=np.float64), np.asarray(radius, dtype=np.float64)
        n = len(centres)
        coords = np.repeat(centres[:, None], 3, axis=1)
        coords[:, 1, 0] += radius
        coords[:, 2, 1] += radius
        return cls(
            coords=coords.reshape(-1, 2),
            ring_offsets=np.arange(0, 3 * n + 1, 3, dtype=np.int64),
            ring_signs=np.ones(n),
            shape_offsets=np.arange(n + 1, dtype=np.int64),
            is_ellipse=np.ones(n, dtype=bool),
            area=np.pi * radius**2,
            centroids=centres,
            bounds=np.column_stack([centres - radius[:, None], centres + radius[:, None]]),
        )

    @classmethod
    def from_rectangles(cls, bounds: ArrayLike, owners: ArrayLike, n: int) -> ShapeArrays:
        """Return shapes that are unions of disjoint rectangles along the axes, such as the pixels of a label in runs.

        Parameters
        ----------
        bounds
            ``(m, 4)``: ``x0, y0, x1, y1`` of each rectangle.
        owners
            ``(m,)``: the shape, 0 to ``n - 1``, that each rectangle is part of, in ascending order.
        n
            Number of shapes.

        Returns
        -------
        ShapeArrays
            ``n`` shapes.
        """
        x0, y0, x1, y1 = np.asarray(bounds, dtype=np.float64).reshape(-1, 4).T
        coords = np.stack([x0, y0, x1, y0, x1, y1, x0, y1, x0, y0], axis=1).reshape(-1, 2)
        ring_offsets = np.arange(0, len(coords) + 1, 5, dtype=np.int64)
        shape_offsets = _offsets(np.bincount(owners, minlength=n))
        areas = (x1 - x0) * (y1 - y0)
        area = np.bincount(owners, areas, minlength=n).astype(np.float64)
        moments = [np.bincount(owners, areas * (low + high) / 2, minlength=n) for low, high in ((x0, x1), (y0, y1))]
        with np.errstate(invalid="ignore"):
            centroids = np.column_stack(moments) / area[:, None]
        return cls(
            coords=coords,
            ring_offsets=ring_offsets,
            ring_signs=np.ones(len(x0)),
            shape_offsets=shape_offsets,
            is_ellipse=np.zeros(n, dtype=bool),
            area=area.astype(np.float64),
            centroids=centroids,
            bounds=_bounds(coords, ring_offsets[shape_offsets], np.zeros(n, dtype=bool)),
        )

    @staticmethod
    def concatenate(parts: Sequence[ShapeArrays]) -> ShapeArrays:
        """Return the shapes of several sets as one, in order."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> NDArray:
            return np.concatenate([getattr(part, name) for part in parts])

        return ShapeArrays(
            coords=joined("coords"),
            ring_offsets=_offsets(np.concatenate([np.diff(part.ring_offsets) for part in parts])),
            ring_signs=joined("ring_signs"),
            shape_offsets=_offsets(np.concatenate([np.diff(part.shape_offsets) for part in parts])),
            is_ellipse=joined("is_ellipse"),
            area=joined("area"),
            centroids=joined("centroids"),
            bounds=joined("bounds"),
        )

    def __len__(self) -> int:
        return len(self.area)

    @property
    def is_box(self) -> NDArray[np.bool_]:
        """Which shapes are rectangles along the axes: rings of four corners as large as their bounding box."""
        return _is_box(np.diff(self.ring_offsets[self.shape_offsets]), self.area, self.bounds)

    def transform(self, matrix: ArrayLike) -> ShapeArrays:
        """Return the shapes under an affine map; circles become ellipses.

        Parameters
        ----------
        matrix
            ``(3, 3)``: ``(x, y, 1)`` to ``(x, y, 1)``.

        Returns
        -------
        ShapeArrays
            The moved shapes, in the same order.

        Raises
        ------
        ValueError
            If the matrix is not an invertible affine map of the plane.
        """
        matrix = np.asarray(matrix, dtype=np.float64)
        if matrix.shape != (3, 3) or not np.allclose(matrix[2], [0, 0, 1]) or not np.isfinite(matrix).all():
            raise ValueError(f"an affine (3, 3) matrix with last row 0, 0, 1 is needed, got {matrix.tolist()}")
        (a, b), (c, d) = matrix[:2, :2]
        determinant = a * d - b * c
        if determinant == 0:
            raise ValueError(f"the affine matrix cannot be inverted: {matrix.tolist()}")
        coords = _apply(matrix, self.coords)
        if np.count_nonzero(matrix[:2, :2]) == 2:  # boxes stay boxes
            one, other = (_apply(matrix, corner) for corner in (self.bounds[:, :2], self.bounds[:, 2:]))
            bounds = np.concatenate([np.minimum(one, other), np.maximum(one, other)], axis=1)
        else:
            bounds = _bounds(coords, self.ring_offsets[self.shape_offsets], self.is_ellipse)
        return ShapeArrays(
            coords=coords,
            ring_offsets=self.ring_offsets,
            ring_signs=self.ring_signs,
            shape_offsets=self.shape_offsets,
            is_ellipse=self.is_ellipse,
            area=self.area * abs(determinant),
            centroids=_apply(matrix, self.centroids),
            bounds=bounds,
        )

    def take(self, index: ArrayLike) -> ShapeArrays:
        """Return the shapes at the given positions (integers or a mask), in that order."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        rings, shape_offsets = _gather(self.shape_offsets, index)
        vertices, ring_offsets = _gather(self.ring_offsets, rings)
        return ShapeArrays(
            coords=self.coords[vertices],
            ring_offsets=ring_offsets,
            ring_signs=self.ring_signs[rings],
            shape_offsets=shape_offsets,
            is_ellipse=self.is_ellipse[index],
            area=self.area[index],
            centroids=self.centroids[index],
            bounds=self.bounds[index],
        )


def _from_polygons(polygons: NDArray) -> ShapeArrays:
    """Convert polygons and multipolygons."""
    n = len(polygons)
    sizes = shapely.get_num_coordinates(polygons)
    is_one_ring = (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON) & (
        shapely.get_num_interior_rings(polygons) == 0
    )
    if is_one_ring.all():  # the usual case: seven times quicker without ring objects
        coords, ring_offsets = shapely.get_coordinates(polygons), _offsets(sizes)
        shape_offsets, ring_signs = np.arange(n + 1, dtype=np.int64), np.ones(n)
    else:
        kind, coords, offsets = shapely.to_ragged_array(polygons, include_z=False)
        ring_offsets, outer = (np.asarray(part, dtype=np.int64) for part in offsets[:2])
        shape_offsets = outer[np.asarray(offsets[2])] if kind == shapely.GeometryType.MULTIPOLYGON else outer
        ring_signs = np.full(len(ring_offsets) - 1, -1.0)
        ring_signs[outer[:-1]] = 1.0
    area, bounds = shapely.area(polygons), shapely.bounds(polygons).reshape(-1, 4)
    centroids = (bounds[:, :2] + bounds[:, 2:]) / 2
    others = ~_is_box(sizes, area, bounds)  # shapely takes most of a second for the centroids of a million bins
    centroids[others] = shapely.get_coordinates(shapely.centroid(polygons[others]))
    return ShapeArrays(
        coords=coords,
        ring_offsets=ring_offsets,
        ring_signs=ring_signs,
        shape_offsets=shape_offsets,
        is_ellipse=np.zeros(n, dtype=bool),
        area=area,
        centroids=centroids,
        bounds=bounds,
    )


def _is_box(sizes: NDArray, area: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which shapes are rectangles along the axes, from their numbers of coordinates, areas and bounds."""
    x0, y0, x1, y1 = bounds.T
    return (sizes == 5) & (area > 0) & ((x1 - x0) * (y1 - y0) == area)


def _bounds(
    coords: NDArray[np.float64], starts: NDArray[np.int64], is_ellipse: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return bounding boxes; the coordinates of shape ``i`` are those from ``starts[i]`` to ``starts[i + 1]``."""
    bounds = np.full((len(starts) - 1, 4), np.nan)
    filled = np.flatnonzero(starts[1:] > starts[:-1])
    if filled.size:
        bounds[filled, :2] = np.minimum.reduceat(coords, starts[filled], axis=0)
        bounds[filled, 2:] = np.maximum.reduceat(coords, starts[filled], axis=0)
    if is_ellipse.any():
        centre, *ends = (coords[starts[:-1][is_ellipse] + k] for k in range(3))
        half = np.hypot(*(end - centre for end in ends))
        bounds[is_ellipse] = np.column_stack([centre - half, centre + half])
    return bounds


def _apply(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map points, ``(n, 2)``, by an affine matrix.

    It is done element by element: a matrix product rounds the same input differently from place to place, which would
    make the bins of one grid differ. Terms with factor zero are left out, so that they cannot round.
    """
    moved = np.empty((len(points), 2))
    for row in range(2):
        moved[:, row] = matrix[row, 2]
        for column in np.flatnonzero(matrix[row, :2]):
            moved[:, row] += matrix[row, column] * points[:, column]
    return moved


def _offsets(counts: NDArray) -> NDArray[np.int64]:
    """Return where each of consecutive groups of these sizes starts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _gather(offsets: NDArray, index: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the items of the chosen groups, and the offsets of those groups in that list."""
    counts = offsets[index + 1] - offsets[index]
    new = _offsets(counts)
    return np.arange(new[-1], dtype=np.int64) + np.repeat(offsets[index] - new[:-1], counts), new
