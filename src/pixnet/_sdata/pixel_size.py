"""The pixel size (µm/px) of an image: its transformation to a coordinate system in µm that is pixnet's own.

It travels with the image: SpatialData crops, copies and stores it rightly, and drops it where it resamples the image to
another coordinate system. Every image has its own origin in this system, so nothing is aligned by it.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.transformations import BaseTransformation, Scale, get_transformation, set_transformation
from spatialdata.transformations import Sequence as Chain
from xarray import DataArray, DataTree

from pixnet._logging import logger
from pixnet._sdata.rasters import levels

PIXNET_UM = "pixnet_um"
"""The coordinate system whose units are µm."""

SQUARE = 0.02
"""How much longer than wide a slide's pixels may be."""


POSSIBLE, USUAL = (0.02, 200.0), (0.05, 50.0)
"""µm/px that a picture of a slide may have, from an oil objective to a thumbnail; beyond the usual a warning is given."""


def check_mpp(mpp: Any, name: str = "mpp") -> float:
    """Return a pixel size (µm/px) as a number, or refuse what cannot be one.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is not positive and finite, or no microscope has it.
    """
    if isinstance(mpp, bool) or not isinstance(mpp, Real):
        raise TypeError(f"{name} is {mpp!r}; a pixel size in µm/px (a number) is needed, for instance 0.5")
    mpp = float(mpp)
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"{name} is {mpp!r}; a positive, finite pixel size in µm/px is needed, for instance 0.5")
    low, high = POSSIBLE
    if not low <= mpp <= high:
        units = {"mm": 1e3, "nm": 1e-3, "m": 1e6}
        meant = next((unit for unit, um in units.items() if 0.1 <= mpp * um <= 10), None)
        hint = f" (in {meant}? That would be {mpp * units[meant]:g} µm/px)" if meant else ""
        raise ValueError(f"{name} is {mpp:g} µm/px{hint}; a slide has 0.1 to 10, and {low:g} to {high:g} is possible")
    if not USUAL[0] <= mpp <= USUAL[1]:
        logger.warning("%g µm/px is unusual for a slide (0.2 to 10): is it in µm, and of the finest level?", mpp)
    return mpp


def is_pixel_size(coordinate_system: str) -> bool:
    """Whether a coordinate system tells a pixel size; `spatialdata.concatenate` adds the object's name to it."""
    return coordinate_system == PIXNET_UM or coordinate_system.startswith(f"{PIXNET_UM}-")


def get_mpp(sdata: SpatialData, image_key: str) -> float:
    """Return the pixel size of a slide (µm/px, full-resolution level).

    Raises
    ------
    ValueError
        If it is unknown, the image states several, or its pixels are not square.
    """
    mpp = find_mpp(sdata, image_key)
    if mpp is None:
        raise ValueError(
            f"the pixel size (µm/px) of image {image_key!r} is unknown: it was never stated, or the image was resampled since; "
            f"state it with pixnet.pp.set_mpp(sdata, {image_key!r}, mpp) or, from shapes of known size, "
            f"pixnet.pp.infer_mpp(sdata, shapes, image_key={image_key!r}, pitch_um=...)"
        )
    for system, matrix in _matrices(sdata, image_key).items():
        long, short = np.linalg.svd(matrix, compute_uv=False)
        if long > short * (1 + SQUARE):
            raise ValueError(
                f"the pixels of image {image_key!r} are not square: its transformation to {system!r} stretches one direction "
                f"{long / short:.3f} times more than the other (or shears); resample the image, or state one pixel size with "
                f"pixnet.pp.set_mpp(sdata, {image_key!r}, mpp)"
            )
    return mpp


def find_mpp(sdata: SpatialData, key: str) -> float | None:
    """Return the pixel size of an image or of labels (the root of a pixel's area in µm²); None if it is unknown.

    Raises
    ------
    ValueError
        If the element states several.
    """
    found = {system: math.sqrt(abs(_area(matrix))) for system, matrix in _matrices(sdata, key).items()}
    if not found:
        return None
    if max(found.values()) > min(found.values()) * (1 + 1e-3):
        stated = ", ".join(f"{mpp:.4g} µm/px ({system!r})" for system, mpp in found.items())
        raise ValueError(
            f"{key!r} has several pixel sizes: {stated}; state the right one with pixnet.pp.set_mpp(sdata, {key!r}, mpp)"
        )
    return next(iter(found.values()))


def find_origin(sdata: SpatialData, key: str) -> tuple[float, float]:
    """Return where an image begins on the one that it was cut from, in its pixels ``(y, x)``: a crop keeps that origin.

    One that was turned, or that states several, counts as uncut.
    """
    found = [value for system, value in get_transformation(sdata[key], get_all=True).items() if is_pixel_size(system)]
    if len(found) != 1:
        return 0.0, 0.0
    matrix = found[0].to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))
    if matrix[0, 1] != 0 or matrix[1, 0] != 0 or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        return 0.0, 0.0
    return float(matrix[1, 2] / matrix[1, 1]), float(matrix[0, 2] / matrix[0, 0])


def _matrices(sdata: SpatialData, key: str) -> dict[str, NDArray[np.float64]]:
    """Return the ``(2, 2)`` matrix from pixels to µm of each coordinate system that tells a pixel size."""
    found = {}
    for system, transformation in get_transformation(sdata[key], get_all=True).items():
        if not is_pixel_size(system):
            continue
        try:
            matrix = transformation.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))[:2, :2]
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"the transformation of {key!r} to {system!r} is not affine ({type(transformation).__name__}) and tells no "
                f"pixel size; state it with pixnet.pp.set_mpp(sdata, {key!r}, mpp)"
            ) from error
        if not (np.isfinite(matrix).all() and _area(matrix) != 0):
            raise ValueError(
                f"the transformation of {key!r} to {system!r} cannot be inverted and tells no pixel size: {matrix.tolist()}; "
                f"state it with pixnet.pp.set_mpp(sdata, {key!r}, mpp)"
            )
        found[system] = np.asarray(matrix, dtype=np.float64)
    return found


def _area(matrix: NDArray[np.float64]) -> float:
    """Return the determinant of a ``(2, 2)`` matrix; numpy's goes by its logarithm, so that 0.5 would not stay 0.5."""
    return float(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])


def set_pixel_size(image: DataArray | DataTree, mpp: float) -> None:
    """Set the pixel size of an element in memory, in place of any it has; the scales of its levels stay as they are."""
    # set_transformation on the whole pyramid would replace them by ratios of the shapes, which are off for odd sizes.
    for i, level in enumerate(levels(image)):
        before = get_transformation(level.data, get_all=True)
        found: BaseTransformation = Scale([mpp, mpp], axes=("x", "y"))
        if i:
            found = Chain([_down(before, level.scale), found])
        kept = {system: value for system, value in before.items() if not is_pixel_size(system)}
        set_transformation(level.data, {**kept, PIXNET_UM: found}, set_all=True)


def _down(transformations: dict[str, BaseTransformation], scale: tuple[float, float]) -> BaseTransformation:
    """Return the scale of a level as its other transformations have it: SpatialData needs all to begin with the same."""
    for transformation in transformations.values():
        if isinstance(transformation, Chain) and isinstance(transformation.transformations[0], Scale):
            return transformation.transformations[0]
    return Scale(list(scale), axes=("y", "x"))
