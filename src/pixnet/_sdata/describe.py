"""What a reader says of a new object: pixel sizes, and the elements that calls mean by default."""

from __future__ import annotations

from collections.abc import Mapping

from spatialdata import SpatialData

from pixnet._sdata.pixel_size import set_pixel_size
from pixnet._sdata.record import note


def describe(sdata: SpatialData, mpp: Mapping[str, float], **defaults: str) -> None:
    """Set the pixel sizes (µm/px) of images of an object in memory, and record its defaults (``image_key``, ``shapes``)."""
    for image_key, value in mpp.items():
        set_pixel_size(sdata.images[image_key], float(value))
    for name, key in defaults.items():
        note(sdata, "defaults", name, key)
