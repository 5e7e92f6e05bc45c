"""An AnnData with positions, and the picture they belong to, as SpatialData."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from pixnet._core.placement import pitch
from pixnet._logging import logger
from pixnet._names import listed
from pixnet.io._slide import read_levels

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from pixnet._sdata.raster_element import Array, Scales

VISIUM_PITCH_UM, VISIUM_DIAMETER_UM = 100.0, 55.0


def from_anndata(
    adata: AnnData,
    image: str | PathLike[str] | np.ndarray,
    *,
    mpp: float | None = None,
    pitch_um: float | None = None,
    diameter_um: float | None = None,
    scale: float | None = None,
    spatial_key: str = "spatial",
    image_key: str = "he",
    shapes_key: str = "spots",
    table_key: str | None = None,
) -> SpatialData:
    """Make a SpatialData object from an AnnData with positions and an H&E image.

    Visium objects of scanpy and squidpy need nothing more than the full-resolution image: the spots' size and pitch are
    known, and the pixel size is measured.

    Parameters
    ----------
    adata
        Raw counts, one row for each spot or cell, with their centres ``(x, y)`` in ``obsm["spatial"]``. Without genes
        (``n_vars`` is 0) no table is made: a model can predict for such spots.
    image
        The H&E image: a file that :func:`pixnet.io.slide` opens, or an array ``uint8 (y, x, 3)``.
    mpp
        Pixel size of the image (µm/px). ``None`` takes what the file states, else measures it from ``pitch_um``.
    pitch_um
        Distance between the centres of neighbouring spots (µm), to measure the pixel size if ``mpp`` is None. ``None``
        is 100 for Visium.
    diameter_um
        Diameter of a spot or cell (µm). ``None`` is 55 for Visium; otherwise it has to be given.
    scale
        Pixels of the image per unit of the positions. ``None`` is 1: positions are pixels of the image. Where the image
        has the size of the reduced picture that a Visium object carries, it is that picture's scale factor. For
        positions in µm, pass ``1 / mpp``.
    spatial_key
        Name in ``adata.obsm`` of the positions.
    image_key, shapes_key, table_key
        Names of the elements; ``table_key=None`` is ``"{shapes_key}_counts"``.

    Returns
    -------
    SpatialData
        Multiscale image ``"he"``, circles ``"spots"`` (index: ``adata.obs_names``) and table ``"spots_counts"``, in
        coordinate systems ``"global"`` (pixels of the image) and ``"um"``. The pixel size is recorded as by
        :func:`pixnet.pp.set_mpp`. The matrix is not copied.

    Raises
    ------
    FileNotFoundError
        If there is no such image.
    KeyError
        If there are no positions.
    TypeError
        If ``adata`` is not an AnnData.
    ValueError
        If positions are missing or most lie outside the image, ids repeat, several samples are in one object, or
        the size of spots or pixels is unknown.

    See Also
    --------
    pixnet.pp.check_spots : Finds mirrored, turned and shifted positions.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pixnet as px
    >>> adata = ad.AnnData(np.ones((4, 2), dtype=np.float32))
    >>> adata.obsm["spatial"] = np.array([[100, 100], [300, 100], [100, 300], [300, 300]])
    >>> picture = np.full((400, 400, 3), 240, dtype=np.uint8)
    >>> sdata = px.io.from_anndata(adata, picture, mpp=0.5, diameter_um=55)
    >>> sdata["spots"].radius.tolist()
    [55.0, 55.0, 55.0, 55.0]
    """
    import geopandas
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    from pixnet._sdata.describe import describe
    from pixnet._sdata.pixel_size import check_mpp
    from pixnet._sdata.raster_element import raster_element

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is {type(adata).__name__}; an AnnData object is needed")
    if mpp is not None:
        mpp = check_mpp(mpp)
    for name, value in (("pitch_um", pitch_um), ("diameter_um", diameter_um), ("scale", scale)):
        if value is not None and (isinstance(value, bool) or not (np.isfinite(value) and value > 0)):
            raise ValueError(f"{name} is {value!r}; a positive number is needed")
    positions = _positions(adata, spatial_key)
    visium = _visium(adata)
    factors = visium.get("scalefactors", {})
    if "spot_diameter_fullres" in factors and "bin_size_um" not in factors:
        pitch_um = VISIUM_PITCH_UM if pitch_um is None else pitch_um
        diameter_um = VISIUM_DIAMETER_UM if diameter_um is None else diameter_um
    if diameter_um is None:
        raise ValueError(
            "the size of the spots or cells is unknown: give diameter_um= (Visium 55, legacy ST 100, cells about 10)"
        )

    levels, scales, stated = _open(image)
    height, width = levels[0].shape[1:]
    if scale is None:
        scale = _scale_of(visium, (height, width))
    centres = positions * scale
    if mpp is not None and stated is not None and abs(np.log(mpp / stated)) > np.log(1.05):
        logger.warning("the image states %.4g µm/px; mpp=%g is used instead", stated, mpp)
    mpp = mpp or stated
    if mpp is None:
        mpp = check_mpp(
            _measured(centres, pitch_um, factors.get("microns_per_pixel"), scale), "the measured pixel size"
        )
    _check_inside(centres, (height, width), mpp, scale)

    transformations = {"global": Identity(), "um": Scale([mpp, mpp], axes=("x", "y"))}
    ids = adata.obs_names.astype(str)
    circles = geopandas.GeoDataFrame(
        {"geometry": shapely.points(centres), "radius": np.full(len(ids), diameter_um / 2 / mpp)}, index=list(ids)
    )
    sdata = SpatialData(
        images={image_key: raster_element(levels, scales, transformations=transformations)},
        shapes={shapes_key: ShapesModel.parse(circles, transformations=dict(transformations))},
    )
    describe(sdata, {image_key: mpp}, image_key=image_key, shapes=shapes_key)
    if adata.n_vars:
        obs = adata.obs.copy()
        obs["region"] = pd.Categorical([shapes_key] * len(ids))
        obs["instance_id"] = list(ids)
        table = AnnData(
            X=adata.X,
            obs=obs,
            var=adata.var.copy(),
            layers=dict(adata.layers),
            obsm={**adata.obsm, "spatial": centres},
            uns={name: value for name, value in adata.uns.items() if name not in {"spatial", "spatialdata_attrs"}},
        )
        table_key = f"{shapes_key}_counts" if table_key is None else table_key
        sdata[table_key] = TableModel.parse(table, region=shapes_key, region_key="region", instance_key="instance_id")
    return sdata


def _positions(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Return the centres ``(n, 2)`` of an AnnData."""
    if key not in adata.obsm:
        raise KeyError(f"no positions obsm[{key!r}] (spatial_key=); obsm has: {listed(adata.obsm)}")
    values = adata.obsm[key]
    values = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "iuf":
        raise ValueError(f"obsm[{key!r}] is {values.dtype} {values.shape}; numbers (n, 2), x and y, are needed")
    values = values[:, :2].astype(np.float64)
    if len(values) == 0:
        raise ValueError("adata is empty: it has no rows")
    if not np.isfinite(values).all():
        raise ValueError(f"obsm[{key!r}] holds NaN or infinite positions; drop those rows")
    if not adata.obs_names.is_unique:
        raise ValueError("obs_names repeat; make them unique with adata.obs_names_make_unique()")
    return values


def _visium(adata: AnnData) -> dict[str, Any]:
    """Return what scanpy and squidpy keep of a Visium sample; empty where there is nothing."""
    spatial = adata.uns.get("spatial")
    if not isinstance(spatial, dict) or not spatial:
        return {}
    if len(spatial) > 1:
        raise ValueError(
            f"adata holds several samples (uns['spatial']: {listed(spatial)}), and one image belongs to one sample: select its "
            "rows, and keep only its entry of uns['spatial']"
        )
    (found,) = spatial.values()
    return dict(found) if isinstance(found, dict) else {}


def _open(image: Any) -> tuple[Sequence[Array], Sequence[Scales], float | None]:
    """Return the levels of the image, their scales, and the pixel size that its file states."""
    from pixnet._sdata.raster_element import pyramid

    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image is {image.dtype} {image.shape}; uint8 (y, x, 3) is needed")
        return *pyramid(image.transpose(2, 0, 1)), None
    if not isinstance(image, str | PathLike):
        raise TypeError(f"image is {type(image).__name__}; a file or an array uint8 (y, x, 3) is needed")
    levels, scales, stated = read_levels(Path(image).expanduser())
    return levels, scales, None if stated is None else (stated[0] + stated[1]) / 2


def _scale_of(visium: dict[str, Any], shape: tuple[int, int]) -> float:
    """Return pixels per unit of the positions: 1, or the factor of the reduced picture that the image is."""
    for name, picture in (visium.get("images") or {}).items():
        factor = visium.get("scalefactors", {}).get(f"tissue_{name}_scalef")
        if factor is not None and np.shape(picture)[:2] == shape:
            logger.warning(
                "the image is the reduced picture %r of the Visium sample, at %.3g of full resolution: nuclei are hardly seen on "
                "it; the full-resolution image is better",
                name,
                factor,
            )
            return float(factor)
    return 1.0


def _measured(centres: NDArray, pitch_um: float | None, stated: float | None, scale: float) -> float:
    """Return the pixel size, from the pitch of the spots."""
    if stated is not None:
        return float(stated) / scale
    if pitch_um is None:
        raise ValueError(
            "the pixel size is unknown: give mpp= (µm/px), or pitch_um=, the distance of neighbouring spots (Visium 100, "
            "legacy ST 200)"
        )
    return pitch_um / pitch(centres, "obsm['spatial']")


def _check_inside(centres: NDArray, shape: tuple[int, int], mpp: float, scale: float) -> None:
    """Refuse positions that belong to another picture, or are in other units."""

    def inside(xy: NDArray) -> float:
        return float(((xy >= 0) & (xy < shape[::-1])).all(axis=1).mean())

    share = inside(centres)
    if share < 0.5:
        hint = "is this the picture that they were placed on, at full resolution?"
        if inside(centres / mpp) > 0.9:
            hint = f"they look like µm: pass scale={1 / mpp:g}"
        elif inside(centres[:, ::-1]) > 0.9:
            hint = "x and y look exchanged"
        (x0, y0), (x1, y1) = centres.min(axis=0), centres.max(axis=0)
        raise ValueError(
            f"{1 - share:.0%} of the {len(centres)} positions lie outside the image of {shape[1]} x {shape[0]} px: x runs from "
            f"{x0:.0f} to {x1:.0f}, y from {y0:.0f} to {y1:.0f} px (scale={scale:g}); {hint}"
        )
    if share < 1:
        logger.warning("%d of %d positions lie outside the image", round((1 - share) * len(centres)), len(centres))
