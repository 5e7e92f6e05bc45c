"""A region of a slide, as a call names it: an element, shapes, or a bounding box."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from geopandas import GeoDataFrame, GeoSeries
from shapely.geometry.base import BaseGeometry
from spatialdata import SpatialData
from spatialdata.models import ShapesModel

from pixnet._sdata.keys import resolve_shapes
from pixnet._sdata.shapes import pack_element, pixel_shapes
from pixnet._sdata.slide import Slide

if TYPE_CHECKING:
    from pixnet._core.coverage import ShapeArrays

NEEDED = (
    "the name of a shapes or labels element, a GeoDataFrame, a shapely polygon or a bounding box (x0, y0, x1, y1), the last two "
    "in pixels of the image, is needed"
)


def read_region(slide: Slide, region: Any) -> ShapeArrays | None:
    """Return the shapes of a region in level-0 pixels of a slide; None for the whole slide.

    Raises
    ------
    KeyError
        If an element is named that does not exist.
    TypeError
        If it is not a region.
    ValueError
        If it is empty, invalid, or lies outside the slide.
    """
    if region is None:
        return None
    shapes = _shapes(slide, region)
    if len(shapes) == 0:
        raise ValueError("region is empty: it has no shapes")
    width, height = slide.image.sizes["x"], slide.image.sizes["y"]
    x0, y0 = shapes.bounds[:, :2].min(axis=0)
    x1, y1 = shapes.bounds[:, 2:].max(axis=0)
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise ValueError(
            f"region lies outside image {slide.key!r}: it spans x {x0:.6g} to {x1:.6g} and y {y0:.6g} to {y1:.6g} in pixels of "
            f"the image, which has x 0 to {width} and y 0 to {height}. If its coordinates are not pixels, add it to the object "
            "with its transformation and pass its name"
        )
    return shapes


def _shapes(slide: Slide, region: Any) -> ShapeArrays:
    if isinstance(region, str):
        (name,) = resolve_shapes(slide.sdata, region, argument="region")
        return pixel_shapes(slide.sdata, name, slide.key)
    if isinstance(region, GeoDataFrame):
        if "transform" not in region.attrs or len(region) == 0:
            return pack_element(region, "region")
        ShapesModel().validate(region)
        beside = SpatialData(images={slide.key: slide.sdata.images[slide.key]})
        name = "region" if slide.key != "region" else "region_"
        beside.shapes[name] = region
        return pixel_shapes(beside, name, slide.key)
    if isinstance(region, BaseGeometry):
        polygon = region
    elif isinstance(region, Sequence | np.ndarray) and len(region) == 4 and all(_is_number(n) for n in region):
        x0, y0, x1, y1 = (float(n) for n in region)
        if not (np.isfinite([x0, y0, x1, y1]).all() and x0 < x1 and y0 < y1):
            raise ValueError(
                f"region is {region!r}; a bounding box (x0, y0, x1, y1) with x0 < x1 and y0 < y1 is needed"
            )
        polygon = shapely.box(x0, y0, x1, y1)
    else:
        raise TypeError(f"region is {region!r}; {NEEDED}")
    if polygon.is_empty:
        raise ValueError("region is empty: its geometry has no area")
    if polygon.geom_type not in {"Polygon", "MultiPolygon"}:
        raise TypeError(f"region is a {polygon.geom_type}; {NEEDED}")
    return pack_element(GeoDataFrame(geometry=GeoSeries([polygon])), "region")


def _is_number(n: Any) -> bool:
    return isinstance(n, Real) and not isinstance(n, bool)
