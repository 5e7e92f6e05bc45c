"""Weighted statistics of pixels: the inner loops of aggregation."""

from __future__ import annotations

import numpy as np

from pixnet._core.jit import jit


@jit
def span_sums(planes, offsets, start, weight_offsets, weights, out):
    """Sum of weight times value, ``out[k, c]``, for every shape k and plane c; ``planes`` is ``(c, h * w)``."""
    for c in range(planes.shape[0]):
        plane = planes[c]
        for k in range(offsets.size - 1):
            total = 0.0
            for s in range(offsets[k], offsets[k + 1]):
                shift = start[s] - weight_offsets[s]
                for j in range(weight_offsets[s], weight_offsets[s + 1]):
                    total += weights[j] * plane[j + shift]
            out[k, c] = total


@jit
def span_squares(planes, offsets, start, weight_offsets, weights, means, out):
    """Sum of weight times squared distance from ``means[k, c]``; NaN pixels are left out."""
    for c in range(planes.shape[0]):
        plane = planes[c]
        for k in range(offsets.size - 1):
            total = 0.0
            mean = means[k, c]
            for s in range(offsets[k], offsets[k + 1]):
                shift = start[s] - weight_offsets[s]
                for j in range(weight_offsets[s], weight_offsets[s + 1]):
                    distance = plane[j + shift] - mean
                    if distance == distance:
                        total += weights[j] * distance * distance
            out[k, c] = total


@jit
def span_extremes(planes, offsets, start, weight_offsets, low, high):
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
            low[k, c] = least
            high[k, c] = most


@jit
def rectangle_sums(planes, bounds, out):
    """Area-weighted sums over rectangles along the axes: the coverage of a pixel is a product of two lengths.

    ``planes`` is ``(c, h, w)``; ``bounds`` holds ``x0, y0, x1, y1`` in pixels of the planes, and is cut to them.
    """
    height = planes.shape[1]
    width = planes.shape[2]
    for c in range(planes.shape[0]):
        for k in range(bounds.shape[0]):
            x0 = max(bounds[k, 0], 0.0)
            y0 = max(bounds[k, 1], 0.0)
            x1 = min(bounds[k, 2], float(width))
            y1 = min(bounds[k, 3], float(height))
            total = 0.0
            if x1 > x0 and y1 > y0:
                first = int(x0)
                last = int(np.ceil(x1)) - 1
                # The outermost columns are covered in part; where they are one, that one is covered from both sides.
                left = min(first + 1.0, x1) - x0
                right = x1 - last
                for row in range(int(y0), int(np.ceil(y1))):
                    line = planes[c, row]
                    across = left * line[first]
                    for column in range(first + 1, last):
                        across += line[column]
                    if last > first:
                        across += right * line[last]
                    total += across * (min(row + 1.0, y1) - max(float(row), y0))
            out[k, c] = total
