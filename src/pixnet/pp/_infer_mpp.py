"""The pixel size (µm/px), measured on shapes whose size is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pixnet._core.placement import SPREAD, pitch
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_image, resolve_shapes
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.shapes import read_shapes
from pixnet._sdata.transforms import affine_to_pixels
from pixnet.pp._set_mpp import set_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData

# How far the two axes of a transformation may differ.
TOLERANCE = 0.01
# How far a measured pixel size may be from the recorded one without a warning, and at all.
DIFFERS, CONTRADICTS = 0.02, 0.10


def infer_mpp(
    sdata: SpatialData,
    shapes: str,
    *,
    image_key: str | None = None,
    pitch_um: float | None = None,
    diameter_um: float | None = None,
    edge_um: float | None = None,
    unit_um: float | None = None,
    coordinate_system: str | None = None,
    overwrite: bool = False,
) -> float:
    """Measure the pixel size (µm/px) of an image on shapes of known size, and set it.

    Parameters
    ----------
    sdata
        Object that holds both.
    shapes
        A shapes element of a regular array: spots or bins.
    image_key
        The image; ``None``: the recorded one, else the only one.
    pitch_um
        Distance between the centres of neighbouring shapes, µm (Visium 100, legacy ST 200).
    diameter_um
        Diameter of a shape, µm (Visium 55, legacy ST 100).
    edge_um
        Edge of a square bin, µm (Visium HD 2, 8 or 16).
    unit_um
        µm per unit of the shapes' own coordinates: 1 for the cell boundaries of Xenium, whatever their sizes. Pass
        exactly one of the four. For spots, the pitch is best, because spots are often drawn at a nominal size.
    coordinate_system
        Where shapes and image meet; ``None`` takes "global" if shared, else the first shared one.
    overwrite
        Replace a pixel size that is recorded and differs by more than 10 %.

    Returns
    -------
    float
        Pixel size of the full-resolution level (µm/px), set as by :func:`set_mpp`.

    Raises
    ------
    KeyError
        If an element is missing.
    ValueError
        If not exactly one size is given, the shapes are not a regular array, the transformation between shapes and
        image stretches x and y differently or shears, the result is impossible, or contradicts the recorded pixel size.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600)
    >>> round(px.pp.infer_mpp(sdata, "spots", pitch_um=100), 3)
    0.5
    """
    check_sdata(sdata)
    sizes = {"pitch_um": pitch_um, "diameter_um": diameter_um, "edge_um": edge_um, "unit_um": unit_um}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of pitch_um, diameter_um, edge_um and unit_um (given: {listed(given)}); for Visium "
            "pitch_um=100, for Visium HD bins edge_um=8 (their size), for legacy ST pitch_um=200, for Xenium unit_um=1"
        )
    ((name, value),) = given.items()
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}; a positive number of µm is needed")
    image_key = resolve_image(sdata, image_key)
    (shapes,) = resolve_shapes(sdata, [shapes] if isinstance(shapes, str) else shapes)
    matrix = affine_to_pixels(sdata, shapes, image_key, coordinate_system)
    long, short = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if long > short * (1 + TOLERANCE):
        raise ValueError(
            f"the transformation between {shapes!r} and image {image_key!r} stretches one direction {long / short:.3f} "
            "times more than the other (or shears): there is no single pixel size; correct it with "
            "spatialdata.transformations.set_transformation, or state what is known with pixnet.pp.set_mpp"
        )
    if name == "unit_um":
        pixels = float(np.sqrt(long * short))
    else:
        geometries = read_shapes(sdata, shapes, image_key, coordinate_system).geometries
        if len(geometries) == 0:
            raise ValueError(f"{shapes!r} is empty: nothing to measure")
        bounds = geometries.bounds
        if name == "pitch_um":
            pixels = pitch((bounds[:, :2] + bounds[:, 2:]) / 2, shapes)
        else:
            # A disc of diameter d has the area pi d^2 / 4, a square its edge squared, whichever way it is turned.
            ratio = np.pi / 4 if name == "diameter_um" or _drawn_as_circles(sdata, shapes) else 1.0
            pixels = _middle(np.sqrt(geometries.area / ratio), shapes)
    mpp = float(value / pixels)
    what = f"{value:g} µm of {shapes!r} ({name}) are {pixels:.2f} px"
    known = find_mpp(sdata, image_key)
    if known is not None and not overwrite and abs(np.log(mpp / known)) > np.log(1 + CONTRADICTS):
        raise ValueError(
            f"image {image_key!r} has {known:.4g} µm/px as recorded, and {mpp:.4g} as measured: {what}. One is wrong: is it the "
            f"right size ({listed(sizes)}), and is the image the one of full resolution? overwrite=True replaces the recorded one"
        )
    if known is not None and abs(np.log(mpp / known)) > np.log(1 + DIFFERS):
        logger.warning("image %r had %.4g µm/px as recorded; %.4g as measured replaces it", image_key, known, mpp)
    set_mpp(sdata, image_key, mpp)
    logger.info("image %r has %.4f µm/px: %s", image_key, mpp, what)
    return mpp


def _drawn_as_circles(sdata: SpatialData, shapes: str) -> bool:
    """Whether bins are kept as circles of the bin's width, as readers may do."""
    return "radius" in getattr(sdata[shapes], "columns", ())


def _middle(sizes: NDArray, shapes: str) -> float:
    middle = float(np.median(sizes))
    low, high = np.quantile(sizes, [0.1, 0.9])
    if high - low > SPREAD * middle:
        raise ValueError(
            f"the shapes of {shapes!r} differ in size (80 % are between {low:.1f} and {high:.1f} px across); "
            "the pixel size is measured on spots or bins of one size"
        )
    return middle
