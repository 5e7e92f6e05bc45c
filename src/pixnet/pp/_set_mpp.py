"""The pixel size (µm/px), stated by the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pixnet._names import listed
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.pixel_size import check_mpp
from pixnet._sdata.store.element_store import write_mpp

if TYPE_CHECKING:
    from spatialdata import SpatialData


def set_mpp(sdata: SpatialData, image_key: str, mpp: float) -> None:
    """Set the pixel size (µm/px) of an image.

    It becomes the transformation of the image to the coordinate system ``"pixnet_um"``, so that crops and copies keep
    it. No other coordinate system implies a pixel size. The readers of :mod:`pixnet.io` and :mod:`pixnet.datasets` set
    it if the file states it.

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
        If ``mpp`` is not positive and finite, or outside 0.02 to 200 µm/px.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.pp.set_mpp(sdata, "he", 0.5)
    """
    check_sdata(sdata)
    if image_key not in sdata.images:
        raise KeyError(f"no image {image_key!r} in this object (image_key=); it has: {listed(sdata.images)}")
    write_mpp(sdata, image_key, check_mpp(mpp))
