"""Images and labels: made from arrays, their pyramid levels, channels, gene maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import BaseTransformation, Identity, Scale, get_transformation
from spatialdata.transformations import Sequence as TransformSequence
from xarray import DataArray, DataTree

from pixnet._core.slide.pyramid import CHUNK, halve
from pixnet._names import is_total

Array = np.ndarray | da.Array
Scales = tuple[float, float]  # level-0 pixels per pixel of a level, (y, x)

SMALLEST = 1024
"""Pyramids end with a level whose longer side is at most this many pixels."""


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
    """Whether an image is a gene map: one of its channels is a total, such as ``__total__``."""
    return any(is_total(name) for name in channel_names(image))


def pyramid(array: Array) -> tuple[list[Array], list[Scales]]:
    """Make the levels of an image by halving: finest first, with the exact scale of each in level-0 pixels (y, x).

    There are at least two: SpatialData reads a stored pyramid of one level as no pyramid.
    """
    return extend([array], [(1.0, 1.0)], SMALLEST)


def extend(levels: Sequence[Array], scales: Sequence[Scales], smallest: int) -> tuple[list[Array], list[Scales]]:
    """Add levels until the longer side is at most ``smallest`` and there are two."""
    levels, scales = list(levels), list(scales)
    while (max(levels[-1].shape[-2:]) > smallest or len(levels) < 2) and min(levels[-1].shape[-2:]) >= 2:
        levels.append(halve(levels[-1]))
        scales.append((scales[-1][0] * 2, scales[-1][1] * 2))
    return levels, scales


def raster_element(
    levels: Sequence[Array],
    scales: Sequence[Scales],
    *,
    transformations: Mapping[str, BaseTransformation] | None = None,
    channels: Sequence[str] | None = ("r", "g", "b"),
) -> DataArray | DataTree:
    """Make a SpatialData image ``(c, y, x)`` or labels ``(y, x)`` from ready levels, each with its own exact scale.

    ``Image2DModel.parse`` makes its own levels and takes their scales from the ratio of the shapes, which is off where
    sizes are odd; scanners state theirs.

    Parameters
    ----------
    levels
        Arrays, finest first; numpy arrays are wrapped in dask without a copy.
    scales
        Level-0 pixels per pixel of each level, ``(y, x)``.
    transformations
        From level-0 pixels to coordinate systems; ``None`` is the identity into ``"global"``.
    channels
        Channel names of an image; ``None`` makes a labels element.

    Returns
    -------
    DataTree
        Multiscale element; a single level gives a DataArray.
    """
    transformations = dict(transformations) if transformations else {"global": Identity()}
    model, dims = (Labels2DModel, ("y", "x")) if channels is None else (Image2DModel, ("c", "y", "x"))
    named: dict[str, Any] = {} if channels is None else {"c_coords": list(channels)}
    nodes: list[DataArray] = []
    for level, (scale_y, scale_x) in zip(levels, scales, strict=True):
        if not isinstance(level, da.Array):
            chunks = (*level.shape[:-2], CHUNK, CHUNK)
            level = da.from_array(level, chunks=chunks, name=False)  # hashing a gigabyte of pixels serves nothing
        if scale_y == scale_x == 1:
            transforms = dict(transformations)
        else:
            down = Scale([scale_y, scale_x], axes=("y", "x"))
            transforms = {name: TransformSequence([down, last]) for name, last in transformations.items()}
        node = model.parse(level, dims=dims, transformations=transforms, **named)
        nodes.append(
            node.assign_coords(
                y=(np.arange(node.sizes["y"]) + 0.5) * scale_y, x=(np.arange(node.sizes["x"]) + 0.5) * scale_x
            )
        )
    if len(nodes) == 1:
        return nodes[0]
    tree = DataTree.from_dict({f"scale{i}": node.to_dataset(name="image") for i, node in enumerate(nodes)})
    model().validate(tree)
    return tree
