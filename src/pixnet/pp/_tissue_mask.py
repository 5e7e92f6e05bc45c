"""Find tissue on a slide: a labels element at a coarse resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pixnet._core.coverage import coverage
from pixnet._sdata.keys import resolve_shapes
from pixnet._sdata.raster_element import raster_element
from pixnet._sdata.record import find_entry
from pixnet._sdata.shapes import read_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.element_store import put
from pixnet._sdata.target import check_target
from pixnet._sdata.tissue import find_tissue

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree


def tissue_mask(
    sdata: SpatialData,
    image_key: str | None = None,
    *,
    within: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    key_added: str | None = None,
    overwrite: bool = False,
    inplace: bool = True,
) -> DataArray | DataTree | None:
    """Find tissue on an H&E image.

    Tissue is what has texture or absorbs clearly more than the glass around it. The glass is estimated locally, so
    uneven light and a smear of eosin do not count; lumina and fat inside the tissue do, islands below 0.03 mm^2 do not.

    Parameters
    ----------
    sdata
        Object that holds the image.
    image_key
        The H&E image; its pixel size must be known. ``None``: the recorded one, else the only one.
    within
        Shapes or labels elements, such as regions drawn in QuPath: only tissue in one of their shapes counts.
    exclude
        Shapes or labels elements, such as folds, ink or necrosis: tissue in them does not count.
    key_added
        Name of the labels element; ``None`` is ``"{image_key}_tissue"``, which ``tl`` functions find by themselves.
    overwrite
        Replace an element of that name.
    inplace
        Add the element to ``sdata`` (and to its store when it is backed) and return None; ``False`` returns it.

    Returns
    -------
    DataArray or None
        Labels ``uint8 (y, x)``, 1 tissue and 0 background, at 4 to 8 µm/px (a coarser image's own), in the coordinate
        systems of the image.

    Raises
    ------
    KeyError
        If there is no such image or element.
    ValueError
        If the pixel size is unknown, the image is not 8-bit RGB, ``key_added`` exists, or no tissue is left.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.tissue_mask(sdata)
    >>> sorted(set(sdata["he_tissue"].values.ravel().tolist()))
    [0, 1]
    """
    slide = Slide.open(sdata, image_key)
    image_key = slide.key
    key_added = f"{image_key}_tissue" if key_added is None else key_added
    if inplace:
        check_target(sdata, key_added, "labels", overwrite=overwrite)
    mask, scale = find_tissue(slide)
    before = mask.any()
    if within is not None:
        mask &= np.any([_inside(slide, key, scale, mask.shape) for key in resolve_shapes(sdata, within)], axis=0)
    for key in resolve_shapes(sdata, exclude) if exclude is not None else ():
        mask &= ~_inside(slide, key, scale, mask.shape)
    if before and not mask.any():
        raise ValueError(f"no tissue of image {slide.key!r} is left: within={within!r}, exclude={exclude!r}")
    element = raster_element([mask.astype(np.uint8)], [scale], transformations=slide.transformations, channels=None)
    if not inplace:
        return element
    entry = find_entry(sdata, "masks", image_key)
    if entry is None or key_added == f"{image_key}_tissue":
        entry = {"mask_key": key_added, "identity": slide.identity}
    put(sdata, key_added, element, overwrite=overwrite, entries={"masks": {image_key: entry}})
    return None


def _inside(slide: Slide, shapes: str, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a mask of which at least half lies in the shapes of an element."""
    geometries = read_shapes(slide.sdata, shapes, slide.key).geometries
    pixels = geometries.transform(np.diag([1 / scale[1], 1 / scale[0], 1.0]))
    share = coverage(pixels, window=(0, 0, *size)).sum(axis=0)
    return np.asarray(share).reshape(size) >= 0.5 - 1e-9
