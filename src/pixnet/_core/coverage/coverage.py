"""The exact share of every pixel's area that lies inside every shape.

Each edge of an outline adds, row by row, the signed area between itself and the right border of the pixels it crosses
(the method of font rasterisers); a cumulative sum along the row turns these into coverage. It is exact, holes fall out
of the orientation of rings, and its cost follows the length of the outline, not the number of pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import csr_array

from pixnet._core.coverage.jit import jit
from pixnet._core.coverage.shapes import DISC, POLYGON, RECTANGLE, ShapeArrays, pack, pack_rectangles

__all__ = ["DISC", "POLYGON", "RECTANGLE", "ShapeArrays", "Spans", "coverage", "pack", "pack_rectangles", "spans"]

Weights = Literal["area", "center"]
WEIGHTS = ("area", "center")

# Vertices of the polygon that stands for a disc. Its area equals the disc's, and it leaves the circle by at most
# pi^2 / (3 * 512^2) of the radius, which moves a mean by less than 1e-5 of the range even for discs within one pixel.
_DISC_VERTICES = 512
_ANGLES = 2 * np.pi * np.arange(_DISC_VERTICES) / _DISC_VERTICES
_CIRCLE = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)]) * np.sqrt(
    2 * np.pi / (_DISC_VERTICES * np.sin(2 * np.pi / _DISC_VERTICES))
)


class Spans(NamedTuple):
    """Coverage as runs of pixels along rows.

    Attributes
    ----------
    offsets
        ``(n + 1,)`` int64: shape ``i`` has spans ``offsets[i]`` to ``offsets[i + 1]``.
    start
        First pixel of each span, counted along the rows of the window.
    weight_offsets
        ``(s + 1,)`` int64: the weights of span ``k`` are ``weights[weight_offsets[k]:weight_offsets[k + 1]]``.
    weights
        Share of the pixel inside the shape, above 0 and at most 1.
    """

    offsets: NDArray[np.int64]
    start: NDArray[np.int64]
    weight_offsets: NDArray[np.int64]
    weights: NDArray[np.float64]


def coverage(
    geometries: ShapeArrays,
    window: tuple[int, int, int, int],
    weights: Weights = "area",
    *,
    dtype: DTypeLike = np.float64,
) -> csr_array:
    """Share of each pixel's area that lies inside each shape.

    Pixel ``j`` covers ``[j, j + 1)``, its centre is at ``j + 0.5``.

    Parameters
    ----------
    geometries
        Packed shapes, in pixels.
    window
        ``y0, x0, h, w``: the pixels asked for.
    weights
        ``"area"``: the exact share, 0 to 1. ``"center"``: 1 where the pixel's centre is inside, else 0; a centre on
        the border of two touching shapes belongs to one of them.
    dtype
        float64 or float32.

    Returns
    -------
    csr_array
        ``(n_shapes, h * w)``; pixel ``(y, x)`` is column ``(y - y0) * w + x - x0``.

    Raises
    ------
    ValueError
        If ``weights`` is no known name, or the window has a negative size.

    Examples
    --------
    >>> import shapely
    >>> from pixnet._core.coverage import coverage, pack
    >>> coverage(pack([shapely.box(0.5, 0, 2, 1)]), (0, 0, 1, 3)).toarray()
    array([[0.5, 1. , 0. ]])
    """
    found = spans(geometries, window, weights)
    indptr = found.weight_offsets[found.offsets]
    indices = _columns(found.start, found.weight_offsets)
    shape = (len(geometries), window[2] * window[3])
    return csr_array((found.weights.astype(dtype, copy=False), indices, indptr), shape=shape)


def spans(
    geometries: ShapeArrays,
    window: tuple[int, int, int, int],
    weights: Weights = "area",
    index: NDArray[np.int64] | None = None,
) -> Spans:
    """Coverage as runs of pixels, which is how the sums over pixels read it.

    Parameters
    ----------
    geometries, window, weights
        As for :func:`coverage`.
    index
        Positions of the shapes asked for; None: all.

    Returns
    -------
    Spans
        One entry for each of the shapes asked for.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; valid: {', '.join(map(repr, WEIGHTS))}")
    y0, x0, h, w = (int(v) for v in window)
    if h < 0 or w < 0:
        raise ValueError(f"window {window} has a negative size; it is y0, x0, h, w")
    if index is None:
        index = np.arange(len(geometries), dtype=np.int64)
    arrays = _spans(
        geometries.coords,
        geometries.ring_offsets,
        geometries.ring_signs,
        geometries.shape_offsets,
        geometries.discs,
        geometries.kinds,
        geometries.bounds,
        geometries.area,
        np.ascontiguousarray(index, dtype=np.int64),
        y0,
        x0,
        h,
        w,
        weights == "center",
        _CIRCLE,
    )
    return Spans(*arrays)


# kernels: all in this file, since numba's cache does not notice a change in a function of another file ---------------


@jit
def _add_in_row(buffer, row, width, xa, xb, d):
    """Add a piece of an edge that stays in one row of pixels, from xa to xb, rising by d (signed)."""
    low = min(xa, xb)
    high = max(xa, xb)
    if high <= 0.0:
        buffer[row, 0] += d
        return
    if low >= width:
        return
    column = int(np.floor(low))
    if column == int(np.floor(high)):
        share = 0.5 * (low + high) - column
        buffer[row, column] += d * (1.0 - share)
        buffer[row, column + 1] += d * share
        return
    slope = d / (high - low)
    if low < 0.0:
        buffer[row, 0] -= slope * low
        low = 0.0
        column = 0
    high = min(high, float(width))
    while low < high:
        following = min(column + 1.0, high)
        part = slope * (following - low)
        share = 0.5 * (low + following) - column
        buffer[row, column] += part * (1.0 - share)
        buffer[row, column + 1] += part * share
        low = following
        column += 1


@jit
def _add_edge(buffer, height, width, xa, ya, xb, yb, sign):
    """Add the signed area to the right of an edge, pixel by pixel."""
    if ya == yb:
        return
    if ya > yb:
        xa, ya, xb, yb = xb, yb, xa, ya
        sign = -sign
    if yb <= 0.0 or ya >= height:
        return
    slope = (xb - xa) / (yb - ya)
    y = ya
    x = xa
    if y < 0.0:
        y = 0.0
        x = xa - ya * slope
    last = min(yb, float(height))
    row = int(y)
    while y < last:
        # The end of one row is the start of the next, to the bit: so the rises of a closed outline cancel.
        y_next = min(row + 1.0, last)
        x_next = xb if y_next == yb else xa + (y_next - ya) * slope
        _add_in_row(buffer, row, width, x, x_next, (y_next - y) * sign)
        y = y_next
        x = x_next
        row += 1


@jit
def _add_crossings(buffer, height, width, xa, ya, xb, yb, sign):
    """Mark, in each row, where an edge crosses the line of pixel centres."""
    if ya == yb:
        return
    if ya > yb:
        xa, ya, xb, yb = xb, yb, xa, ya
        sign = -sign
    slope = (xb - xa) / (yb - ya)
    row = int(max(0.0, np.ceil(ya - 0.5)))
    while row < height and row + 0.5 < yb:
        x = np.ceil(xa + (row + 0.5 - ya) * slope - 0.5)
        if x < width:
            buffer[row, int(max(x, 0.0))] += sign
        row += 1


@jit
def _grown(array, size):
    larger = np.empty(max(size, 2 * array.size), array.dtype)
    larger[: array.size] = array
    return larger


@jit
def _spans(
    coords, ring_offsets, ring_signs, shape_offsets, discs, kinds, bounds, areas, index, y0, x0, h, w, center, circle
):
    n = index.size
    offsets = np.zeros(n + 1, np.int64)
    start = np.empty(max(16, 4 * n), np.int64)
    weight_offsets = np.zeros(max(16, 4 * n) + 1, np.int64)
    weights = np.empty(max(64, 16 * n), np.float64)
    buffer = np.zeros((0, 0), np.float64)
    n_spans = 0
    n_weights = 0
    n_circle = circle.shape[0]
    for k in range(n):
        i = index[k]
        # The polygon of a disc stands out by up to 1e-5 of the radius; two pixels more or less cost nothing.
        margin = 1.0 if kinds[i] == 1 else 0.0
        left = max(float(x0), np.floor(bounds[i, 0] - margin))
        top = max(float(y0), np.floor(bounds[i, 1] - margin))
        right = min(float(x0 + w), np.ceil(bounds[i, 2] + margin))
        bottom = min(float(y0 + h), np.ceil(bounds[i, 3] + margin))
        if not (right > left and bottom > top):
            offsets[k + 1] = n_spans
            continue
        width = int(right - left)
        height = int(bottom - top)
        if buffer.shape[0] < height or buffer.shape[1] < width + 1:
            buffer = np.zeros((max(height, buffer.shape[0]), max(width + 1, buffer.shape[1])), np.float64)
        if kinds[i] == 1:
            cx = discs[i, 0] - left
            cy = discs[i, 1] - top
            a, b, c, d = discs[i, 2], discs[i, 3], discs[i, 4], discs[i, 5]
            sign = 1.0 if a * d - b * c > 0 else -1.0
            xa = cx + a * circle[n_circle - 1, 0] + b * circle[n_circle - 1, 1]
            ya = cy + c * circle[n_circle - 1, 0] + d * circle[n_circle - 1, 1]
            for j in range(n_circle):
                xb = cx + a * circle[j, 0] + b * circle[j, 1]
                yb = cy + c * circle[j, 0] + d * circle[j, 1]
                if center:
                    _add_crossings(buffer, height, width, xa, ya, xb, yb, sign)
                else:
                    _add_edge(buffer, height, width, xa, ya, xb, yb, sign)
                xa = xb
                ya = yb
        else:
            for ring in range(shape_offsets[i], shape_offsets[i + 1]):
                sign = ring_signs[ring]
                end = ring_offsets[ring + 1]
                xa = coords[end - 1, 0] - left
                ya = coords[end - 1, 1] - top
                for j in range(ring_offsets[ring], end):
                    xb = coords[j, 0] - left
                    yb = coords[j, 1] - top
                    if center:
                        _add_crossings(buffer, height, width, xa, ya, xb, yb, sign)
                    else:
                        _add_edge(buffer, height, width, xa, ya, xb, yb, sign)
                    xa = xb
                    ya = yb
        # What rounding leaves outside the shape (1e-16) is no coverage; shapes far smaller than a pixel are.
        least = 0.5 if center else min(1e-12, 1e-4 * areas[i])
        # Rings that turn positive in a frame whose y points down rise on their right side: the sum comes out negative.
        for row in range(height):
            total = 0.0
            run = -1
            base = (int(top) - y0 + row) * w + int(left) - x0
            if n_weights + width > weights.size:
                weights = _grown(weights, n_weights + width)
            for column in range(width):
                total -= buffer[row, column]
                buffer[row, column] = 0.0
                if total > least:
                    if run < 0:
                        run = column
                    weights[n_weights] = min(total, 1.0)
                    n_weights += 1
                elif run >= 0:
                    if n_spans + 1 >= start.size:
                        start = _grown(start, n_spans + 2)
                        weight_offsets = _grown(weight_offsets, n_spans + 3)
                    start[n_spans] = base + run
                    n_spans += 1
                    weight_offsets[n_spans] = n_weights
                    run = -1
            buffer[row, width] = 0.0
            if run >= 0:
                if n_spans + 1 >= start.size:
                    start = _grown(start, n_spans + 2)
                    weight_offsets = _grown(weight_offsets, n_spans + 3)
                start[n_spans] = base + run
                n_spans += 1
                weight_offsets[n_spans] = n_weights
        offsets[k + 1] = n_spans
    return offsets, start[:n_spans].copy(), weight_offsets[: n_spans + 1].copy(), weights[:n_weights].copy()


@jit
def _columns(start, weight_offsets):
    columns = np.empty(weight_offsets[-1], np.int64)
    for k in range(start.size):
        for j in range(weight_offsets[k], weight_offsets[k + 1]):
            columns[j] = start[k] + j - weight_offsets[k]
    return columns
