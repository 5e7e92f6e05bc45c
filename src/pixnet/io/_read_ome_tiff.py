"""A map from OME-TIFF: one that pixnet wrote, or another program's."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet._logging import logger
from pixnet.io import _tiff

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree


def read_ome_tiff(
    sdata: SpatialData,
    path: str | PathLike[str],
    *,
    image_key: str | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    inplace: bool = True,
) -> DataArray | DataTree | None:
    """Read a map from OME-TIFF, such as one of :func:`write_ome_tiff` or of another program, over its slide.

    The map has to cover the slide, at any pixel size. :func:`pixnet.tl.aggregate` sums it over shapes like any image;
    one with a channel ``"__total__"`` is a gene map.

    Parameters
    ----------
    sdata
        Object that holds the slide.
    path
        The file: one picture with any number of channels. Pixels are read when they are used.
    image_key
        The slide that the map covers; ``None``: the recorded one, else the only one.
    key_added
        Name of the image element; ``None`` is the name of the file without its endings.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    DataArray, DataTree or None
        Image ``(c, y, x)`` with the names of the channels, in the coordinate systems of the slide.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If there is no such slide.
    ValueError
        If the file is not a readable TIFF or not a plane of channels, does not cover the slide, or ``key_added``
        exists.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.io.write_ome_tiff(sdata, "truth", "genes.ome.tif")
    >>> px.io.read_ome_tiff(sdata, "genes.ome.tif")
    >>> "genes" in sdata
    True
    """
    import dask.array as da
    import tifffile
    import zarr
    from spatialdata.transformations import Scale
    from spatialdata.transformations import Sequence as Chain

    from pixnet._sdata.pixel_size import set_pixel_size
    from pixnet._sdata.raster_element import raster_element
    from pixnet._sdata.slide import Slide
    from pixnet._sdata.store.element_store import put
    from pixnet._sdata.target import check_target

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    slide = Slide.open(sdata, image_key)
    key_added = path.name.split(".")[0] if key_added is None else key_added
    if inplace:
        check_target(sdata, key_added, "images", overwrite=overwrite)

    with _tiff.open_tiff(path) as tiff:
        series = tiff.series[0]
        if series.axes not in {"CYX", "YX"}:
            raise ValueError(f"{path} has axes {series.axes}; a map is a plane of channels (CYX)")
        sizes = [level.shape for level in series.levels if level.axes == series.axes]
        names, factors = _described(tiff, sizes[0][0] if series.axes == "CYX" else 1)
        mpp = _tiff.ome_mpp(tiff, 0)
    height, width = slide.image.sizes["y"], slide.image.sizes["x"]
    scale = height / sizes[0][-2] if mpp is None else mpp[0] / slide.mpp
    off = max(abs(sizes[0][-2] * scale - height), abs(sizes[0][-1] * scale - width))
    if off > 2 * scale:  # pixels at the edges may reach beyond the slide, or be left out
        stated = "" if mpp is None else f" of {mpp[0]:g} µm"
        raise ValueError(
            f"{path} has {sizes[0][-1]} x {sizes[0][-2]} px{stated}, which do not cover image {slide.key!r} of {width} x {height} px "
            f"of {slide.mpp:g} µm: is it a map of this slide?"
        )

    arrays = []
    for level in range(len(sizes)):
        stored: Any = zarr.open(tifffile.imread(path, aszarr=True, series=0, level=level), mode="r")
        array = da.from_array(stored, chunks=stored.chunks, name=False)
        array = array if array.ndim == 3 else array[None]
        if factors is not None:
            array = array.astype(np.float32) * factors[:, None, None]
        arrays.append(array.rechunk({0: -1}))
    whole = [(float(round(sizes[0][-2] / size[-2])), float(round(sizes[0][-1] / size[-1]))) for size in sizes]
    to_slide = Scale([scale, scale], axes=("x", "y"))
    systems = {name: Chain([to_slide, value]) for name, value in slide.systems.items()}
    element = raster_element(arrays, whole, transformations=systems, channels=names)
    set_pixel_size(element, scale * slide.mpp)
    if not inplace:
        return element
    put(sdata, key_added, element, overwrite=overwrite)
    logger.info("%d channels of %s added as %r", len(names), path.name, key_added)
    return None


def _described(tiff: Any, n: int) -> tuple[list[str], np.ndarray | None]:
    """Return the names of the channels, and the values of 1 of numbers that pixnet scaled."""
    names, factors = [f"channel_{i}" for i in range(n)], None
    try:
        root = ElementTree.fromstring(tiff.ome_metadata or "<none/>")
    except ElementTree.ParseError:
        return names, None
    found = [channel.get("Name") for channel in root.findall(".//{*}Image/{*}Pixels/{*}Channel")]
    if len(found) == n and all(found) and len(set(found)) == n:
        names = [str(name) for name in found]
    about = root.find(".//{*}Image/{*}Description")
    if about is not None and about.text and about.text.startswith('{"value of 1"'):
        values = json.loads(about.text)["value of 1"]
        factors = np.array([values[name] for name in names], dtype=np.float32)
    return names, factors
