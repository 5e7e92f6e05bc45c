"""The frame that a figure is drawn in: µm on the slide, whatever coordinate systems the elements are in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.transforms import Affine2D
from spatialdata import SpatialData
from xarray import DataArray

from pixnet._logging import logger
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import full_resolution, levels
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.transforms import affine_to_pixels

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """Coordinates in µm from the upper left corner of one raster, x to the right, y down.

    Attributes
    ----------
    sdata
        The object that is shown.
    anchor
        The raster whose pixel grid is upright in the figure.
    unit_per_pixel
        Frame units for each full-resolution pixel of the anchor.
    unit
        ``"µm"``, or ``"px"`` where the pixel size is unknown.
    box
        The part that is shown, ``(x0, y0, x1, y1)`` in frame units.
    """

    sdata: SpatialData
    anchor: str
    unit_per_pixel: float
    unit: str
    box: Box

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of what is shown, in frame units."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @property
    def aspect(self) -> float:
        """Width over height of what is shown."""
        return self.size[0] / self.size[1]

    def affine(self, key: str) -> np.ndarray:
        """Return the 3 x 3 matrix from an element's own coordinates (x, y, 1) to the frame's."""
        matrix = np.eye(3) if key == self.anchor else affine_to_pixels(self.sdata, key, self.anchor)
        return np.diag([self.unit_per_pixel, self.unit_per_pixel, 1.0]) @ matrix

    def show(self, ax: Axes) -> None:
        """Set the limits of Axes to what is shown."""
        ax.set_xlim(self.box[0], self.box[2])
        ax.set_ylim(self.box[3], self.box[1])
        ax.set_aspect("equal")


def make_frame(sdata: SpatialData, anchor: str, box: Sequence[float] | None = None) -> Frame:
    """Return the frame of a raster, of all of it or of a box in µm.

    Raises
    ------
    ValueError
        If ``box`` is not four numbers with x0 < x1 and y0 < y1, or lies outside the image.
    """
    mpp = _anchor_mpp(sdata, anchor)
    if mpp is None:
        logger.warning(
            "the pixel size of %r is unknown, so the scale bar counts pixels; pixnet.pp.set_mpp records it", anchor
        )
    per_pixel = mpp or 1.0
    sizes = full_resolution(sdata[anchor]).sizes
    width, height = sizes["x"] * per_pixel, sizes["y"] * per_pixel
    unit = "px" if mpp is None else "µm"
    if box is None:
        return Frame(sdata, anchor, per_pixel, unit, (0.0, 0.0, width, height))
    try:
        x0, y0, x1, y1 = (float(v) for v in box)
    except (TypeError, ValueError):
        raise ValueError(f"box is {box!r}; four numbers (x0, y0, x1, y1) in {unit} are needed") from None
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"box is {box!r}; x0 < x1 and y0 < y1 are needed, as (x0, y0, x1, y1) in {unit}")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise ValueError(f"box {box!r} lies outside {anchor!r}, which covers (0, 0, {width:.0f}, {height:.0f}) {unit}")
    return Frame(sdata, anchor, per_pixel, unit, (x0, y0, x1, y1))


def predicted_box(frame: Frame, key: str, margin: float = 0.03) -> Box:
    """Return the box that holds what a gene map predicts, in frame units, with a margin: slides are mostly glass."""
    pixels = read_pixels(frame, key, 400, [GeneMap.open(frame.sdata, key).validity])
    known = np.isfinite(pixels.values[0])
    if not known.any():
        return frame.box
    y0, y1 = np.flatnonzero(known.any(axis=1))[[0, -1]]
    x0, x1 = np.flatnonzero(known.any(axis=0))[[0, -1]]
    corners = pixels.affine[:2] @ np.array([[x0, x1 + 1, x1 + 1, x0], [y0, y0, y1 + 1, y1 + 1], [1.0, 1.0, 1.0, 1.0]])
    low, high = corners.min(axis=1), corners.max(axis=1)
    pad = margin * (high - low).max()
    bounds = [*np.maximum(low - pad, frame.box[:2]), *np.minimum(high + pad, frame.box[2:])]
    left, top, right, bottom = (float(v) for v in bounds)
    return left, top, right, bottom


def _anchor_mpp(sdata: SpatialData, anchor: str) -> float | None:
    """Return the pixel size of a raster (µm/px): its own, or by way of an image whose pixel size is known."""
    known = find_mpp(sdata, anchor)
    if known is not None:
        return known
    for other in sdata.images:
        mpp = find_mpp(sdata, other)
        if mpp is None:
            continue
        try:
            matrix = affine_to_pixels(sdata, anchor, other)
        except ValueError:  # no shared coordinate system
            continue
        return mpp * math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    return None


@dataclass(frozen=True)
class PlacedRaster:
    """Part of a raster at the resolution that a panel can show.

    Attributes
    ----------
    values
        Array ``(channels, y, x)``, or ``(y, x)`` for labels.
    affine
        3 x 3 matrix from this array's pixels (corners at whole numbers) to the frame.
    """

    values: np.ndarray
    affine: np.ndarray


def read_pixels(frame: Frame, key: str, panel_pixels: float, channels: Sequence[int] | None = None) -> PlacedRaster:
    """Read what the frame shows of a raster, from the coarsest pyramid level that still fills the panel.

    Parameters
    ----------
    frame
        Frame of the figure.
    key
        An image or labels element.
    panel_pixels
        Screen pixels across the panel.
    channels
        Positions of the channels to read; ``None`` reads all.
    """
    to_frame = frame.affine(key)
    pyramid = levels(frame.sdata[key])
    full = pyramid[0].data.sizes
    x0, y0, x1, y1 = _window(np.linalg.inv(to_frame), frame.box, full["x"], full["y"])
    pixel = math.sqrt(abs(np.linalg.det(to_frame[:2, :2])))  # frame units for each level-0 pixel
    wanted = frame.size[0] / panel_pixels / pixel  # level-0 pixels for each screen pixel
    chosen = max(
        (level for level in pyramid if math.sqrt(level.scale[0] * level.scale[1]) <= max(wanted, 1.0)),
        key=lambda level: level.scale[0] * level.scale[1],
    )
    sy, sx = chosen.scale
    data = chosen.data
    check_bound(data, repr(key))
    rows = slice(math.floor(y0 / sy), min(math.ceil(y1 / sy), data.sizes["y"]))
    cols = slice(math.floor(x0 / sx), min(math.ceil(x1 / sx), data.sizes["x"]))
    data = data.isel(y=rows, x=cols)
    if channels is not None:
        data = data.isel(c=list(channels))
    # A raster without a pyramid is reduced block by block, so that it is never in memory as a whole.
    step = max(1, math.floor(wanted / math.sqrt(sx * sy)))
    if step > 1:
        data = _thin(data, step)
    placed = to_frame @ np.array(
        [[sx * step, 0.0, cols.start * sx], [0.0, sy * step, rows.start * sy], [0.0, 0.0, 1.0]]
    )
    return PlacedRaster(np.asarray(data.values), placed)


def _thin(data: DataArray, step: int) -> DataArray:
    """Return fewer pixels: means of an image, one in so many of labels."""
    step_y, step_x = min(step, data.sizes["y"]), min(step, data.sizes["x"])
    if "c" not in data.dims:  # labels are names, not amounts
        return data.isel(y=slice(step_y // 2, None, step_y), x=slice(step_x // 2, None, step_x))
    coarse = data.coarsen(y=step_y, x=step_x, boundary="pad").mean()
    return coarse.round().astype(data.dtype) if np.issubdtype(data.dtype, np.integer) else coarse


def _window(to_pixels: np.ndarray, box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the bounds, in level-0 pixels of a raster, of a box of the frame; at least one pixel."""
    x0, y0, x1, y1 = box
    corners = to_pixels[:2] @ np.array([[x0, x1, x1, x0], [y0, y0, y1, y1], [1.0, 1.0, 1.0, 1.0]])
    low = np.floor(corners.min(axis=1))
    high = np.ceil(corners.max(axis=1))
    left, top = (float(np.clip(low[i], 0, size - 1)) for i, size in ((0, width), (1, height)))
    right = float(np.clip(high[0], left + 1, width))
    bottom = float(np.clip(high[1], top + 1, height))
    return left, top, right, bottom


def draw_image(ax: Axes, values: np.ndarray, affine: np.ndarray, **kwargs: Any) -> AxesImage:
    """Draw an array ``(y, x)`` or ``(y, x, 3 | 4)`` as its affine places it: scaled, turned or mirrored."""
    height, width = values.shape[:2]
    return ax.imshow(
        values,
        extent=(0, width, height, 0),
        origin="upper",
        transform=Affine2D(affine) + ax.transData,
        aspect="equal",
        **kwargs,
    )


def panel_pixels(ax: Axes) -> float:
    """Return generous screen pixels across Axes: figures are often saved at twice the screen's resolution."""
    width = ax.get_window_extent().width
    return max(2.0 * width, 400.0)
