"""Annotations and cells of QuPath, or any other GeoJSON in pixels of a slide, as a shapes element."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from pixnet._core.geojson import RESERVED, Features, read_features
from pixnet._core.placement import PointLookup
from pixnet._logging import logger

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

    from pixnet._sdata.slide import Slide

# Below this share of objects in the image the file is refused; below this share on tissue a warning is given.
IN_IMAGE, ON_TISSUE = 0.5, 0.5
# The file is taken to be in µm where this many more of its objects, at least 20, would then be on tissue.
LOOKS_UM, ENOUGH = 0.25, 20


def read_geojson(
    sdata: SpatialData,
    path: str | PathLike[str],
    *,
    image_key: str | None = None,
    key_added: str | None = None,
    unit: Literal["px", "um"] | None = None,
    measurements: bool = True,
    overwrite: bool = False,
    inplace: bool = True,
) -> GeoDataFrame | None:
    """Read cells or annotations from GeoJSON, as QuPath exports them, into a shapes element.

    The file is read one object at a time. Rings that cross themselves or are not closed are repaired. Objects without
    an area (points, lines) are left out. A warning counts both.

    Parameters
    ----------
    sdata
        Object that holds the slide.
    path
        A ``.geojson`` or ``.json`` file, plain or packed with gzip: a FeatureCollection, or a list of features.
    image_key
        The image on which the objects were drawn; ``None``: the recorded one, else the only one.
    key_added
        Name of the shapes element; ``None`` is the name of the file without its ending.
    unit
        What the coordinates are: ``"px"``, pixels of the image at full resolution, as QuPath writes them, or ``"um"``,
        µm from its upper left corner. ``None`` is ``"px"``, and a file that looks as if it were in µm is refused.
    measurements
        Read the measurements of the objects, too.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    GeoDataFrame or None
        Polygons and multipolygons in the image's pixels and coordinate systems. The index holds the ids of the objects
        if each has its own, else numbers from 1 on. Columns are ``classification``, ``object_type`` and ``name`` where
        the file has them, and one for each measurement (NaN where an object has none).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If there is no such image.
    ValueError
        If the file is damaged, is not GeoJSON, holds nothing with an area, or most of its objects lie outside the
        image; if it looks as if it were in µm; or if ``key_added`` exists.

    See Also
    --------
    pixnet.io.write_geojson : The way back.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.io.write_geojson(sdata, "spots", "spots.geojson")
    >>> px.io.read_geojson(sdata, "spots.geojson", key_added="from_qupath")
    >>> len(sdata["from_qupath"]) == len(sdata["spots"])
    True
    """
    import geopandas
    from spatialdata.models import ShapesModel

    from pixnet._sdata.slide import Slide
    from pixnet._sdata.store.element_store import put
    from pixnet._sdata.target import check_target

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if unit not in {None, "px", "um"}:
        raise ValueError(f"unit is {unit!r}; valid: 'px', 'um'")
    slide = Slide.open(sdata, image_key)
    key_added = path.name.split(".")[0] if key_added is None else key_added
    if inplace:
        check_target(sdata, key_added, "shapes", overwrite=overwrite)

    features = read_features(path)
    kept = np.flatnonzero(~shapely.is_missing(features.geometries))
    _say_what_changed(features, path)
    if len(kept) == 0:
        raise ValueError(f"{path} holds nothing with an area: pixnet works on polygons and multipolygons")
    geometries = features.geometries[kept]
    if unit == "um":
        geometries = shapely.transform(geometries, lambda xy: xy / slide.mpp)
    _check_place(slide, geometries, path, unit)

    columns: dict[str, object] = {}
    for name, values in features.columns.items():
        if any(value is not None for value in values):
            column = pd.Series(values, dtype=object).iloc[kept].reset_index(drop=True)
            columns[name] = column.astype("category") if name != "name" else column
    for name, numbers in features.measurements.items() if measurements else ():
        columns[f"measured {name}" if name in RESERVED else name] = numbers[kept]
    frame = geopandas.GeoDataFrame(columns, geometry=geometries)
    frame.index = _index([features.ids[i] for i in kept])
    element = ShapesModel.parse(frame, transformations=slide.systems)
    if not inplace:
        return element
    put(sdata, key_added, element, overwrite=overwrite)
    logger.info("%d objects of %s added as %r", len(element), path.name, key_added)
    return None


def _index(ids: list[object]) -> pd.Index:
    """Return the ids of the objects if they are unique, else numbers."""
    numbers = all(isinstance(one, int) for one in ids)
    index = pd.Index(ids) if numbers else pd.Index([str(one) for one in ids])
    if None in ids or not index.is_unique:
        if any(one is not None for one in ids):
            logger.warning("ids of the objects are missing or repeated; they are numbered from 1 on")
        return pd.RangeIndex(1, len(ids) + 1)
    return index


def _say_what_changed(features: Features, path: Path) -> None:
    """Log what was left out and what was repaired, with the first ids."""

    def named(which: NDArray[np.bool_]) -> str:
        first = [
            features.ids[i] if features.ids[i] is not None else f"number {i + 1}" for i in np.flatnonzero(which)[:3]
        ]
        return ", ".join(map(str, first)) + (", ..." if which.sum() > 3 else "")

    missing = shapely.is_missing(features.geometries)
    without = sum(features.kinds.values())
    if without:
        kinds = ", ".join(f"{n} {kind}" for kind, n in features.kinds.items())
        logger.warning("%s: %d objects without an area are left out (%s)", path.name, without, kinds)
    broken = features.repaired & missing
    if broken.any():
        logger.warning(
            "%s: %d objects are left out, their rings enclose nothing: %s", path.name, broken.sum(), named(broken)
        )
    repaired = features.repaired & ~missing
    if repaired.any():
        logger.warning(
            "%s: %d objects had invalid rings and were repaired: %s", path.name, repaired.sum(), named(repaired)
        )


def _check_place(slide: Slide, geometries: NDArray, path: Path, unit: str | None) -> None:
    """Refuse objects that belong to another slide or are in other units."""
    from pixnet._sdata.tissue import read_mask

    x0, y0, x1, y1 = shapely.bounds(geometries).T
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    width, height = slide.image.sizes["x"], slide.image.sizes["y"]
    inside = float(((x >= 0) & (y >= 0) & (x < width) & (y < height)).mean())
    if inside < IN_IMAGE:
        raise ValueError(
            f"{1 - inside:.0%} of the {len(x)} objects of {path} lie outside image {slide.key!r} of {width} x {height} px: "
            f"x runs from {x0.min():.0f} to {x1.max():.0f}, y from {y0.min():.0f} to {y1.max():.0f}. Coordinates are pixels of "
            "the slide at full resolution: is the file of this slide, and is the image its full resolution? For a file in µm "
            "pass unit='um'"
        )
    tissue = PointLookup(*read_mask(slide))
    given, as_um = (float(tissue.at(x / px, y / px).mean()) for px in (1.0, slide.mpp))
    if unit is None and len(x) >= ENOUGH and as_um > given + LOOKS_UM:
        raise ValueError(
            f"{given:.0%} of the {len(x)} objects of {path} lie on the tissue of image {slide.key!r}, and {as_um:.0%} would if "
            "their coordinates were µm: pass unit='um' if they are, unit='px' if they are pixels"
        )
    if given < ON_TISSUE:
        logger.warning(
            "only %.0f %% of the objects of %s lie on the tissue of image %r: are they of this slide?",
            100 * given,
            path.name,
            slide.key,
        )
