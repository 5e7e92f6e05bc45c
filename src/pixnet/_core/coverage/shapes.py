"""ShapeArrays as flat arrays, in the form that the coverage kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

POLYGON, DISC, RECTANGLE = 0, 1, 2
"""Kinds of shape: rings, an ellipse given by its matrix, one ring along the axes (which has a faster path)."""


@dataclass(frozen=True, eq=False)
class ShapeArrays:
    """Shapes packed into flat arrays: polygons as rings, circles and ellipses as centre and matrix.

    Attributes
    ----------
    coords
        ``(p, 2)`` float64, the ``x, y`` of all rings' vertices; the first vertex is not repeated at a ring's end.
    ring_offsets
        ``(r + 1,)`` int64: ring ``k`` is ``coords[ring_offsets[k]:ring_offsets[k + 1]]``.
    ring_signs
        ``(r,)`` float64, +1 or -1: what makes the signed area of outer rings positive and of holes negative.
    shape_offsets
        ``(n + 1,)`` int64: shape ``i`` has rings ``shape_offsets[i]`` to ``shape_offsets[i + 1]``.
    discs
        ``(n, 6)`` float64, or ``(0, 6)`` where no shape is a disc: ``x, y, a, b, c, d`` of the ellipse
        ``(x + a cos t + b sin t, y + c cos t + d sin t)``.
    kinds
        ``(n,)`` uint8: POLYGON, DISC or RECTANGLE.
    """

    coords: NDArray[np.float64]
    ring_offsets: NDArray[np.int64]
    ring_signs: NDArray[np.float64]
    shape_offsets: NDArray[np.int64]
    discs: NDArray[np.float64]
    kinds: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def _ring_areas(self) -> NDArray[np.float64]:
        """Signed area of every ring, holes negative."""
        return self.ring_signs * _shoelace(self.coords, self.ring_offsets)

    @cached_property
    def _corners(self) -> tuple[NDArray, NDArray] | None:
        """Two opposite corners, each ``(n, 2)``, where every shape is a rectangle: all that is to be known of grids."""
        if not len(self) or not (self.kinds == RECTANGLE).all():
            return None
        quads = self.coords.reshape(-1, 4, 2)
        return quads[:, 0], quads[:, 2]

    @cached_property
    def area(self) -> NDArray[np.float64]:
        """Area of every shape, ``(n,)``, in squared units of the coordinates."""
        if self._corners is not None:
            a, b = self._corners
            return np.abs((b[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]))
        area = _sum_groups(self._ring_areas, self.shape_offsets)
        disc = self.kinds == DISC
        if disc.any():
            _, _, a, b, c, d = self.discs[disc].T
            area[disc] = np.pi * np.abs(a * d - b * c)
        return area

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """Bounding boxes, ``(n, 4)``: ``x0, y0, x1, y1``."""
        if self._corners is not None:
            return np.column_stack([np.minimum(*self._corners), np.maximum(*self._corners)])
        bounds = np.full((len(self), 4), np.nan)
        starts = self.ring_offsets[self.shape_offsets]
        filled = np.flatnonzero(starts[1:] > starts[:-1])
        if filled.size:
            bounds[filled, :2] = np.minimum.reduceat(self.coords, starts[filled], axis=0)
            bounds[filled, 2:] = np.maximum.reduceat(self.coords, starts[filled], axis=0)
        disc = self.kinds == DISC
        if disc.any():
            x, y, a, b, c, d = self.discs[disc].T
            half_x, half_y = np.hypot(a, b), np.hypot(c, d)
            bounds[disc] = np.column_stack([x - half_x, y - half_y, x + half_x, y + half_y])
        return bounds

    @cached_property
    def centroids(self) -> NDArray[np.float64]:
        """Centroids, ``(n, 2)``: ``x, y``."""
        if self._corners is not None:
            a, b = self._corners
            return a + (b - a) / 2
        origin = self.coords.mean(axis=0) if len(self.coords) else np.zeros(2)
        moments = self.ring_signs[:, None] * _first_moments(self.coords - origin, self.ring_offsets)
        with np.errstate(invalid="ignore", divide="ignore"):
            centroids = _sum_groups(moments, self.shape_offsets) / self.area[:, None] + origin
        disc = self.kinds == DISC
        if disc.any():
            centroids[disc] = self.discs[disc, :2]
        return centroids

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
            If the matrix is no invertible affine map of the plane.
        """
        matrix = np.asarray(matrix, dtype=np.float64)
        if matrix.shape != (3, 3) or not np.allclose(matrix[2], [0, 0, 1]) or not np.isfinite(matrix).all():
            raise ValueError(f"an affine (3, 3) matrix with last row 0, 0, 1 is needed, got {matrix.tolist()}")
        linear, shift = matrix[:2, :2], matrix[:2, 2]
        determinant = np.linalg.det(linear)
        if determinant == 0:
            raise ValueError(f"the affine matrix cannot be inverted: {matrix.tolist()}")
        discs = self.discs
        if len(discs):
            discs = np.column_stack(
                [discs[:, :2] @ linear.T + shift, (linear @ discs[:, 2:].reshape(-1, 2, 2)).reshape(-1, 4)]
            )
        kinds = self.kinds
        along_axes = np.count_nonzero(linear) == 2
        if not along_axes and (kinds == RECTANGLE).any():
            kinds = np.where(kinds == RECTANGLE, np.uint8(POLYGON), kinds)
        return ShapeArrays(
            # Elementwise, not a matrix product: a product rounds the same input differently from place to place,
            # which would make rectangles of one grid differ in their last bit.
            coords=np.column_stack([_apply(linear[k], shift[k], self.coords) for k in range(2)]),
            ring_offsets=self.ring_offsets,
            ring_signs=self.ring_signs * np.sign(determinant),
            shape_offsets=self.shape_offsets,
            discs=discs,
            kinds=kinds,
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
            discs=self.discs[index] if len(self.discs) else self.discs,
            kinds=self.kinds[index],
        )

    @staticmethod
    def concatenate(parts: Sequence[ShapeArrays]) -> ShapeArrays:
        """Return the shapes of several sets as one, in order."""
        if len(parts) == 1:
            return parts[0]
        any_disc = any(len(part.discs) for part in parts)
        return ShapeArrays(
            coords=np.concatenate([part.coords for part in parts]),
            ring_offsets=_chain([part.ring_offsets for part in parts]),
            ring_signs=np.concatenate([part.ring_signs for part in parts]),
            shape_offsets=_chain([part.shape_offsets for part in parts]),
            discs=np.concatenate(
                [part.discs if len(part.discs) or not any_disc else np.full((len(part), 6), np.nan) for part in parts]
            ),
            kinds=np.concatenate([part.kinds for part in parts]),
        )


def pack(geometries: ArrayLike, radius: ArrayLike | None = None) -> ShapeArrays:
    """Pack shapely geometries: polygons and multipolygons as they are, points with a radius as discs.

    Parameters
    ----------
    geometries
        Shapely geometries: Polygon, MultiPolygon, and Point where ``radius`` is given. They are taken to be valid.
    radius
        Radius of each point, in the units of the coordinates: one number or one for each geometry.

    Returns
    -------
    ShapeArrays
        The packed shapes, in order.

    Raises
    ------
    TypeError
        If a geometry is of another type, or missing.
    ValueError
        If a geometry is empty or has z coordinates, or a point has no positive radius.

    Examples
    --------
    >>> import shapely
    >>> from pixnet._core.coverage import pack
    >>> pack([shapely.box(0, 0, 2, 3)]).area
    array([6.])
    """
    geometries = np.asarray(geometries, dtype=object).ravel()
    types = shapely.get_type_id(geometries)
    is_point = types == shapely.GeometryType.POINT
    wrong = np.flatnonzero(
        ~np.isin(types, [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]) & ~is_point
    )
    if wrong.size:
        found = geometries[wrong[0]]
        name = "missing (None)" if found is None else f"a {found.geom_type}"
        raise TypeError(f"geometry at position {wrong[0]} is {name}; valid: Polygon, MultiPolygon, Point with a radius")
    for test, fault in ((shapely.is_empty, "is empty"), (shapely.has_z, "has z coordinates; use shapely.force_2d")):
        wrong = np.flatnonzero(test(geometries))
        if wrong.size:
            raise ValueError(f"geometry at position {wrong[0]} {fault}")
    radii = np.broadcast_to(np.asarray(np.nan if radius is None else radius, dtype=np.float64), len(geometries))
    wrong = np.flatnonzero(is_point & ~((radii > 0) & np.isfinite(radii)))
    if wrong.size:
        raise ValueError(f"the point at position {wrong[0]} has radius {radii[wrong[0]]}; a positive one is needed")
    return pack_checked(geometries, is_point, radii)


def pack_checked(geometries: NDArray, is_point: NDArray[np.bool_], radius: NDArray | None = None) -> ShapeArrays:
    """Do as :func:`pack` does, with arrays ``(n,)`` of geometries known to be what it takes, and of what they are."""
    n = len(geometries)
    has_point = bool(is_point.any())
    coords, closed, parts, owners = _ragged(geometries[~is_point] if has_point else geometries)
    # Rings come closed; the repeated vertex goes.
    if len(coords) == 5 * (len(closed) - 1) and (np.diff(closed) == 5).all():
        coords = coords.reshape(-1, 5, 2)[:, :4].reshape(-1, 2)
    else:
        keep = np.ones(len(coords), dtype=bool)
        keep[closed[1:] - 1] = False
        coords = np.ascontiguousarray(coords[keep])
    ring_offsets = closed - np.arange(len(closed))

    outer = np.zeros(len(closed) - 1, dtype=bool)
    outer[parts[:-1]] = True
    turns = np.where(_shoelace(coords, ring_offsets) < 0, -1.0, 1.0)
    rings = np.zeros(n, dtype=np.int64)
    rings[~is_point] = np.diff(parts[owners])
    shape_offsets = _offsets(rings)

    discs = np.zeros((0, 6))
    kinds = np.full(n, POLYGON, dtype=np.uint8)
    if has_point:
        discs = np.full((n, 6), np.nan)
        discs[is_point, :2] = shapely.get_coordinates(geometries[is_point])
        discs[is_point, 2:] = np.asarray(radius, dtype=np.float64)[is_point, None] * np.array([1.0, 0.0, 0.0, 1.0])
        kinds[is_point] = DISC
    kinds[_rectangles(coords, ring_offsets, shape_offsets)] = RECTANGLE
    return ShapeArrays(coords, ring_offsets, np.where(outer, turns, -turns), shape_offsets, discs, kinds)


def pack_rectangles(bounds: ArrayLike, owners: ArrayLike, n: int) -> ShapeArrays:
    """Pack shapes that are unions of disjoint axis-aligned rectangles (the pixels of a label, in runs).

    Parameters
    ----------
    bounds
        ``(m, 4)``: ``x0, y0, x1, y1``.
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
    coords = np.stack([x0, y0, x1, y0, x1, y1, x0, y1], axis=1).reshape(-1, 2)
    shape_offsets = _offsets(np.bincount(owners, minlength=n))
    return ShapeArrays(
        coords=coords,
        ring_offsets=np.arange(0, len(coords) + 1, 4, dtype=np.int64),
        ring_signs=np.ones(len(x0)),
        shape_offsets=shape_offsets,
        discs=np.zeros((0, 6)),
        kinds=np.where(np.diff(shape_offsets) == 1, RECTANGLE, POLYGON).astype(np.uint8),
    )


def _ragged(polygons: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Vertices of polygons and multipolygons, and the offsets of rings, of polygons and of shapes in one another."""
    if not len(polygons):
        return np.zeros((0, 2)), *(np.zeros(1, dtype=np.int64) for _ in range(3))
    if (shapely.get_num_interior_rings(polygons) == 0).all() and (
        shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON
    ).all():
        # The usual case: one ring each, whose vertices need no ring objects to be told apart.
        one = np.arange(len(polygons) + 1, dtype=np.int64)
        return shapely.get_coordinates(polygons), _offsets(shapely.get_num_coordinates(polygons)), one, one
    kind, coords, offsets = shapely.to_ragged_array(polygons, include_z=False)
    rings, parts = (np.asarray(part, dtype=np.int64) for part in offsets[:2])
    if kind == shapely.GeometryType.MULTIPOLYGON:
        return coords, rings, parts, np.asarray(offsets[2], dtype=np.int64)
    return coords, rings, parts, np.arange(len(parts), dtype=np.int64)


def _rectangles(coords: NDArray, ring_offsets: NDArray, shape_offsets: NDArray) -> NDArray[np.int64]:
    """Positions of the shapes that are one ring of four vertices with sides along the axes."""
    single = np.flatnonzero(np.diff(shape_offsets) == 1)
    first = ring_offsets[shape_offsets[single]]
    four = ring_offsets[shape_offsets[single] + 1] - first == 4
    single, first = single[four], first[four]
    if len(coords) == 4 * len(single):  # all of them, in order
        x, y = coords.reshape(-1, 4, 2).transpose(2, 0, 1)
    else:
        x, y = coords[first[:, None] + np.arange(4)].transpose(2, 0, 1)
    flat_first = (y[:, 0] == y[:, 1]) & (x[:, 1] == x[:, 2]) & (y[:, 2] == y[:, 3]) & (x[:, 3] == x[:, 0])
    tall_first = (x[:, 0] == x[:, 1]) & (y[:, 1] == y[:, 2]) & (x[:, 2] == x[:, 3]) & (y[:, 3] == y[:, 0])
    return single[flat_first | tall_first]


def _apply(row: NDArray, shift: float, coords: NDArray) -> NDArray[np.float64]:
    """One coordinate under an affine map; terms with factor zero are left out, so that they cannot round."""
    result = np.full(len(coords), shift)
    for axis in range(2):
        if row[axis] != 0:
            result = result + row[axis] * coords[:, axis]
    return result


def _shoelace(coords: NDArray, offsets: NDArray) -> NDArray[np.float64]:
    """Signed area of each ring."""
    if len(coords) == 4 * (len(offsets) - 1) and (np.diff(offsets) == 4).all():
        quads = coords.reshape(-1, 4, 2)
        return _cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]) / 2  # of the diagonals
    return _sum_groups(_cross(*_local(coords, offsets)[1:]), offsets) / 2


def _first_moments(coords: NDArray, offsets: NDArray) -> NDArray[np.float64]:
    """Integral of x and of y over each ring, signed as its area is, about the origin."""
    start, local, following = _local(coords, offsets)
    cross = _cross(local, following)
    area = _sum_groups(cross, offsets) / 2
    return _sum_groups((local + following) * cross[:, None], offsets) / 6 + start * area[:, None]


def _local(coords: NDArray, offsets: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Each ring's first vertex, and its edges' starts and ends relative to it (far from the origin, digits cancel)."""
    lengths = np.diff(offsets)
    first = coords[offsets[:-1]] if len(lengths) else np.zeros((0, 2))
    local = coords - np.repeat(first, lengths, axis=0)
    following = np.roll(local, -1, axis=0)
    following[offsets[1:] - 1] = 0.0
    return first, local, following


def _cross(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    return a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]


def _sum_groups(values: NDArray, offsets: NDArray) -> NDArray[np.float64]:
    """Sum over consecutive groups, of which some may be empty."""
    sums = np.zeros((len(offsets) - 1, *values.shape[1:]))
    filled = np.flatnonzero(offsets[1:] > offsets[:-1])
    if filled.size:
        sums[filled] = np.add.reduceat(values, offsets[filled], axis=0)
    return sums


def _offsets(counts: NDArray) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _chain(parts: Sequence[NDArray]) -> NDArray[np.int64]:
    """Offsets of several ragged arrays put one behind the other."""
    return _offsets(np.concatenate([np.diff(part) for part in parts]))


def _gather(offsets: NDArray, index: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the items of the chosen groups, and the offsets of those groups in that list."""
    counts = offsets[index + 1] - offsets[index]
    new = _offsets(counts)
    return np.arange(new[-1], dtype=np.int64) + np.repeat(offsets[index] - new[:-1], counts), new
