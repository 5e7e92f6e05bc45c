"""Samples of HEST-1k."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixnet._core.placement import pitch
from pixnet._logging import logger
from pixnet._names import listed
from pixnet.io._from_anndata import from_anndata

if TYPE_CHECKING:
    from spatialdata import SpatialData

SPOTS = {"Visium": 55.0, "Spatial Transcriptomics": 100.0}
"""Technologies with spots, and the diameter of these where the metadata lacks it (µm)."""
SQUARES = ("Visium HD", "Xenium")
"""Technologies whose transcripts HEST-1k has pooled into squares."""
DUPLICATES = {"TENX128": "TENX155", "TENX155": "TENX128"}
"""Samples that are one section under two names (issue 126 of mahmoodlab/HEST)."""
CONTRADICTED = ("TENX153", "TENX154", "TENX155", "TENX156")
"""Samples that the metadata gives to one patient, and their study to several (same issue)."""


def hest(
    folder: str | PathLike[str],
    sample_id: str,
    *,
    image_key: str = "he",
    shapes_key: str = "spots",
    table_key: str | None = None,
) -> SpatialData:
    """Read a sample of HEST-1k (Visium, Visium HD, Xenium or legacy Spatial Transcriptomics).

    The folder is that of the public data set (``MahmoodLab/hest`` on the Hugging Face Hub), or a part of it:
    ``wsis/{id}.tif``, ``st/{id}.h5ad`` and ``metadata/{id}.json``. Pixel sizes are those that HEST-1k estimated by
    alignment. Spots of Visium and of legacy Spatial Transcriptomics are circles. HEST-1k has pooled the transcripts of
    Visium HD and Xenium into squares, whose side is measured here on their positions, since the metadata gives another.

    Parameters
    ----------
    folder
        Folder of the data set.
    sample_id
        Name of the sample, such as ``"TENX95"``.
    image_key, shapes_key, table_key
        Names of the elements; ``table_key=None`` is ``"{shapes_key}_counts"``.

    Returns
    -------
    SpatialData
        As :func:`pixnet.io.from_anndata` makes it. ``attrs["hest"]`` holds the metadata of the sample.

    Raises
    ------
    FileNotFoundError
        If a file of the sample is missing.
    ValueError
        If the metadata lacks the pixel size, names an unknown technology, or positions do not fit the image.

    Notes
    -----
    TENX128 and TENX155 are the same section: keep one of them out, lest a test section is trained on. The metadata
    gives TENX153 to TENX156 to one patient, and their study to several. Both are warned of. Xenium tables hold a panel,
    so train with ``totals="panel"``.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.io.hest("hest_data", "TENX95")  # doctest: +SKIP
    """
    import anndata

    folder = Path(folder).expanduser()
    metadata = json.loads(_file(folder, "metadata", sample_id, ".json").read_text(encoding="utf-8"))
    table_file, slide_file = _file(folder, "st", sample_id, ".h5ad"), _file(folder, "wsis", sample_id, ".tif")
    technology = metadata.get("st_technology")
    if technology not in (*SPOTS, *SQUARES):
        raise ValueError(
            f"the metadata of {sample_id!r} has st_technology {technology!r}; known: {listed([*SPOTS, *SQUARES])}"
        )
    mpp = _number(metadata, "pixel_size_um_estimated") or _number(metadata, "pixel_size_um_embedded")
    if mpp is None:
        raise ValueError(f"the metadata of {sample_id!r} has no pixel size (pixel_size_um_estimated)")
    _warn(sample_id)
    adata = anndata.read_h5ad(table_file)
    adata.uns.pop("spatial", None)  # a reduced picture: the slide is here
    if technology in SPOTS:
        size_um = _number(metadata, "spot_diameter") or SPOTS[technology]
    else:
        size_um = mpp * pitch(np.asarray(adata.obsm["spatial"], dtype=np.float64), "obsm['spatial']")
    sdata = from_anndata(
        adata,
        slide_file,
        mpp=mpp,
        diameter_um=size_um,
        image_key=image_key,
        shapes_key=shapes_key,
        table_key=table_key,
    )
    if technology in SQUARES:
        sdata[shapes_key] = _squares(sdata[shapes_key])
    sdata.attrs = {**sdata.attrs, "hest": {name: _plain(value) for name, value in metadata.items()}}
    return sdata


def _file(folder: Path, kind: str, sample_id: str, suffix: str) -> Path:
    """Return a file of a sample, or say what is missing and what is there."""
    path = folder / kind / f"{sample_id}{suffix}"
    if path.is_file():
        return path
    if not (folder / kind).is_dir():
        raise FileNotFoundError(f"{folder} has no folder {kind!r}; HEST-1k has 'metadata', 'st' and 'wsis'")
    there = sorted(other.stem for other in (folder / kind).glob(f"*{suffix}"))
    shown = listed(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    raise FileNotFoundError(f"{path} is missing; {kind} holds {shown}")


def _number(metadata: dict[str, Any], name: str) -> float | None:
    """Return a positive number of the metadata; None where there is none."""
    try:
        found = float(metadata[name])
    except (KeyError, TypeError, ValueError):
        return None
    return found if np.isfinite(found) and found > 0 else None


def _plain(value: Any) -> Any:
    """Return a value as JSON allows it: files of HEST-1k hold NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _warn(sample_id: str) -> None:
    if sample_id in DUPLICATES:
        logger.warning(
            "HEST-1k has this section twice, as %s and as %s: use one of them", sample_id, DUPLICATES[sample_id]
        )
    if sample_id in CONTRADICTED:
        logger.warning(
            "HEST-1k gives %s to one patient, and their study to several: do not hold out patients by this metadata",
            ", ".join(CONTRADICTED),
        )


def _squares(circles: Any) -> Any:
    """Return squares as wide as circles, in their places."""
    import geopandas
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    half, x, y = circles["radius"].to_numpy(), circles.geometry.x.to_numpy(), circles.geometry.y.to_numpy()
    boxes = shapely.box(x - half, y - half, x + half, y + half)
    frame = geopandas.GeoDataFrame({"geometry": boxes}, index=circles.index)
    return ShapesModel.parse(frame, transformations=get_transformation(circles, get_all=True))
