"""The H&E image: choosing it and drawing it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from spatialdata import SpatialData

from pixnet._sdata.keys import resolve_image
from pixnet.pl._frame import Frame, draw_image, panel_pixels, read_pixels
from pixnet.pl._style import bare


def shown_he(sdata: SpatialData, source: str | None, he_key: str | Literal[False] | None) -> str | None:
    """Return the H&E image to show: the one named, the source of a map, the only one; else None."""
    if he_key is False:
        return None
    if he_key is not None:
        return resolve_image(sdata, he_key)
    if source in sdata.images:
        return source
    try:
        return resolve_image(sdata)
    except (TypeError, ValueError):
        return None  # no H&E, or several: the map is shown without


def draw_he(ax: Axes, frame: Frame, he_key: str, *, faint: bool = False) -> None:
    """Draw the H&E image; faint and grey where coloured shapes will lie on it."""
    pixels = read_pixels(frame, he_key, panel_pixels(ax))
    picture = np.moveaxis(pixels.values, 0, -1)
    if faint:
        grey = picture.mean(axis=-1, keepdims=True)
        picture = np.repeat(255 - 0.45 * (255 - grey), 3, axis=-1).astype(np.uint8)
    draw_image(ax, picture, pixels.affine)
    frame.show(ax)
    bare(ax)
