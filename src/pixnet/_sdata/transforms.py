"""Affine transformations between elements, coordinate systems and the pixels of an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from pixnet._names import listed
from pixnet._sdata.pixel_size import is_pixel_size

_AXES = ("x", "y")


def coordinate_systems(sdata: SpatialData, key: str) -> list[str]:
    """Return the coordinate systems that place an element; a pixel size places nothing."""
    return [name for name in get_transformation(sdata[key], get_all=True) if not is_pixel_size(name)]


def shared_coordinate_system(sdata: SpatialData, key_a: str, key_b: str, coordinate_system: str | None = None) -> str:
    """Return the coordinate system in which two elements meet: the one asked for, "global" if shared, else the first shared."""
    if coordinate_system is not None and is_pixel_size(coordinate_system):
        raise ValueError(
            f"coordinate system {coordinate_system!r} tells the pixel size of an image and aligns no elements; name another one"
        )
    systems_a, systems_b = coordinate_systems(sdata, key_a), coordinate_systems(sdata, key_b)
    shared = [name for name in systems_a if name in systems_b]
    if coordinate_system is not None:
        if coordinate_system not in shared:
            raise ValueError(
                f"coordinate system {coordinate_system!r} is not shared by {key_a!r} ({listed(systems_a)}) "
                f"and {key_b!r} ({listed(systems_b)})"
            )
        return coordinate_system
    if not shared:
        raise ValueError(
            f"{key_a!r} ({listed(systems_a)}) and {key_b!r} ({listed(systems_b)}) share no coordinate system that places them; "
            "register one of them with spatialdata.transformations.set_transformation"
        )
    return "global" if "global" in shared else shared[0]


def affine_to_pixels(
    sdata: SpatialData, element_key: str, image_key: str, coordinate_system: str | None = None
) -> NDArray[np.float64]:
    """Return the affine map from an element's own coordinates to the level-0 pixels of an image.

    Parameters
    ----------
    sdata
        The object that holds both.
    element_key
        Any element: shapes, labels or an image.
    image_key
        The image.
    coordinate_system
        Where they meet; None: "global" if shared, else the first shared one.

    Returns
    -------
    ndarray
        ``(3, 3)``, acting on columns ``(x, y, 1)``. Pixel ``j`` covers ``[j, j + 1)``.

    Raises
    ------
    ValueError
        If they share no coordinate system, or a transformation is not affine or cannot be inverted.
    """
    system = shared_coordinate_system(sdata, element_key, image_key, coordinate_system)
    element = to_coordinate_system(sdata, element_key, system)
    image = to_coordinate_system(sdata, image_key, system)
    linear = _divide(image[:2, :2], element[:2, :2], image_key, system)
    shift = _divide(image[:2, :2], element[:2, 2] - image[:2, 2], image_key, system)
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def to_coordinate_system(sdata: SpatialData, key: str, coordinate_system: str) -> NDArray[np.float64]:
    """Return the ``(3, 3)`` affine map from an element's own coordinates to a coordinate system that it has."""
    transformation = get_transformation(sdata[key], to_coordinate_system=coordinate_system)
    try:
        matrix = transformation.to_affine_matrix(input_axes=_AXES, output_axes=_AXES)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"the transformation of {key!r} to {coordinate_system!r} is not affine "
            f"({type(transformation).__name__}); replace it with spatialdata.transformations.set_transformation"
        ) from error
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all() or np.linalg.det(matrix[:2, :2]) == 0:
        raise ValueError(
            f"the transformation of {key!r} to {coordinate_system!r} cannot be inverted: {matrix.tolist()}; "
            "replace it with spatialdata.transformations.set_transformation"
        )
    return matrix


def _divide(matrix: NDArray, right: NDArray, image_key: str, system: str) -> NDArray[np.float64]:
    """``inverse(matrix) @ right``, exact where the matrix only scales: whole pixels then stay whole."""
    if matrix[0, 1] == 0 and matrix[1, 0] == 0:
        diagonal = np.diag(matrix)
        return right / (diagonal if right.ndim == 1 else diagonal[:, None])
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the transformation of {image_key!r} to {system!r} cannot be inverted") from error
