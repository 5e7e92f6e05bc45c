"""um per pixel: stated by the user."""

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
    """Record an image's um per pixel.

    pixnet takes it from nowhere else: a coordinate system says nothing of micrometres. The readers of :mod:`pixnet.io`
    and :mod:`pixnet.datasets` record it themselves where the file states it.

    Parameters
    ----------
    sdata
        Object that holds the image; its store is brought up to date when it is backed.
    image_key
        The image.
    mpp
        um per pixel of the full-resolution level, the same in x and y.

    Raises
    ------
    KeyError
        If there is no such image.
    TypeError
        If ``mpp`` is no number.
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
        raise TypeError(f"mpp is {mpp!r}; a number of um per pixel is needed, for instance 0.5")
    mpp = float(mpp)
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp!r}; a positive, finite number of um per pixel is needed, for instance 0.5")
    if not 0.05 <= mpp <= 50:
        logger.warning("%g um per pixel is unusual for a slide (0.2 to 10): is it um, and of the finest level?", mpp)
    write_mpp(sdata, image_key, mpp)
