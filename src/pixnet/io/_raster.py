"""Image elements from arrays: the pyramid with its exact scales, and pictures that are decoded at once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata.models import Image2DModel, Labels2DModel
from spatialdata.transformations import Identity, Scale
from spatialdata.transformations import Sequence as TransformSequence
from xarray import DataArray, DataTree

if TYPE_CHECKING:
    from spatialdata.transformations import BaseTransformation

Array = np.ndarray | da.Array
Scales = tuple[float, float]  # level-0 pixels per pixel of a level, (y, x)
CHUNK = 1024
# Pyramids end with a level whose longer side is at most this many pixels.
SMALLEST = 1024
# A picture without tiles (JPEG, PNG, striped TIFF) is decoded at once, up to this many pixels.
MAX_WHOLE_PIXELS = 1_000_000_000

_pillow_lock = threading.Lock()


def halve(array: Array) -> Array:
    """Average 2 x 2 pixels of the last two axes (an odd last row or column is left out), rounded for integers.

    Parameters
    ----------
    array
        ``(..., y, x)``; a dask array stays lazy.

    Returns
    -------
    numpy.ndarray or dask.array.Array
        ``(..., y // 2, x // 2)`` of the same dtype.
    """
    if isinstance(array, da.Array):
        size_y, size_x = tuple(size - size % 2 for size in array.shape[-2:])
        even = array[..., :size_y, :size_x]
        # Blocks of even size can be halved one by one.
        if any(size % 2 for axis in (-2, -1) for size in even.chunks[axis]):
            even = even.rechunk({even.ndim - 2: CHUNK, even.ndim - 1: CHUNK})
        chunks = (*even.chunks[:-2], *(tuple(size // 2 for size in even.chunks[axis]) for axis in (-2, -1)))
        return da.map_blocks(halve, even, chunks=chunks, dtype=array.dtype)
    size_y, size_x = array.shape[-2] // 2, array.shape[-1] // 2
    wide = np.float32 if array.dtype.kind == "f" else np.uint32
    out = np.empty((*array.shape[:-2], size_y, size_x), dtype=array.dtype)
    band = 512  # a band of rows at a time keeps the wider intermediate small
    for start in range(0, size_y, band):
        stop = min(start + band, size_y)
        block = array[..., 2 * start : 2 * stop, : 2 * size_x]
        total = block[..., ::2, ::2].astype(wide)
        total += block[..., 1::2, ::2]
        total += block[..., ::2, 1::2]
        total += block[..., 1::2, 1::2]
        out[..., start:stop, :] = total / 4 if wide is np.float32 else (total + 2) // 4
    return out


def pyramid(array: Array) -> tuple[list[Array], list[Scales]]:
    """Make the levels of an image by halving: finest first, with the exact scale of each in level-0 pixels (y, x).

    There are at least two where the image has more than one row and column: SpatialData reads a stored pyramid of one
    level as a single-scale image.
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
            level = da.from_array(level, chunks=chunks, name=False)  # hashing a gigabyte of pixels is of no use
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


def open_picture(path: Path) -> Any:
    """Open a JPEG, PNG or TIFF with Pillow without its warning on large pictures; nothing is decoded yet.

    Raises
    ------
    ValueError
        If the file is not a picture Pillow reads, or declares more pixels than are decoded at once.
    """
    from PIL import Image, UnidentifiedImageError

    with _pillow_lock, warnings.catch_warnings():
        # Pillow's limit is global and lower than an ordinary section; ours is applied below.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path)
        except (UnidentifiedImageError, SyntaxError, OSError) as error:
            raise ValueError(f"{path} is not a readable picture ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    width, height = picture.size
    if width * height > MAX_WHOLE_PIXELS:
        raise ValueError(
            f"{path} declares {width:,} x {height:,} px, more than the {MAX_WHOLE_PIXELS:,} that are decoded at once; "
            "convert it to a tiled pyramidal TIFF, which is read tile by tile"
        )
    return picture


def read_picture(path: Path) -> np.ndarray:
    """Decode a picture to ``uint8 (3, y, x)``.

    Raises
    ------
    ValueError
        If the picture is not 8-bit RGB, or is truncated.
    """
    picture = open_picture(path)
    if picture.mode not in {"RGB", "RGBA", "P"}:
        what = {"L": "greyscale", "1": "black and white", "I;16": "16-bit", "I": "32-bit", "CMYK": "CMYK"}
        raise ValueError(
            f"{path} is {what.get(picture.mode, picture.mode)} (mode {picture.mode!r}); an H&E picture in 8-bit RGB is needed"
        )
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if picture.mode == "RGBA":  # transparent is empty glass
        from PIL import Image

        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.asarray(picture).transpose(2, 0, 1)
