"""Weighted statistics of pixels: the inner loops of aggregation.

Of every kernel, shape ``k`` goes to row ``rows[k]`` of what is filled in.
"""

from __future__ import annotations

import numpy as np

from pixnet._core.coverage.jit import jit


@jit
def span_sums(planes, offsets, start, weight_offsets, weights, rows, out):
    """Sum of weight times value, ``out[rows[k], c]``, for every shape k and plane c; ``planes`` is ``(c, h * w)``."""
    n_planes = planes.shape[0]
    c = 0
    # Four planes at a time: four sums that do not wait for one another, and one reading of the weights.
    while c + 4 <= n_planes:
        plane_0, plane_1, plane_2, plane_3 = planes[c], planes[c + 1], planes[c + 2], planes[c + 3]
        for k in range(offsets.size - 1):
            total_0 = total_1 = total_2 = total_3 = 0.0
            for s in range(offsets[k], offsets[k + 1]):
                pixel = start[s]
                for j in range(weight_offsets[s], weight_offsets[s + 1]):
                    weight = weights[j]
                    total_0 += weight * plane_0[pixel]
                    total_1 += weight * plane_1[pixel]
                    total_2 += weight * plane_2[pixel]
                    total_3 += weight * plane_3[pixel]
                    pixel += 1
            row = rows[k]
            out[row, c], out[row, c + 1], out[row, c + 2], out[row, c + 3] = total_0, total_1, total_2, total_3
        c += 4
    while c < n_planes:
        plane_0 = planes[c]
        for k in range(offsets.size - 1):
            total_0 = 0.0
            for s in range(offsets[k], offsets[k + 1]):
                shift = start[s] - weight_offsets[s]
                for j in range(weight_offsets[s], weight_offsets[s + 1]):
                    total_0 += weights[j] * plane_0[j + shift]
            out[rows[k], c] = total_0
        c += 1


@jit
def span_squares(planes, offsets, start, weight_offsets, weights, means, rows, out):
    """Sum of weight times squared distance from ``means[rows[k], c]``; NaN pixels are left out."""
    for c in range(planes.shape[0]):
        plane = planes[c]
        for k in range(offsets.size - 1):
            total = 0.0
            mean = means[rows[k], c]
            for s in range(offsets[k], offsets[k + 1]):
                shift = start[s] - weight_offsets[s]
                for j in range(weight_offsets[s], weight_offsets[s + 1]):
                    distance = plane[j + shift] - mean
                    if distance == distance:
                        total += weights[j] * distance * distance
            out[rows[k], c] = total


@jit
def span_extremes(planes, offsets, start, weight_offsets, rows, low, high):
    """Smallest and largest value of the pixels of every shape; NaN pixels are left out."""
    for c in range(planes.shape[0]):
        plane = planes[c]
        for k in range(offsets.size - 1):
            least = np.inf
            most = -np.inf
            for s in range(offsets[k], offsets[k + 1]):
                for j in range(start[s], start[s] + weight_offsets[s + 1] - weight_offsets[s]):
                    # A comparison with NaN is false, which leaves it out.
                    least = plane[j] if plane[j] < least else least
                    most = plane[j] if plane[j] > most else most
            low[rows[k], c] = least
            high[rows[k], c] = most


@jit
def rectangle_sums(planes, bounds, rows, out):
    """Area-weighted sums over rectangles along the axes: the coverage of a pixel is a product of two lengths.

    ``planes`` is ``(c, h, w)``; ``bounds`` holds ``x0, y0, x1, y1`` in pixels of the planes, and is cut to them.
    """
    n_planes, height, width = planes.shape
    flat = planes.reshape(n_planes, height * width)
    c = 0
    while c < n_planes:
        # Four planes at a time, see span_sums; of the last few, some are summed again instead.
        first_plane = max(0, min(c, n_planes - 4))
        plane_0 = flat[first_plane]
        plane_1 = flat[min(first_plane + 1, n_planes - 1)]
        plane_2 = flat[min(first_plane + 2, n_planes - 1)]
        plane_3 = flat[min(first_plane + 3, n_planes - 1)]
        for k in range(bounds.shape[0]):
            x0 = max(bounds[k, 0], 0.0)
            y0 = max(bounds[k, 1], 0.0)
            x1 = min(bounds[k, 2], float(width))
            y1 = min(bounds[k, 3], float(height))
            total_0 = total_1 = total_2 = total_3 = 0.0
            if x1 > x0 and y1 > y0:
                first = int(x0)
                last = int(np.ceil(x1)) - 1
                # The outermost columns are covered in part; where they are one, that one is covered from both sides.
                left = min(first + 1.0, x1) - x0
                right = x1 - last
                for y in range(int(y0), int(np.ceil(y1))):
                    tall = min(y + 1.0, y1) - max(float(y), y0)
                    base = y * width
                    pixel = base + first
                    across_0 = left * plane_0[pixel]
                    across_1 = left * plane_1[pixel]
                    across_2 = left * plane_2[pixel]
                    across_3 = left * plane_3[pixel]
                    for pixel in range(base + first + 1, base + last):
                        across_0 += plane_0[pixel]
                        across_1 += plane_1[pixel]
                        across_2 += plane_2[pixel]
                        across_3 += plane_3[pixel]
                    if last > first:
                        pixel = base + last
                        across_0 += right * plane_0[pixel]
                        across_1 += right * plane_1[pixel]
                        across_2 += right * plane_2[pixel]
                        across_3 += right * plane_3[pixel]
                    total_0 += across_0 * tall
                    total_1 += across_1 * tall
                    total_2 += across_2 * tall
                    total_3 += across_3 * tall
            row = rows[k]
            out[row, first_plane] = total_0
            if n_planes > 1:
                out[row, min(first_plane + 1, n_planes - 1)] = total_1
            if n_planes > 2:
                out[row, min(first_plane + 2, n_planes - 1)] = total_2
            if n_planes > 3:
                out[row, first_plane + 3] = total_3
        c += 4
