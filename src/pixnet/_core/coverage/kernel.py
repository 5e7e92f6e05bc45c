"""The inner loops of coverage.

Each edge of an outline adds, row by row, the signed area between itself and the right border of the pixels it crosses
(the method of font rasterisers); a cumulative sum along the row turns these into coverage. It is exact, holes fall out
of the signs of rings, and its cost follows the length of the outline and the size of the bounding box.

All kernels are in this file, since numba's cache does not notice a change in a function of another file. They allocate
and slice no arrays: compiling that takes longer than all the rest.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from pixnet._core.coverage.jit import jit


@jit
def fill_coverage(
    coords, ring_offsets, ring_signs, shape_offsets, is_ellipse, areas, boxes, origin, w, center, circle, buffer,
    data, indices, indptr,
):  # fmt: skip
    """Write the coverage of each shape as a row of a sparse matrix in CSR form.

    ``boxes`` are the pixels to look at, relative to the window, whose corner is ``origin`` and whose width is ``w``.
    ``circle`` holds a closed unit circle, ``buffer`` zeros for the largest box and one more column.
    """
    outline = np.empty_like(circle)
    filled = 0
    for i in range(boxes.shape[0]):
        width = boxes[i, 2] - boxes[i, 0]
        height = boxes[i, 3] - boxes[i, 1]
        if width <= 0 or height <= 0:
            indptr[i + 1] = filled
            continue
        left = origin[0] + boxes[i, 0]
        top = origin[1] + boxes[i, 1]
        for ring in range(shape_offsets[i], shape_offsets[i + 1]):
            vertices = coords
            first = ring_offsets[ring]
            end = ring_offsets[ring + 1]
            if is_ellipse[i]:
                for j in range(circle.shape[0]):
                    for axis in range(2):
                        centre = coords[first, axis]
                        outline[j, axis] = (
                            centre
                            + circle[j, 0] * (coords[first + 1, axis] - centre)
                            + circle[j, 1] * (coords[first + 2, axis] - centre)
                        )
                vertices = outline
                first = 0
                end = circle.shape[0]
            turn = 0.0  # twice the signed area of the ring
            x = vertices[first, 0]
            y = vertices[first, 1]
            for j in range(first + 1, end - 1):
                turn += (vertices[j, 0] - x) * (vertices[j + 1, 1] - y)
                turn -= (vertices[j + 1, 0] - x) * (vertices[j, 1] - y)
            # A ring of positive area rises on its right side.
            sign = -ring_signs[ring] if turn > 0.0 else ring_signs[ring]
            for j in range(first, end - 1):
                _add_edge(
                    buffer,
                    height,
                    width,
                    vertices[j, 0] - left,
                    vertices[j, 1] - top,
                    vertices[j + 1, 0] - left,
                    vertices[j + 1, 1] - top,
                    sign,
                    center,
                )
        # What rounding leaves outside the shape (1e-16) is not coverage; shapes far smaller than a pixel are.
        least = 0.5 if center else min(1e-12, 1e-4 * areas[i])
        for row in range(height):
            pixel = (boxes[i, 1] + row) * w + boxes[i, 0]
            total = 0.0
            for column in range(width):
                total += buffer[row, column]
                buffer[row, column] = 0.0
                if total > least:
                    data[filled] = min(total, 1.0)
                    indices[filled] = pixel + column
                    filled += 1
            buffer[row, width] = 0.0
        indptr[i + 1] = filled


@jit
def _add_edge(buffer, height, width, xa, ya, xb, yb, sign, center):
    """Add the signed area to the right of an edge, pixel by pixel, or the pixel centres to the right of it."""
    if ya == yb:
        return
    if ya > yb:
        xa, ya, xb, yb = xb, yb, xa, ya
        sign = -sign
    if yb <= 0.0 or ya >= height:
        return
    slope = (xb - xa) / (yb - ya)
    if center:
        row = int(max(0.0, np.ceil(ya - 0.5)))
        while row < height and row + 0.5 < yb:
            x = np.ceil(xa + (row + 0.5 - ya) * slope - 0.5)
            if x < width:
                buffer[row, int(max(x, 0.0))] += sign
            row += 1
        return
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
def _add_in_row(buffer, row, width, xa, xb, rise):
    """Add a piece of an edge that stays in one row of pixels, from xa to xb, with a signed rise."""
    low = min(xa, xb)
    high = max(xa, xb)
    if high <= 0.0:
        buffer[row, 0] += rise
        return
    if low >= width:
        return
    column = int(np.floor(low))
    if column == int(np.floor(high)):
        share = 0.5 * (low + high) - column
        buffer[row, column] += rise * (1.0 - share)
        buffer[row, column + 1] += rise * share
        return
    slope = rise / (high - low)
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
