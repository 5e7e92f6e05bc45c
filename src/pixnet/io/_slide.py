"""Whole-slide images as SpatialData."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pixnet._logging import logger
from pixnet._sdata.raster_element import Array, Scales, extend, pyramid, raster_element
from pixnet.io import _tiff
from pixnet.io._lazy import OpenSlideLevel, TiffLevel
from pixnet.io._picture import MAX_WHOLE_PIXELS, open_picture, read_picture

if TYPE_CHECKING:
    from spatialdata import SpatialData

# Levels are added to a file whose coarsest level has more pixels than this along its longer side.
COARSEST = 4096
_MULTI_FILE = {".mrxs", ".dcm", ".vms", ".vmu", ".svslide", ".czi"}


def slide(
    path: str | PathLike[str], *, mpp: float | Literal[False] | None = None, image_key: str = "he"
) -> SpatialData:
    """Open a whole-slide image; pixels are read when they are used.

    The formats are Aperio SVS, Hamamatsu NDPI, MIRAX, Leica SCN, Philips, Ventana, DICOM (any file of the series) and
    all others that OpenSlide reads, OME-TIFF and generic (pyramidal) TIFF with JPEG, JPEG 2000 and other compressions,
    and plain JPEG and PNG.

    Parameters
    ----------
    path
        The file.
    mpp
        Pixel size of the finest level (µm/px), in place of what the file states. ``False`` leaves it unknown, to be
        measured with :func:`pixnet.pp.infer_mpp`.
    image_key
        Name of the image element.

    Returns
    -------
    SpatialData
        One multiscale image ``uint8 (3, y, x)`` in coordinate systems ``"global"`` (pixels of the finest level) and
        ``"um"``, with the pixel size recorded as by :func:`pixnet.pp.set_mpp`. Transparent pixels are white. An image
        of one row or column has a single scale.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If ``path`` is not a file.
    TypeError
        If ``mpp`` is not a number, False or None.
    ValueError
        If the file is truncated or damaged, is not 8-bit RGB, cannot be read tile by tile and is too large to be
        decoded at once, or states no pixel size where ``mpp`` is None.
    OSError
        When pixels are read, if the file is damaged there.
    ImportError
        If the reader is not installed.

    Examples
    --------
    >>> import numpy as np, pixnet as px
    >>> from PIL import Image
    >>> Image.fromarray(np.full((400, 300, 3), 240, dtype=np.uint8)).save("small.png")
    >>> sdata = px.io.slide("small.png", mpp=0.5)
    >>> sdata["he"]["scale0"]["image"].shape
    (3, 400, 300)
    """
    from spatialdata import SpatialData
    from spatialdata.transformations import Identity, Scale

    from pixnet._sdata.describe import describe
    from pixnet._sdata.pixel_size import check_mpp

    path = Path(path).expanduser()
    if mpp is not None and mpp is not False:
        mpp = check_mpp(mpp)

    levels, scales, stated = read_levels(path)
    value = _resolution(path, mpp, stated)
    transformations: dict[str, Any] = {"global": Identity()}
    if value is not None:
        transformations["um"] = Scale([value, value], axes=("x", "y"))
    sdata = SpatialData(images={image_key: raster_element(levels, scales, transformations=transformations)})
    describe(sdata, {} if value is None else {image_key: value}, image_key=image_key)
    return sdata


def _resolution(path: Path, mpp: float | Literal[False] | None, stated: tuple[float, float] | None) -> float | None:
    """Return the pixel size (µm/px) to record: the one given, else the one that the file states."""
    if mpp is False:
        return None
    if mpp is not None:
        if stated is not None and abs(np.log(mpp / stated[0])) > np.log(1.05):
            logger.warning("%s states %.4g µm/px; mpp=%g is used instead", path.name, stated[0], mpp)
        return float(mpp)
    if stated is None:
        raise ValueError(
            f"{path} does not state its pixel size: give mpp= (µm/px, about 0.25 at 40x and 0.5 at 20x), or "
            "mpp=False and record it later with pixnet.pp.set_mpp or pixnet.pp.infer_mpp"
        )
    x, y = stated
    if abs(x - y) > 0.01 * max(x, y):
        raise ValueError(
            f"{path} states {x:.4g} µm/px in x and {y:.4g} µm/px in y; square pixels are needed: give mpp="
        )
    return float((x + y) / 2)


Levels = tuple[Sequence[Array], Sequence[Scales], tuple[float, float] | None]


def read_levels(path: Path) -> Levels:
    """Return the levels, finest first, their scales in level-0 pixels (y, x), and the stated µm/px (x, y)."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file (of a DICOM series: any of its files)")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if _tiff.is_tiff(path):
        _need("imagecodecs", "tifffile")
        with _tiff.open_tiff(path) as tiff:
            scanner = any(getattr(tiff, f"is_{name}", False) for name in ("svs", "ndpi", "scn", "bif", "philips"))
        if scanner:
            _need("openslide")
        if find_spec("openslide") and _vendor(path) not in {None, "generic-tiff"}:
            return _read_openslide(path)
        return _read_tiff(path)
    if path.suffix.lower() in _MULTI_FILE:
        _need("openslide")
    if find_spec("openslide") and _vendor(path) is not None:
        return _read_openslide(path)
    if _is_dicom(path):
        _need("openslide")
        raise ValueError(_not_a_slide(path, "it is not a whole-slide image"))
    return _read_picture(path)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _not_a_slide(path: Path, why: object) -> str:
    return (
        f"{path} is a DICOM file that OpenSlide does not read ({why}). It reads whole-slide microscopy images in tiles (JPEG, "
        "JPEG 2000 or uncompressed) with all files of their series in one folder. Convert others to a tiled pyramidal TIFF: "
        "other readers may decode them"
    )


def _need(*modules: str) -> None:
    """Refuse to go on without the packages that read this kind of file."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        packages = " ".join("openslide-bin openslide-python" if name == "openslide" else name for name in missing)
        raise ImportError(
            f"reading this file needs {', '.join(missing)}, which came with pixnet: pip install {packages}"
        )


def _vendor(path: Path) -> str | None:
    """Return the format that OpenSlide recognises, if any."""
    import openslide

    try:
        return openslide.OpenSlide.detect_format(str(path))
    except openslide.OpenSlideError:
        return None


def _read_openslide(path: Path) -> Levels:
    """Open a file with OpenSlide."""
    import openslide

    try:
        with openslide.OpenSlide(str(path)) as file:
            dimensions, downsamples = file.level_dimensions, file.level_downsamples
            properties = dict(file.properties)
    except openslide.OpenSlideError as error:
        if _is_dicom(path):
            raise ValueError(_not_a_slide(path, error)) from error
        raise ValueError(f"{path} is damaged, or lacks the files that belong to it: {error}") from error
    levels: list[Array] = []
    scales = []
    for i, ((width, height), down) in enumerate(zip(dimensions, downsamples)):
        rows, columns = (int(properties.get(f"openslide.level[{i}].tile-{side}", 256)) for side in ("height", "width"))
        levels.append(OpenSlideLevel(path, i, (height, width), down).lazy((rows, columns)))
        scales.append(_scale(dimensions[0][::-1], (height, width)))
    try:
        stated = _tiff.plausible(float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"]))
    except (KeyError, ValueError):
        stated = None
    return *extend(levels, scales, COARSEST), stated


def _read_tiff(path: Path) -> Levels:
    """Open a TIFF tile by tile, or decode a small one at once."""
    content = _tiff.inspect(path)
    rows, columns = content.tile
    if rows * columns > _tiff.MAX_TILE_PIXELS or max(content.shape) <= 2048:
        if content.shape[0] * content.shape[1] > MAX_WHOLE_PIXELS:
            raise ValueError(
                f"{path} keeps {content.shape[1]:,} x {content.shape[0]:,} px in one piece, which must be decoded at once; "
                "convert it to a tiled pyramidal TIFF"
            )
        whole = TiffLevel(path, content.series, 0, content.axes, content.levels[0])[:]
        return *pyramid(whole), content.mpp
    y, x = content.axes.index("Y"), content.axes.index("X")
    levels: list[Array] = [
        TiffLevel(path, content.series, i, content.axes, sizes).lazy(content.tile)
        for i, sizes in enumerate(content.levels)
    ]
    scales = [_scale(content.shape, (sizes[y], sizes[x])) for sizes in content.levels]
    return *extend(levels, scales, COARSEST), content.mpp


def _read_picture(path: Path) -> Levels:
    """Decode a JPEG or PNG."""
    picture = open_picture(path)
    # Pillow gives dots per inch; 72 and the like are meaningless defaults.
    dots = picture.info.get("dpi", (0, 0))
    stated = _tiff.plausible(25_400 / float(dots[0]), 25_400 / float(dots[1])) if min(dots) > 0 else None
    return *pyramid(read_picture(path)), stated


def _scale(full: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Return level-0 pixels per pixel: the whole number that scanners mean, where the sizes allow it."""
    scales = []
    for large, small in zip(full, size):
        whole = round(large / small)
        scales.append(float(whole) if abs(large / whole - small) < 1 else large / small)
    return scales[0], scales[1]
