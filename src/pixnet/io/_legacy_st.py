"""Legacy Spatial Transcriptomics (spots of 100 µm on a 200 µm grid): tables and a picture into SpatialData."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from pixnet._logging import logger
from pixnet._sdata.raster_element import pyramid, raster_element
from pixnet.io._picture import read_picture

if TYPE_CHECKING:
    from spatialdata import SpatialData


def legacy_st(
    counts: str | PathLike[str] | pd.DataFrame,
    spots: str | PathLike[str] | pd.DataFrame,
    image: str | PathLike[str] | np.ndarray,
    *,
    mpp: float | None = None,
    pitch_um: float = 200.0,
    diameter_um: float = 100.0,
    image_key: str = "he",
    shapes_key: str = "spots",
    table_key: str | None = None,
) -> SpatialData:
    """Read a legacy Spatial Transcriptomics section.

    Parameters
    ----------
    counts
        Table of raw counts, spots in rows and genes in columns, the first column (the index of a DataFrame) the spot
        id ``"{x}x{y}"``: a ``.tsv``, ``.csv`` (also ``.gz``) or a DataFrame. Genes named more than once are summed.
    spots
        Table of spots with columns ``x`` and ``y`` (place in the array) and ``pixel_x``, ``pixel_y`` (centre in pixels
        of ``image``); where a column ``selected`` exists, spots with 0 are left out. Columns ``new_x``, ``new_y``
        (place in the array, adjusted to the measured centre) serve to measure the pixel size.
    image
        The H&E picture (8-bit RGB JPEG, PNG or TIFF), or an array ``uint8 (y, x, 3)``.
    mpp
        Pixel size of ``image`` (µm/px); ``None`` measures it from the spots and ``pitch_um``.
    pitch_um, diameter_um
        Distance between the centres of neighbouring spots, and diameter of a spot (µm).
    image_key, shapes_key, table_key
        Names of the elements; ``table_key=None`` is ``"{shapes_key}_counts"``.

    Returns
    -------
    SpatialData
        Multiscale image ``"he"``, circles ``"spots"`` (selected spots that have counts, index ``"{x}x{y}"``), table
        ``"spots_counts"`` (raw counts, sparse float32). Coordinate systems ``"global"`` (pixels of the image) and
        ``"um"``. The pixel size is recorded as by :func:`pixnet.pp.set_mpp`.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If columns are missing, ids are repeated or do not join, counts are not raw, or all spots lie outside the image.

    Examples
    --------
    >>> import numpy as np, pandas as pd, pixnet as px
    >>> ids = ["1x1", "2x1", "1x2", "2x2"]
    >>> counts = pd.DataFrame([[1, 0], [2, 3], [0, 1], [5, 5]], index=ids, columns=["ACTB", "CD3E"])
    >>> spots = pd.DataFrame(
    ...     {"x": [1, 2, 1, 2], "y": [1, 1, 2, 2], "pixel_x": [100, 300, 100, 300], "pixel_y": [100, 100, 300, 300]}
    ... )
    >>> sdata = px.io.legacy_st(counts, spots, np.full((400, 400, 3), 255, dtype=np.uint8))
    >>> sdata["spots"].radius.round(6).tolist()  # px: spots are 100 µm across, and 1 µm/px is found
    [50.0, 50.0, 50.0, 50.0]
    """
    import geopandas
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    from pixnet._sdata.describe import describe

    table_key = f"{shapes_key}_counts" if table_key is None else table_key
    places = _read_spots(spots)
    matrix = _read_counts(counts)
    common = places.index.intersection(matrix.index, sort=False)
    if len(common) == 0:
        hint = ""
        if len(places.index.intersection(matrix.columns)):
            hint = "; the spots are the columns of counts: pass it transposed"
        raise ValueError(
            f"no spot id is in both tables: counts has {_some(matrix.index)}, spots make {_some(places.index)}{hint}"
        )
    left_out = len(places) - len(common), len(matrix) - len(common)
    if any(left_out):
        logger.info("%d spots have no counts and %d rows of counts no spot; both are left out", *left_out)
    if mpp is None:
        mpp = pitch_um / _pitch_px(places)
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp!r}; a positive number (µm/px) is needed")
    places, matrix = places.loc[common], matrix.loc[common]

    pixels = _read_image(image)
    height, width = pixels.shape[1:]
    x, y = places["pixel_x"].to_numpy(float), places["pixel_y"].to_numpy(float)
    outside = (x < 0) | (y < 0) | (x >= width) | (y >= height)
    if outside.all():
        raise ValueError(
            f"all {len(x)} spots lie outside the image of {width} x {height} px: pixel_x runs from {x.min():.0f} to "
            f"{x.max():.0f}, pixel_y from {y.min():.0f} to {y.max():.0f}; is this the picture that the spots were placed on?"
        )
    if outside.any():
        logger.warning("%d of %d spots have their centre outside the image", outside.sum(), len(x))

    transformations = {"global": Identity(), "um": Scale([mpp, mpp], axes=("x", "y"))}
    levels, scales = pyramid(pixels)
    circles = geopandas.GeoDataFrame(
        {"geometry": shapely.points(x, y), "radius": np.full(len(x), diameter_um / 2 / mpp)}, index=list(common)
    )
    obs = pd.DataFrame(
        {
            "region": pd.Categorical([shapes_key] * len(common)),
            "instance_id": list(common),
            "array_x": places["x"].to_numpy(),
            "array_y": places["y"].to_numpy(),
        },
        index=list(common),
    )
    adata = AnnData(
        X=sparse.csr_matrix(matrix.to_numpy(dtype=np.float32)),
        obs=obs,
        var=pd.DataFrame(index=matrix.columns.astype(str)),
        obsm={"spatial": np.column_stack([x, y])},
    )
    sdata = SpatialData(
        images={image_key: raster_element(levels, scales, transformations=transformations)},
        shapes={shapes_key: ShapesModel.parse(circles, transformations=dict(transformations))},
        tables={table_key: TableModel.parse(adata, region=shapes_key, region_key="region", instance_key="instance_id")},
    )
    describe(sdata, {image_key: mpp}, image_key=image_key, shapes=shapes_key)
    return sdata


def _some(names: pd.Index) -> str:
    """Return the first names, as an error shows them."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _read_table(source: str | PathLike[str] | pd.DataFrame, what: str, index_col: int | None) -> pd.DataFrame:
    """Return a table, from a file or as it is given."""
    if isinstance(source, pd.DataFrame):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}")
    separator = "," if ".csv" in path.suffixes else "\t"
    try:
        return pd.read_csv(path, sep=separator, index_col=index_col)
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{what}: {path} is not a readable table ({error})") from error


def _read_spots(source: str | PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Return the selected spots, indexed by id."""
    table = _read_table(source, "spots", None)
    missing = [name for name in ("x", "y", "pixel_x", "pixel_y") if name not in table.columns]
    if missing:
        raise ValueError(f"spots has no column {', '.join(map(repr, missing))}; it has {_some(table.columns)}")
    if "selected" in table.columns:
        table = table[table["selected"].astype(bool)]
    if len(table) == 0:
        raise ValueError("spots is empty: no spot is selected")
    if not np.isfinite(table[["x", "y", "pixel_x", "pixel_y"]].to_numpy(float)).all():
        raise ValueError("spots has NaN or infinite values in x, y, pixel_x or pixel_y")
    x, y = (np.rint(table[name].to_numpy(float)).astype(int) for name in ("x", "y"))
    table = table.assign(x=x, y=y)
    table.index = [f"{a}x{b}" for a, b in zip(x, y)]
    if table.index.has_duplicates:
        raise ValueError(f"spots has {_some(table.index[table.index.duplicated()])} more than once")
    return table


def _read_counts(source: str | PathLike[str] | pd.DataFrame) -> pd.DataFrame:
    """Return raw counts, spots in rows; genes named more than once are summed."""
    table = _read_table(source, "counts", 0)
    table.index = table.index.astype(str)
    if table.index.has_duplicates:
        raise ValueError(f"counts has the spot {_some(table.index[table.index.duplicated()])} more than once")
    texts = [name for name, dtype in table.dtypes.items() if dtype.kind not in "biuf"]
    if texts:
        raise ValueError(f"counts has columns that are not numbers: {_some(pd.Index(texts))}")
    values = table.to_numpy()
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("counts has NaN or infinite values; raw counts are needed")
        if (values != np.rint(values)).any():
            raise ValueError("counts has fractions; raw counts are needed, not normalised values")
    if (values < 0).any():
        raise ValueError("counts has negative values; raw counts are needed")
    if table.columns.has_duplicates:
        repeated = table.columns[table.columns.duplicated()].unique()
        logger.warning("%d genes are named more than once in counts and are summed: %s", len(repeated), _some(repeated))
        table = table.T.groupby(level=0, sort=False).sum().T
    return table


def _read_image(image: str | PathLike[str] | np.ndarray) -> np.ndarray:
    """Return the picture as ``uint8 (3, y, x)``."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image is {image.dtype} {image.shape}; uint8 (y, x, 3) is needed")
        return image.transpose(2, 0, 1)
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"image: no file {path}")
    return read_picture(path)


def _pitch_px(places: pd.DataFrame) -> float:
    """Return the pixels between neighbouring spots: the linear fit of pixel positions on array positions."""
    columns = ["new_x", "new_y"] if {"new_x", "new_y"} <= set(places.columns) else ["x", "y"]
    array = np.column_stack([places[columns].to_numpy(float), np.ones(len(places))])
    if len(places) < 3 or np.linalg.matrix_rank(array - array.mean(0) * [1, 1, 0]) < 3:
        raise ValueError("the spots are too few or in one line to measure the pixel size; give mpp= (µm/px)")
    fit = np.linalg.lstsq(array, places[["pixel_x", "pixel_y"]].to_numpy(float), rcond=None)[0][:2]
    pitch = float(np.sqrt(abs(np.linalg.det(fit))))
    long, short = np.linalg.svd(fit, compute_uv=False)
    if not np.isfinite(pitch) or pitch <= 0 or long > 1.1 * short:
        raise ValueError(
            f"the spots are {long:.1f} px apart in one direction and {short:.1f} px in the other; "
            "a square array is expected: check x, y, pixel_x and pixel_y, or give mpp="
        )
    return pitch
