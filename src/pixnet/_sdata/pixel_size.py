"""The pixel size (µm/px) of images."""

from __future__ import annotations

from spatialdata import SpatialData

from pixnet._sdata.record import recorded


def get_mpp(sdata: SpatialData, image_key: str) -> float:
    """Return an image's um per pixel (full-resolution level), as recorded.

    Raises
    ------
    ValueError
        If it is unknown; the message names the calls that record it.
    """
    mpp = recorded(sdata, "mpp").get(image_key)
    if mpp is None:
        raise ValueError(
            f"the um per pixel of image {image_key!r} is unknown; record it with pixnet.pp.set_mpp(sdata, {image_key!r}, mpp) "
            f"or, from shapes of known size, pixnet.pp.infer_mpp(sdata, shapes, image_key={image_key!r}, pitch_um=...)"
        )
    return float(mpp)


def map_mpp(sdata: SpatialData, image_key: str) -> float | None:
    """Return the um per pixel of any image: as recorded for a gene map or a slide, else None."""
    entry = recorded(sdata, "images").get(image_key)
    if entry is not None and entry.get("mpp") is not None:
        return float(entry["mpp"])
    mpp = recorded(sdata, "mpp").get(image_key)
    return None if mpp is None else float(mpp)
