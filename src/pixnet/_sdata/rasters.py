"""Images and labels: pyramid levels, channels, gene maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from spatialdata.transformations import get_transformation
from xarray import DataArray, DataTree

from pixnet._names import is_total
from pixnet._programs import is_program


@dataclass(frozen=True)
class Level:
    """One level of a raster's pyramid.

    Attributes
    ----------
    data
        Array ``(c, y, x)`` or ``(y, x)``.
    scale
        Level-0 pixels per pixel of this level, ``(y, x)``.
    """

    data: DataArray
    scale: tuple[float, float]


def levels(raster: DataArray | DataTree) -> list[Level]:
    """Return the pyramid of a raster, finest level first, each with the scale that its own transform states."""
    full, *coarser = _arrays(raster)
    return [Level(full, (1.0, 1.0)), *(Level(array, _scale(full, array)) for array in coarser)]


def _arrays(raster: DataArray | DataTree) -> list[DataArray]:
    if isinstance(raster, DataArray):
        return [raster]
    return [next(iter(node.data_vars.values())) for node in raster.children.values()]


def _scale(full: DataArray, level: DataArray) -> tuple[float, float]:
    """Return level-0 pixels per pixel of a level, ``(y, x)``.

    The ratio of the shapes is off where a last odd row or column was left out: 4641 px halve to 2320 and 1160, and
    the scale is still 2 and 4. So the level's transform is taken, unless it belongs to another level: some writers
    repeat that of the finest.
    """
    ratio = (full.sizes["y"] / level.sizes["y"], full.sizes["x"] / level.sizes["x"])
    ours, theirs = (get_transformation(array, get_all=True) for array in (full, level))
    shared = [name for name in ours if name in theirs]
    if not shared:
        return ratio
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    try:
        to_full, to_level = (t[shared[0]].to_affine_matrix(**axes) for t in (ours, theirs))
        matrix = np.linalg.solve(to_full, to_level)
    except (ValueError, TypeError, NotImplementedError, np.linalg.LinAlgError):  # refused later, by the caller
        return ratio
    stated = (float(matrix[1, 1]), float(matrix[0, 0]))
    plausible = all(abs(s / r - 1) < 0.1 for s, r in zip(stated, ratio))
    return stated if plausible else ratio


def full_resolution(raster: DataArray | DataTree) -> DataArray:
    """Return the finest level of a raster."""
    return _arrays(raster)[0]


def channel_names(image: DataArray | DataTree) -> list[str]:
    """Return the names of an image's channels, as strings."""
    data = full_resolution(image)
    if "c" not in data.dims:
        return []
    if "c" in data.coords:
        return [str(c) for c in data.coords["c"].values]
    return [str(i) for i in range(data.sizes["c"])]


def is_gene_map(image: DataArray | DataTree) -> bool:
    """Whether an image is a map of genes or of programs: a channel is a total, such as ``__total__``, or a program."""
    return any(is_total(name) or is_program(name) for name in channel_names(image))
