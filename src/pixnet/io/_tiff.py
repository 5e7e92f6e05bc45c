"""The directory of a TIFF: its RGB series, its pixel size, and whether its pixels are all there."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

# A tile, or a strip, is decoded in one piece.
MAX_TILE_PIXELS = 1 << 26
PLAUSIBLE_MPP = (0.05, 20.0)
_TO_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "å": 1e-4}


@dataclass
class TiffContent:
    """The picture in a TIFF.

    Attributes
    ----------
    series
        Position of the series.
    axes
        Its axes as tifffile names them, such as ``"YXS"``.
    levels
        Sizes of its levels in those axes, finest first.
    tile
        Rows and columns that are decoded in one piece.
    mpp
        Pixel size (µm/px) in x and y, or None.
    """

    series: int
    axes: str
    levels: list[tuple[int, ...]] = field(default_factory=list)
    tile: tuple[int, int] = (1, 1)
    mpp: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the finest level."""
        return self.levels[0][self.axes.index("Y")], self.levels[0][self.axes.index("X")]


def is_tiff(path: Path) -> bool:
    """Return whether a file begins as TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}


def inspect(path: Path) -> TiffContent:
    """Read the directory of a TIFF; no pixel is decoded.

    Raises
    ------
    ValueError
        If the file is truncated or damaged, or holds no 8-bit RGB picture.
    """
    with open_tiff(path) as tiff:
        series = _largest(tiff)
        content = tiff.series[series]
        _check_rgb(content, path)
        keyframe = content.keyframe
        rows, columns = (
            (keyframe.tilelength, keyframe.tilewidth)
            if keyframe.is_tiled
            else (keyframe.rowsperstrip or keyframe.imagelength, keyframe.imagewidth)
        )
        return TiffContent(
            series=series,
            axes=content.axes,
            levels=[tuple(level.shape) for level in content.levels if level.axes == content.axes],
            tile=(min(rows, keyframe.imagelength), columns),
            mpp=ome_mpp(tiff, series) or _tag_mpp(content.levels[0].pages[0] or keyframe),
        )


def open_tiff(path: Path) -> TiffFile:
    """Open a TIFF, or say that it is damaged: its directory unreadable, or its pixels not all there."""
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
        pages = [level.keyframe for series in tiff.series for level in series.levels]
        tiff.filehandle.seek(tiff.pages.next_page_offset or 0)
        next_page = int.from_bytes(
            tiff.filehandle.read(tiff.tiff.offsetsize), "little" if tiff.byteorder == "<" else "big"
        )
    except Exception as error:
        raise ValueError(f"{path} is not a readable TIFF: damaged or truncated ({error})") from error
    size = path.stat().st_size
    problem = "" if pages else "is a TIFF without a picture: damaged or truncated"
    if next_page >= size:  # tifffile stops there without an error, and a thumbnail would pass for the slide
        problem = f"is truncated: its next page lies at byte {next_page:,}, the file ends at byte {size:,}"
    for page in pages:
        offsets, counts = (np.asarray(v, dtype=np.int64) for v in (page.dataoffsets, page.databytecounts))
        needed = math.prod(page.chunked)
        listed = min(len(offsets), len(counts))
        if listed < needed:
            problem = (
                f"declares {page.imagewidth:,} x {page.imagelength:,} px but lists {listed:,} of {needed:,} tiles or "
                "strips: damaged or truncated"
            )
        elif (end := int((offsets + counts)[counts > 0].max(initial=0))) > size:
            problem = f"is truncated: its pixels end at byte {end:,}, the file at byte {size:,}"
    if problem:
        tiff.close()
        raise ValueError(f"{path} {problem}")
    return tiff


def _largest(tiff: TiffFile) -> int:
    """Return the series with the largest picture: labels, thumbnails and macro pictures are smaller."""
    sizes = [series.keyframe.imagewidth * series.keyframe.imagelength for series in tiff.series]
    return sizes.index(max(sizes))


def _check_rgb(series: TiffPageSeries, path: Path) -> None:
    """Refuse a series that is not an 8-bit RGB picture."""
    sizes = dict(zip(series.axes, series.shape))
    problems = []
    stacks = {"Z": "z planes", "T": "time points", "I": "pictures", "Q": "pictures"}
    problems += [f"{sizes[axis]} {name}" for axis, name in stacks.items() if sizes.get(axis, 1) > 1]
    if sizes.get("C", 1) > 1 and not (sizes["C"] == 3 and "S" not in sizes and _named_rgb(series)):
        problems.append(f"{sizes['C']} separate channels (fluorescence?)")
    elif "C" not in sizes and "S" not in sizes or sizes.get("C", sizes.get("S", 1)) == 1:
        problems.append("one channel (greyscale)")
    elif sizes.get("S", 3) not in {3, 4}:
        problems.append(f"{sizes['S']} samples a pixel")
    if series.dtype != np.uint8:
        problems.append(f"pixels of type {series.dtype}")
    if not {"Y", "X"} <= set(sizes):
        problems.append(f"axes {series.axes}")
    if problems:
        raise ValueError(
            f"{path} is not an H&E picture: it has {', '.join(problems)}; 8-bit RGB is needed. If it is another kind of "
            "image, read it with spatialdata-io; if it is H&E, convert it to RGB"
        )


def _named_rgb(series: TiffPageSeries) -> bool:
    """Return whether the channels of an OME-TIFF are red, green and blue, stored apart."""
    parent = series.keyframe.parent
    try:
        root = ElementTree.fromstring(parent.ome_metadata or "<none/>")
    except ElementTree.ParseError:
        return False
    pixels = root.find(".//{*}Pixels")
    names = [] if pixels is None else [(c.get("Name") or "").lower() for c in pixels.findall("{*}Channel")]
    return [name[:1] for name in names] == ["r", "g", "b"]


def ome_mpp(tiff: TiffFile, series: int) -> tuple[float, float] | None:
    """Return the pixel size (µm/px, x and y) that OME metadata states."""
    if not tiff.is_ome:
        return None
    try:
        root = ElementTree.fromstring(tiff.ome_metadata or "<none/>")
    except ElementTree.ParseError:
        return None
    images = root.findall(".//{*}Image/{*}Pixels")
    if not images:
        return None
    pixels = images[min(series, len(images) - 1)]
    values = []
    for axis in "XY":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        factor = _TO_UM.get(unit.strip().lower())
        try:
            values.append(float(size) * factor)  # type: ignore[arg-type, operator]
        except TypeError:  # not stated, or in pixels or the stage's units
            return None
        except ValueError:
            return None
    return plausible(values[0], values[1])


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    """Return the pixel size (µm/px, x and y) that the tags of a page state."""
    tags = page.tags
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(tags.valueof("ResolutionUnit", default=2)))
    values = []
    for name in ("XResolution", "YResolution"):
        value = tags.valueof(name)
        if value is None or unit is None or value[0] == 0 or value[1] == 0:
            return None
        values.append(unit * value[1] / value[0])
    return plausible(values[0], values[1])


def plausible(x: float, y: float) -> tuple[float, float] | None:
    """Return the stated pixel size (µm/px), or None where it can only be a default such as 72 dots per inch."""
    low, high = PLAUSIBLE_MPP
    if low <= x <= high and low <= y <= high:
        return x, y
    return None
