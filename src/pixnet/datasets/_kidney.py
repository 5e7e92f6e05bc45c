"""The public Visium HD section of a human kidney: bins of several sizes, and the spots that Visium would have measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData, read_h5ad
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, set_transformation

from pixnet._names import listed
from pixnet._sdata.describe import describe

TOTAL = "total_counts"
SIDES = {"bins_008um": 1, "bins_016um": 2, "bins_032um": 4, "bins_056um": 7}
"""Edge of each kind of bin, in bins of 8 µm."""

BIN_UM, SPOT_UM, PITCH_UM = 8, 55, 100
FEWEST_BINS = 30
"""Bins of 8 µm that a whole spot has at least; most have 37."""

SPACE_RANGER = ("*feature_slice.h5", "binned_outputs/square_008um/filtered_feature_bc_matrix.h5")
PART = ("he.jpg", "meta.json", "bins_008um.h5ad", "spots_055um.h5ad")
WHERE = (
    "The public data are 'Visium HD Spatial Gene Expression Library, Human Kidney (FFPE)' on "
    "https://www.10xgenomics.com/datasets: unpack its binned outputs in a folder, put its feature slice and tissue image "
    "beside them, and call pixnet.datasets.kidney(folder)"
)


class _Section(NamedTuple):
    """What either folder holds: positions are pixels of the image, and ``obs`` of both tables has all UMI."""

    image: Any
    mpp: float
    basis: NDArray[np.float64]  # from a bin to the next column, and to the next row
    bins: AnnData
    spots: AnnData


def kidney(
    path: str | PathLike[str] | None = None,
    *,
    image: str | PathLike[str] | None = None,
    shapes: Sequence[str] = ("spots", *SIDES),
) -> SpatialData:
    """Load 10x Genomics' public Visium HD section of a human kidney (FFPE), in bins and in spots.

    Visium HD counts in bins of 8 µm. Coarser bins are sums of whole blocks of these; blocks that lack bins are left
    out. Spots are what Visium would have measured on the section: sums of the bins inside discs of 55 µm, 100 µm apart
    on a hexagonal grid. So a model can be trained on spots and tested at finer scales.

    Nothing is downloaded: get *Visium HD Spatial Gene Expression Library, Human Kidney (FFPE)* from the `datasets page
    <https://www.10xgenomics.com/datasets>`_ of 10x Genomics.

    Parameters
    ----------
    path
        A folder of either kind:

        - 10x's public Space Ranger output: ``binned_outputs/square_008um`` and ``*_feature_slice.h5``, with the tissue
          image beside them (``*_tissue_image.*``, or in ``microscope_image/``). spatialdata-io reads it.
        - The part of the section that pixnet's documentation uses, its left half at 2 µm/px: ``he.jpg``,
          ``meta.json``, ``bins_008um.h5ad`` (405 genes) and ``spots_055um.h5ad`` (3,006 genes).

        ``None``: ``visium_hd_kidney`` in the folder that the environment variable ``PIXNET_DATA_DIR`` names.
    image
        The tissue image of Space Ranger's output, if it lies elsewhere.
    shapes
        Shapes to make: any of ``"spots"``, ``"bins_008um"``, ``"bins_016um"``, ``"bins_032um"``, ``"bins_056um"``.

    Returns
    -------
    SpatialData
        Image ``"he"`` (multiscale, its pixel size recorded), and for each name of ``shapes`` the element (circles or
        squares, in pixels of ``"he"``) and the table ``"{name}_counts"`` of raw counts. ``obs["total_counts"]`` holds
        all UMI of each row, also those of genes that the table lacks: the ``total_key`` of :mod:`pixnet.tl`.

    Raises
    ------
    FileNotFoundError
        If the folder holds neither kind of files, or there is no such image.
    ImportError
        If spatialdata-io is not installed and ``path`` is Space Ranger's output.
    ValueError
        If ``shapes`` names other shapes, or ``image`` is given for a folder that has its own.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.kidney("Visium_HD_Human_Kidney_FFPE")  # doctest: +SKIP
    >>> model = px.tl.train(sdata, shapes="spots", total_key="total_counts")  # doctest: +SKIP
    """
    names = dict.fromkeys([shapes] if isinstance(shapes, str) else shapes)
    unknown = [name for name in names if name != "spots" and name not in SIDES]
    if unknown:
        raise ValueError(f"shapes has {unknown[0]!r}; valid: {listed(['spots', *SIDES])}")
    section = _read(_folder(path), image)
    elements: dict[str, Any] = {"he": section.image}
    for name in names:
        frame, table = _circles(section) if name == "spots" else _squares(section, name)
        elements[name], elements[f"{name}_counts"] = frame, table
    sdata = SpatialData.init_from_elements(elements)
    describe(sdata, {"he": section.mpp}, image_key="he", **({"shapes": "spots"} if "spots" in names else {}))
    return sdata


# folders -----------------------------------------------------------------------------------------------------------


def _folder(path: str | PathLike[str] | None) -> Path:
    """Return the folder that is given, or that of the environment."""
    if path is not None:
        folder = Path(path).expanduser()
    elif root := os.environ.get("PIXNET_DATA_DIR"):
        folder = Path(root).expanduser() / "visium_hd_kidney"
    else:
        raise FileNotFoundError(f"path is None, and PIXNET_DATA_DIR is not set. {WHERE}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}. {WHERE}")
    return folder


def _read(folder: Path, image: str | PathLike[str] | None) -> _Section:
    """Tell the kind of a folder by its files, and read it."""
    lacks_part = [name for name in PART if not (folder / name).is_file()]
    if not lacks_part:
        if image is not None:
            raise ValueError(f"image= is for Space Ranger's output; {str(folder)!r} has its own image, he.jpg")
        return _read_part(folder)
    lacks = [name for name in SPACE_RANGER if not any(folder.glob(name))]
    if lacks:
        raise FileNotFoundError(
            f"{str(folder)!r} is neither Space Ranger's output (it lacks {', '.join(lacks)}) nor the part of the section "
            f"that pixnet's documentation uses (it lacks {', '.join(lacks_part)}). {WHERE}"
        )
    pictures = [*folder.glob("microscope_image/*")] or [*folder.glob("*tissue_image.*")]
    pictures = [file for file in (pictures if image is None else [Path(image).expanduser()]) if file.is_file()]
    if len(pictures) != 1:
        raise FileNotFoundError(
            f"there is no file {str(image)!r} (image=)"
            if image is not None
            else f"{str(folder)!r} has {len(pictures)} tissue images (*tissue_image.*, or in microscope_image); name one: image="
        )
    return _read_space_ranger(folder, pictures[0])


def _read_part(folder: Path) -> _Section:
    """Read the part of the section that the documentation uses."""
    meta = json.loads((folder / "meta.json").read_text())
    pixels = np.asarray(Image.open(folder / "he.jpg").convert("RGB")).transpose(2, 0, 1)
    bins, spots = read_h5ad(folder / "bins_008um.h5ad"), read_h5ad(folder / "spots_055um.h5ad")
    for table in (bins, spots):
        table.obs[TOTAL] = table.obs["total_counts_all_genes"].to_numpy(dtype=float)
    basis = np.array([meta["bin_basis_px"][axis] for axis in ("col", "row")])
    he = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=(2, 2))
    return _Section(he, meta["microns_per_pixel"], basis, bins, spots)


def _read_space_ranger(folder: Path, image: Path) -> _Section:
    """Read Space Ranger's output; pixel size and directions are measured on its bins, which are 8 µm wide by design."""
    try:
        from spatialdata_io import visium_hd
    except ImportError as error:
        raise ImportError("Space Ranger's output needs spatialdata-io: pip install spatialdata-io") from error
    raw = visium_hd(folder, bin_size=BIN_UM, fullres_image_file=image, load_segmentations_only=False)
    he = raw[next(key for key in raw.images if key.endswith("_full_image"))]
    set_transformation(he, {"global": Identity()}, set_all=True)
    bins = raw["square_008um"]
    bins.obs[TOTAL] = np.asarray(bins.X.sum(axis=1), dtype=float).ravel()
    grid = bins.obs[["array_col", "array_row"]].to_numpy(dtype=float)
    fit, *_ = np.linalg.lstsq(np.column_stack([grid, np.ones(len(grid))]), bins.obsm["spatial"])
    mpp = BIN_UM / float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    return _Section(he, mpp, fit[:2], bins, _sum_spots(bins, mpp))


# shapes ------------------------------------------------------------------------------------------------------------


def _sum_spots(bins: AnnData, mpp: float) -> AnnData:
    """Sum the bins whose centre lies in discs of 55 µm; those at the section's edge are left out."""
    xy = bins.obsm["spatial"]
    low, pitch = xy.min(axis=0), np.array([1, np.sqrt(3) / 2]) * PITCH_UM / mpp
    n_cols, n_rows = ((xy.max(axis=0) - low) // pitch).astype(int) + 1
    row, col = (index.ravel() for index in np.indices((n_rows, n_cols)))
    centres = low + np.column_stack([col + row % 2 / 2, row]) * pitch
    near = shapely.STRtree(shapely.points(xy)).query(shapely.points(centres), "dwithin", SPOT_UM / 2 / mpp)
    sums = sparse.csr_array((np.ones(near.shape[1]), tuple(near)), shape=(len(centres), len(xy)))
    full = np.flatnonzero(sums.sum(axis=1) >= FEWEST_BINS)
    sums = sums[full]
    return AnnData(
        sparse.csr_array(sums @ sparse.csr_array(bins.X)).astype(np.float32),
        obs=pd.DataFrame({TOTAL: sums @ bins.obs[TOTAL].to_numpy()}, index=[f"spot_{i}" for i in full]),
        var=pd.DataFrame(index=bins.var_names),
        obsm={"spatial": centres[full]},
    )


def _circles(section: _Section) -> tuple[gpd.GeoDataFrame, AnnData]:
    """Return the spots and their table."""
    spots = section.spots
    frame = gpd.GeoDataFrame(
        {"radius": SPOT_UM / 2 / section.mpp},
        geometry=gpd.points_from_xy(*spots.obsm["spatial"].T),
        index=spots.obs_names,
    )
    return ShapesModel.parse(frame), _table(spots.X, spots.obs[TOTAL], spots.obs_names, spots.var_names, "spots")


def _squares(section: _Section, name: str) -> tuple[gpd.GeoDataFrame, AnnData]:
    """Return squares of whole blocks of bins and their table."""
    bins, k = section.bins, SIDES[name]
    row, col = (bins.obs[f"array_{axis}"].to_numpy(dtype=int) // k for axis in ("row", "col"))
    code, owner, size = np.unique(row * 100_000 + col, return_inverse=True, return_counts=True)
    sums = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(code), len(owner)))
    whole = np.flatnonzero(size == k * k)
    code, sums = code[whole], sums[whole]
    corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * k / 2
    centre = (sums @ bins.obsm["spatial"]) / (k * k)
    rings = centre[:, None, :] + corner[None, :, :1] * section.basis[0] + corner[None, :, 1:] * section.basis[1]
    ids = pd.Index([f"{name}_{i // 100_000}_{i % 100_000}" for i in code])
    counts = sparse.csr_array(sums @ sparse.csr_array(bins.X)).astype(np.float32)
    frame = gpd.GeoDataFrame(geometry=shapely.polygons(rings), index=ids)
    return ShapesModel.parse(frame), _table(counts, sums @ bins.obs[TOTAL].to_numpy(), ids, bins.var_names, name)


def _table(counts: Any, totals: Any, ids: pd.Index, genes: pd.Index, region: str) -> AnnData:
    """Return counts as the table of a shapes element."""
    columns = {"region": pd.Categorical([region] * len(ids)), "instance_id": ids.astype(str)}
    obs = pd.DataFrame(columns | {TOTAL: np.asarray(totals, dtype=float)}, index=ids.astype(str))
    table = AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    return TableModel.parse(table, region=region, region_key="region", instance_key="instance_id")
