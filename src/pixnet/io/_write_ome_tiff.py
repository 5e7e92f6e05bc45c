"""Channels of an image, such as genes of a map, as a pyramidal OME-TIFF."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pixnet._core.parallel import run
from pixnet._logging import logger
from pixnet._names import check_genes
from pixnet._whole_file import whole_file

if TYPE_CHECKING:
    import dask.array as da
    from spatialdata import SpatialData

TILE = 512
SMALLEST = 1024
"""Pyramids end with a level whose longer side is at most this many pixels."""

DTYPES = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64"]


def write_ome_tiff(
    sdata: SpatialData,
    image_key: str,
    path: str | PathLike[str],
    *,
    channels: str | Sequence[str] | None = None,
    dtype: Literal["uint16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write channels of an image, such as genes of a map, as a pyramidal OME-TIFF.

    QuPath, napari, Avivator and Fiji open it, with the names of the channels and the pixel size (µm/px). It is written
    tile by tile and compressed without loss, so memory does not grow with the image.

    Parameters
    ----------
    sdata
        Object that holds the image.
    image_key
        The image: a gene map (values as it holds them: densities, NaN on background), or any other.
    path
        The file, usually ``.ome.tif``.
    channels
        Channel or channels to write, in this order; ``None``: all.
    dtype
        ``None`` keeps the image's own. ``"uint16"`` is for viewers that take no fractions, such as Xenium Explorer:
        each channel is scaled so that its largest value becomes 65,535, and background becomes 0. The factor by which a
        pixel has to be multiplied to get its value is written into the OME metadata (``Description``) for each channel.
    overwrite
        Replace the file if it exists.

    Raises
    ------
    FileExistsError
        If the file exists and ``overwrite`` is False.
    FileNotFoundError
        If its folder does not exist.
    KeyError
        If there is no such image or channel.
    TypeError
        If OME-TIFF has no such type of pixels.
    ValueError
        If a channel is named twice, or the image is three-dimensional.

    See Also
    --------
    pixnet.io.write_geojson : Values of spots, cells or bins for QuPath.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.io.write_ome_tiff(sdata, "he", "he.ome.tif", channels=["r", "b"])
    """
    import tifffile

    from pixnet._names import listed
    from pixnet._sdata.inputs import check_sdata
    from pixnet._sdata.pixel_size import find_mpp
    from pixnet._sdata.rasters import channel_names, full_resolution, levels
    from pixnet._sdata.store.bound import check_bound

    check_sdata(sdata)
    if image_key not in sdata.images:
        raise KeyError(f"no image {image_key!r} in this object (image_key=); it has: {listed(sdata.images)}")
    image = sdata.images[image_key]
    if full_resolution(image).dims != ("c", "y", "x"):
        raise ValueError(f"image {image_key!r} has dimensions {full_resolution(image).dims}; 2D images are written")
    known = channel_names(image)
    names = known if channels is None else check_genes(channels, among=known, where=f"image {image_key!r}")
    if dtype not in {None, "uint16"}:
        raise ValueError(f"dtype is {dtype!r}; valid: None (the image's own), 'uint16'")
    if full_resolution(image).dtype.name not in DTYPES:
        raise TypeError(f"image {image_key!r} is {full_resolution(image).dtype}; OME-TIFF takes: {listed(DTYPES)}")
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    mpp = find_mpp(sdata, image_key)
    if mpp is None:
        logger.warning(
            "the pixel size (µm/px) of image %r is unknown, so that %s does not state it; see pixnet.pp.set_mpp",
            image_key,
            path.name,
        )
    check_bound(image, f"image {image_key!r}")

    at = [known.index(name) for name in names]
    pyramid = [level.data.data for level in levels(image)]
    while max(pyramid[-1].shape[1:]) > SMALLEST and min(pyramid[-1].shape[1:]) >= 2:
        pyramid.append(_halved(pyramid[-1]))
    factors = _factors(pyramid[0], at) if dtype == "uint16" else None
    metadata: dict[str, Any] = {"axes": "CYX", "Name": image_key, "Channel": {"Name": names}}
    if mpp is not None:
        metadata |= {f"PhysicalSize{axis}": mpp for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    if factors is not None:
        metadata["Description"] = json.dumps({"value of 1": dict(zip(names, factors.tolist()))})

    with whole_file(path) as partial:
        with tifffile.TiffWriter(partial, bigtiff=True, ome=True) as tiff:
            for i, array in enumerate(pyramid):
                with tempfile.TemporaryFile(dir=path.parent) as spool:
                    tiff.write(
                        _tiles(array, at, factors, cast("IO[bytes]", spool)),
                        shape=(len(at), *array.shape[1:]),
                        dtype=np.dtype(dtype or array.dtype),
                        tile=(TILE, TILE),
                        compression="zlib",
                        photometric="minisblack",
                        resolutionunit="CENTIMETER",
                        resolution=None if mpp is None else (1e4 * array.shape[2] / (mpp * pyramid[0].shape[2]),) * 2,
                        **({"subifds": len(pyramid) - 1, "metadata": metadata} if i == 0 else {"subfiletype": 1}),
                    )
        check_bound(image, f"image {image_key!r}")
    logger.info("%d channels of %r written to %s", len(at), image_key, path)


def _halved(array: da.Array) -> da.Array:
    """Return means of 2 x 2 pixels over those that have a value, lazily."""
    import dask.array as da

    mean = da.coarsen(_mean, array, {1: 2, 2: 2}, trim_excess=True)
    return (mean if array.dtype.kind == "f" else da.rint(mean)).astype(array.dtype)


def _mean(values: NDArray, axis: Any = None) -> NDArray:
    there = ~np.isnan(values)
    total = np.where(there, values, 0).sum(axis=axis)
    with np.errstate(invalid="ignore"):
        return total / there.sum(axis=axis)


def _windows(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the origins of the tiles, row by row."""
    return list(product(range(0, shape[1], TILE), range(0, shape[2], TILE)))


def _factors(array: da.Array, channels: list[int]) -> NDArray[np.float64]:
    """Return what 1 of 65,535 stands for in each channel; one pass over the pixels."""
    largest = np.zeros(len(channels))
    for _, found in run(_largest, (array, channels), _windows(array.shape), ordered=True):
        largest = np.maximum(largest, found)
    return np.where(largest > 0, largest, 1) / np.iinfo(np.uint16).max


def _largest(array: da.Array, channels: list[int], y: int, x: int) -> NDArray:
    return np.fmax.reduce(_read(array, channels, y, x).reshape(len(channels), -1), axis=1, initial=0)


def _read(array: da.Array, channels: list[int], y: int, x: int) -> NDArray:
    part = array[channels, y : y + TILE, x : x + TILE]
    return np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)


def _compressed(array: da.Array, channels: list[int], factors: NDArray | None, y: int, x: int) -> list[bytes]:
    """Return a tile of each channel, as the file holds it."""
    part = _read(array, channels, y, x)
    if factors is not None:
        part = np.nan_to_num(np.rint(part / factors[:, None, None])).clip(0, 65_535).astype(np.uint16)
    part = np.pad(part, ((0, 0), (0, TILE - part.shape[1]), (0, TILE - part.shape[2])))
    return [zlib.compress(channel.tobytes(), 4) for channel in part]


def _tiles(array: da.Array, channels: list[int], factors: NDArray | None, spool: IO[bytes]) -> Iterator[bytes]:
    """Yield compressed tiles, channel by channel.

    A chunk of the image holds many channels, and the file wants one channel after the other. So that each chunk is read
    only once, compressed tiles wait in a file.
    """
    windows = _windows(array.shape)
    places: list[list[tuple[int, int]]] = [[] for _ in channels]
    for _, tiles in run(_compressed, (array, channels, factors), windows, ordered=True):
        for place, tile in zip(places, tiles):
            place.append((spool.tell(), len(tile)))
            spool.write(tile)
    for start, length in (one for place in places for one in place):
        spool.seek(start)
        yield spool.read(length)
