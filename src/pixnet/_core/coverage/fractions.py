"""The exact fraction of every pixel's area that lies inside every shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pixnet._core.coverage.shapes import ShapeArrays

Weights = Literal["area", "center"]
WEIGHTS = ("area", "center")

# Vertices of the polygon that stands for a circle. Its area equals the circle's, and it leaves the circle by at most
# pi^2 / (3 * 512^2) of the radius, which moves a mean by less than 1e-5 of the range even for circles within one pixel.
_VERTICES = 512
_ANGLES = 2 * np.pi * np.arange(_VERTICES + 1) / _VERTICES
_CIRCLE = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)]) * np.sqrt(
    2 * np.pi / (_VERTICES * np.sin(2 * np.pi / _VERTICES))
)
_CIRCLE[-1] = _CIRCLE[0]


def coverage(shapes: ShapeArrays, window: tuple[int, int, int, int], weights: Weights = "area") -> csr_array:
    """Compute the share of each pixel's area that lies inside each shape.

    Pixel ``j`` covers ``[j, j + 1)``, its centre is at ``j + 0.5``.

    Parameters
    ----------
    shapes
        The shapes, in pixels.
    window
        ``y0, x0, h, w``: the pixels asked for.
    weights
        ``"area"``: the exact share, 0 to 1. ``"center"``: 1 where the pixel's centre is inside, else 0; a centre on
        the border of two touching shapes belongs to one of them.

    Returns
    -------
    csr_array
        ``(n_shapes, h * w)`` float64, above 0 and at most 1; pixel ``(y, x)`` is column ``(y - y0) * w + x - x0``.

    Raises
    ------
    ValueError
        If ``weights`` is not a valid name, or the window has a negative size.

    Examples
    --------
    >>> import shapely
    >>> from pixnet._core.coverage import ShapeArrays, coverage
    >>> coverage(ShapeArrays.from_geometries([shapely.box(0.5, 0, 2, 1)]), (0, 0, 1, 3)).toarray()
    array([[0.5, 1. , 0. ]])
    """
    # numba takes a second to import, which many a process need not spend.
    from pixnet._core.coverage.kernel import fill_coverage

    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; valid: {', '.join(map(repr, WEIGHTS))}")
    y0, x0, h, w = (int(v) for v in window)
    if h < 0 or w < 0:
        raise ValueError(f"window {window} has a negative size; it is y0, x0, h, w")
    boxes = boxes_in(shapes, (y0, x0, h, w))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    most = int((width * height).sum())
    index_dtype = np.int32 if max(most, h * w) < 2**31 else np.int64
    # The system provides only those pages of these arrays that are written to, so that a high bound costs nothing.
    data, indices = np.empty(most), np.empty(most, dtype=index_dtype)
    indptr = np.zeros(len(shapes) + 1, dtype=index_dtype)
    arrays = shapes.coords, shapes.ring_offsets, shapes.ring_signs, shapes.shape_offsets, shapes.is_ellipse, shapes.area
    # numba compiles again for arrays that are read-only (from another process) or not contiguous.
    coords, ring_offsets, ring_signs, shape_offsets, is_ellipse, area = (
        np.require(a, None, ["C", "W"]) for a in arrays
    )
    fill_coverage(
        coords,
        ring_offsets,
        ring_signs,
        shape_offsets,
        is_ellipse,
        area,
        boxes - np.array([x0, y0, x0, y0]),
        np.array([x0, y0], dtype=np.float64),
        w,
        weights == "center",
        _CIRCLE,
        np.zeros((height.max(initial=0), width.max(initial=0) + 1)),
        data,
        indices,
        indptr,
    )
    filled = indptr[-1]
    return csr_array((data[:filled], indices[:filled], indptr), shape=(len(shapes), h * w))


def boxes_in(shapes: ShapeArrays, window: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """Return the pixels of a window that each shape may cover, ``(n, 4)``: ``x0, y0, x1, y1``."""
    y0, x0, h, w = window
    # The polygon that stands for an ellipse leaves it by up to 1e-5 of the radius; a pixel more costs nothing.
    margin = shapes.is_ellipse[:, None].astype(np.float64)
    bounds = np.nan_to_num(shapes.bounds, nan=-np.inf)
    low, high = np.floor(bounds[:, :2] - margin), np.ceil(bounds[:, 2:] + margin)
    return np.column_stack([np.clip(corner, [x0, y0], [x0 + w, y0 + h]) for corner in (low, high)]).astype(np.int64)
