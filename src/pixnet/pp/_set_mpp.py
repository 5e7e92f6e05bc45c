"""The pixel size (µm/px), stated by the user."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.store.element_store import write_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData


def set_mpp(sdata: SpatialData, image_key: str, mpp: float) -> None:
    """Set the pixel size (µm/px) of an image.

    It becomes the transformation of the image to the coordinate system ``"pixnet_um"``, so that crops and copies keep it.
    No other coordinate system implies a pixel size. The readers of :mod:`pixnet.io` and :mod:`pixnet.datasets` set it if
    the file states it.

    Parameters
    ----------
    sdata
        Object that holds the image; its store is brought up to date when it is backed.
    image_key
        The image.
    mpp
        Pixel size of the full-resolution level (µm/px), the same in x and y. It replaces an earlier one.

    Raises
    ------
    KeyError
        If there is no such image.
    TypeError
        If ``mpp`` is not a number.
    ValueError
        If ``mpp`` is not positive and finite.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.set_mpp(sdata, "he", 0.5)
    """
    check_sdata(sdata, "pp.set_mpp")
    if image_key not in sdata.images:
        raise KeyError(f"no image {image_key!r} in this object (image_key=); it has: {listed(sdata.images)}")
    if isinstance(mpp, bool) or not isinstance(mpp, Real):
        raise TypeError(f"mpp is {mpp!r}; a pixel size in µm/px (a number) is needed, for instance 0.5")
    mpp = float(mpp)
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp!r}; a positive, finite pixel size in µm/px is needed, for instance 0.5")
    if not 0.05 <= mpp <= 50:
        logger.warning("%g µm/px is unusual for a slide (0.2 to 10): is it in µm, and of the finest level?", mpp)
    write_mpp(sdata, image_key, mpp)
