"""What a TIFF states about itself: checks against damage and absurd sizes, the RGB series, um/px."""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet.io._raster import MAX_RATIO, RATIO_FROM

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

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
        um per pixel in x and y, or None.
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
    """Whether a file begins as TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}


def inspect(path: Path) -> TiffContent:
    """Read the directory of a TIFF; no pixel is decoded.

    Raises
    ------
    ValueError
        If the file is truncated or damaged, declares far more pixels than it can hold, or holds no 8-bit RGB picture.
    """
    with open_tiff(path) as tiff:
        check_whole(tiff, path)
        series = _choose(tiff, path)
        content = tiff.series[series]
        _check_rgb(content, path)
        page = content.levels[0].pages[0] or content.keyframe
        keyframe = content.keyframe
        tile = (
            (keyframe.tilelength, keyframe.tilewidth)
            if keyframe.is_tiled
            else (keyframe.rowsperstrip, keyframe.imagewidth)
        )
        return TiffContent(
            series=series,
            axes=content.axes,
            levels=[tuple(level.shape) for level in content.levels if level.axes == content.axes],
            tile=(min(tile[0] or keyframe.imagelength, keyframe.imagelength), tile[1]),
            mpp=_ome_mpp(tiff, series) or _tag_mpp(page),
        )


def open_tiff(path: Path) -> TiffFile:
    """Open a TIFF, or say that it is damaged."""
    import tifffile

    complaints = _Complaints()
    try:
        with complaints:
            tiff = tifffile.TiffFile(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable TIFF: damaged or truncated ({error})") from error
    try:
        with complaints:
            found = len(tiff.pages) > 0 and len(tiff.series) > 0
    except Exception as error:
        tiff.close()
        raise ValueError(f"{path} is not a readable TIFF: damaged or truncated ({error})") from error
    if not found:
        tiff.close()
        raise ValueError(f"{path} is a TIFF without a picture: damaged or truncated")
    if complaints.lost:
        tiff.close()
        raise ValueError(f"{path} is truncated or damaged: {complaints.lost[0]}")
    return tiff


class _Complaints(logging.Handler):
    """What tifffile logs while it reads a directory: it goes on without entries that lie beyond the end of the file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lost: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "invalid value offset" in message or "invalid offset" in message:
            self.lost.append(message)

    def __enter__(self) -> None:
        source = logging.getLogger("tifffile")
        self.propagate, source.propagate = source.propagate, False
        source.addHandler(self)

    def __exit__(self, *error: object) -> None:
        source = logging.getLogger("tifffile")
        source.removeHandler(self)
        source.propagate = self.propagate


def check_whole(tiff: TiffFile, path: Path) -> None:
    """Refuse a file that ends before its pixels do, or that declares far more of them than it can hold."""
    size = path.stat().st_size
    for series in tiff.series:
        for level in series.levels:
            page = level.keyframe
            offsets = np.asarray(page.dataoffsets, dtype=np.int64)
            counts = np.asarray(page.databytecounts, dtype=np.int64)
            sizes = f"{page.imagewidth:,} x {page.imagelength:,} px"
            if page.is_tiled:
                piece = page.tilewidth * page.tilelength
                pieces = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
                planes = page.samplesperpixel if page.planarconfig == 2 else 1
                if len(offsets) < pieces * planes and len(level.pages) == 1:
                    raise ValueError(
                        f"{path} declares {sizes} but lists {len(offsets):,} of {pieces * planes:,} tiles: damaged"
                    )
            else:
                piece = min(page.rowsperstrip or page.imagelength, page.imagelength) * page.imagewidth
                pieces = len(offsets)
            declared = page.imagewidth * page.imagelength * page.samplesperpixel * max(1, page.bitspersample // 8)
            empty = float((counts == 0).mean()) if len(counts) else 1.0
            if declared * (1 - empty) > RATIO_FROM and declared * (1 - empty) > MAX_RATIO * size or not len(counts):
                raise ValueError(
                    f"{path} declares {sizes} ({declared:,} bytes) in a file of {size:,} bytes: it is damaged, or made to "
                    "exhaust memory"
                )
            if page.is_tiled and piece > MAX_TILE_PIXELS:
                raise ValueError(f"{path} declares tiles of {piece:,} px, more than {MAX_TILE_PIXELS:,}: damaged?")
            end = int((offsets + counts)[counts > 0].max(initial=0))
            if end > size:
                raise ValueError(f"{path} is truncated: its pixels end at byte {end:,}, the file at {size:,}")


def _choose(tiff: TiffFile, path: Path) -> int:
    """Find the series with the largest picture: labels, thumbnails and macro pictures are smaller."""

    def area(series: TiffPageSeries) -> int:
        return series.keyframe.imagewidth * series.keyframe.imagelength

    return max(range(len(tiff.series)), key=lambda i: (area(tiff.series[i]), -i))


def _check_rgb(series: TiffPageSeries, path: Path) -> None:
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
            f"{path} is no H&E picture: it has {', '.join(problems)}, and 8-bit RGB is needed. If it is another kind of "
            "image, read it with spatialdata-io; if it is H&E, convert it to RGB"
        )


def _named_rgb(series: TiffPageSeries) -> bool:
    """Whether the channels of an OME-TIFF are red, green and blue kept apart."""
    parent = series.keyframe.parent
    try:
        root = ElementTree.fromstring(parent.ome_metadata or "<none/>")
    except ElementTree.ParseError:
        return False
    pixels = root.find(".//{*}Pixels")
    names = [] if pixels is None else [(c.get("Name") or "").lower() for c in pixels.findall("{*}Channel")]
    return [name[:1] for name in names] == ["r", "g", "b"]


def _ome_mpp(tiff: TiffFile, series: int) -> tuple[float, float] | None:
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


def _tag_mpp(page: TiffPage) -> tuple[float, float] | None:
    tags: Any = page.tags
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(tags.valueof("ResolutionUnit", default=2)))
    values = []
    for name in ("XResolution", "YResolution"):
        value = tags.valueof(name)
        if value is None or unit is None or value[0] == 0 or value[1] == 0:
            return None
        values.append(unit * value[1] / value[0])
    return plausible(values[0], values[1])


def plausible(x: float, y: float) -> tuple[float, float] | None:
    """um/px as stated, or None where it can only be a default such as 72 dots per inch."""
    low, high = PLAUSIBLE_MPP
    if low <= x <= high and low <= y <= high:
        return x, y
    return None
