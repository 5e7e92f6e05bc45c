"""A synthetic H&E tissue whose expression is known everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dask.array as da
import geopandas
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from dask.base import tokenize
from numpy.typing import NDArray

from pixnet._core.coverage.coverage import coverage
from pixnet._core.coverage.shapes import pack
from pixnet._names import TOTAL
from pixnet.datasets._synthetic.genes import PLATFORMS, draw_counts
from pixnet.datasets._synthetic.world import SQUARE, TRUTH_UM, Recipe, World, WorldArray, world
from pixnet.io._raster import CHUNK, pyramid, raster_element

if TYPE_CHECKING:
    from spatialdata import SpatialData

# Pictures up to this many pixels are kept in memory; larger ones are painted when they are read.
_IN_MEMORY = 4096 * 4096
_SPOTS = {"spots": (100.0, 55.0), "spots_legacy": (200.0, 100.0)}  # pitch and diameter, um
_BINS = {"bins": 8.0, "bins_002um": 2.0}


def synthetic_tissue(
    size_um: float = 1000,
    mpp: float = 0.5,
    n_genes: int = 50,
    seed: int = 0,
    *,
    stain_seed: int = 0,
    panel_seed: int = 0,
    shapes: Sequence[str] = ("spots", "cells", "bins"),
    lazy: bool | None = None,
) -> SpatialData:
    """Make an H&E picture, and spatial transcriptomics of it, from a tissue whose expression is known everywhere.

    Glands, tumour nests with hypoxic centres, lymphoid aggregates, fat, vessels, fibrous stroma, a fold and empty glass;
    nuclei by cell type; absorption by haematoxylin and eosin, uneven light, blur, camera noise, JPEG. Genes belong to
    cell types, to hypoxia or to a gradient that leaves no trace in the picture, and lie in nucleus and cytoplasm in
    different shares. Counts are negative binomial around sums of the true map. Equal arguments make equal data, however
    the picture is chunked.

    Parameters
    ----------
    size_um
        Edge of the square slide in um, at least 150.
    mpp
        um per pixel of the picture, 0.2 to 4.
    n_genes
        Size of the gene panel. Names tell the program: ``TUM`` tumour, ``EPI`` glands, ``FIB``, ``TCE``, ``BCE``,
        ``END``, ``MAC``, ``PLA``, ``MUS``, ``ADI`` cell types, ``ALL`` every cell, ``HYP`` hypoxia, ``GRA`` the gradient.
    seed
        Seed of the tissue and of the counts.
    stain_seed
        Seed of the staining run (colours, strength, light); 0 is a middling one. The tissue stays the same.
    panel_seed
        Seed of the genes: what each is expressed in, how strongly, and its share in nuclei. It does not follow ``seed``:
        a gene means the same on every slide, so a model can be trained on one and tested on another.
    shapes
        What is measured: any of ``"spots"`` (Visium: 55 um, 100 um apart, hexagonal), ``"cells"``, ``"bins"`` (8 um),
        ``"spots_legacy"`` (100 um, 200 um apart, square), ``"bins_002um"`` (2 um).
    lazy
        Paint the picture when it is read instead of keeping it in memory; ``None``: when it has more than 4096 x 4096 px.

    Returns
    -------
    SpatialData
        - image ``"he"``: multiscale ``uint8 (3, y, x)``;
        - image ``"truth"``: the expected density of transcripts at 2 um/px, one channel per gene and ``__total__`` last,
          float32, lazy, NaN off tissue, averaging 10,000 in ``__total__`` over the tissue: a gene map as
          :func:`pixnet.tl.predict` makes it;
        - for each name of ``shapes`` the element (at least half on tissue) and the table ``"{name}_counts"`` of raw
          counts, whose expectation is the sum of ``truth`` over the shape, times a depth for each platform and a capture
          efficiency for each shape. ``cells`` are polygons that do not overlap, with their ``cell_type``.

        Coordinate systems ``"global"`` (pixels of ``"he"``) and ``"um"``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300, n_genes=13)
    >>> sdata["truth"].shape
    (14, 150, 150)
    """
    from spatialdata import SpatialData
    from spatialdata.transformations import Identity, Scale
    from spatialdata.transformations import Sequence as TransformSequence

    from pixnet._sdata.pixel_size import write_mpp
    from pixnet._sdata.record import note

    _check(size_um, mpp, n_genes, seed=seed, stain_seed=stain_seed, panel_seed=panel_seed)
    if isinstance(shapes, str):
        shapes = (shapes,)
    unknown = [name for name in shapes if name not in PLATFORMS]
    if unknown:
        raise ValueError(f"shapes has {unknown[0]!r}; valid: {', '.join(map(repr, PLATFORMS))}")
    made = world(Recipe(float(size_um), float(mpp), int(n_genes), int(seed), int(stain_seed), int(panel_seed)))

    transformations = {"global": Identity(), "um": Scale([mpp, mpp], axes=("x", "y"))}
    picture = WorldArray(made, "render")
    if lazy is None:
        lazy = picture.shape[1] * picture.shape[2] > _IN_MEMORY
    pixels = _dask(picture, CHUNK)
    levels, scales = pyramid(pixels if lazy else pixels.compute(scheduler="threads"))
    to_pixels = Scale([TRUTH_UM / mpp, TRUTH_UM / mpp], axes=("x", "y"))
    truth = raster_element(
        [_dask(WorldArray(made, "truth"), 2 * SQUARE)],
        [(1.0, 1.0)],
        transformations={name: TransformSequence([to_pixels, last]) for name, last in transformations.items()},
        channels=[*made.panel.names, TOTAL],
    )
    sdata = SpatialData(images={"he": raster_element(levels, scales, transformations=transformations), "truth": truth})
    write_mpp(sdata, "he", float(mpp))
    write_mpp(sdata, "truth", TRUTH_UM)
    note(sdata, "defaults", "image_key", "he")
    if "spots" in shapes:
        note(sdata, "defaults", "shapes", "spots")

    places = {name: _places(name, made) for name in dict.fromkeys(shapes)}
    for name, (keep, sums) in _aggregate(made, places).items():
        _add(sdata, made, name, places[name], keep, sums, transformations)
    return sdata


def _check(size_um: float, mpp: float, n_genes: int, **seeds: int) -> None:
    if not (np.isfinite(size_um) and 150 <= size_um <= 50_000):
        raise ValueError(f"size_um is {size_um!r}; 150 to 50,000 um are possible")
    if not (np.isfinite(mpp) and 0.2 <= mpp <= 4):
        raise ValueError(f"mpp is {mpp!r}; 0.2 to 4 um per pixel are possible")
    for name, value, least in (("n_genes", n_genes, 1), *((name, seed, 0) for name, seed in seeds.items())):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {least} is needed")


def _dask(source: WorldArray, chunk: int) -> da.Array:
    name = f"synthetic-{source.what}-{tokenize(source.source.recipe)}"
    return da.from_array(source, chunks=(source.shape[0], chunk, chunk), name=name, fancy=False, asarray=False)


def _places(name: str, made: World) -> NDArray:
    """Geometries of a platform in um; spots are points."""
    size = made.size
    if name == "cells":
        return made.outlines()
    if name in _BINS:
        edge = _BINS[name]
        n = int(size / edge + 1e-9)
        row, col = (index.ravel() for index in np.indices((n, n)))
        return shapely.box(col * edge, row * edge, (col + 1) * edge, (row + 1) * edge)
    pitch, diameter = _SPOTS[name]
    rise = pitch * (np.sqrt(3) / 2 if name == "spots" else 1)
    # Legacy arrays are square; Visium's are hexagonal. Both start half a pitch from the corner.
    row, col = (index.ravel() for index in np.indices((int(size / rise) + 1, int(size / pitch) + 1)))
    x = (col + 0.5 + (0.5 * (row % 2) if name == "spots" else 0)) * pitch
    y = (row + 0.5) * rise
    inside = (x + diameter / 2 <= size) & (y + diameter / 2 <= size)
    return shapely.points(x[inside], y[inside])


def _aggregate(made: World, places: dict[str, NDArray]) -> dict[str, tuple[NDArray, NDArray]]:
    """Sum the sources of expression over all shapes in one pass over the tissue.

    Returns
    -------
    dict
        By name: which shapes are at least half on tissue, and ``(shapes, sources)`` of all of them, times um^2.
    """
    pixel = TRUTH_UM**2
    n_sources = made.panel.loadings.shape[1]
    packed, sums, areas = {}, {}, {}
    for name, geometries in places.items():
        sums[name] = np.zeros((len(geometries), n_sources + 1))
        if name not in _BINS:
            radius = _SPOTS[name][1] / 2 if name in _SPOTS else None
            packed[name] = pack(geometries, radius).transform(np.diag([1 / TRUTH_UM, 1 / TRUTH_UM, 1.0]))
            areas[name] = packed[name].area * pixel
        else:
            areas[name] = np.full(len(geometries), _BINS[name] ** 2)
    rows, cols = (-(-length // SQUARE) if places else 0 for length in made.truth_shape)
    for row in range(rows):
        for col in range(cols):
            sources = made.square(row, col).reshape(n_sources, -1).astype(np.float64)
            # The last column counts tissue.
            values = np.concatenate([np.nan_to_num(sources), np.isfinite(sources[:1])]) * pixel
            window = (row * SQUARE, col * SQUARE, SQUARE, SQUARE)
            for name in places:
                if name in _BINS:
                    _add_bins(sums[name], values, row, col, int(_BINS[name] / TRUTH_UM), made.size)
                    continue
                b = packed[name].bounds
                x0, y0, x1, y1 = window[1], window[0], window[1] + SQUARE, window[0] + SQUARE
                near = np.flatnonzero((b[:, 2] > x0) & (b[:, 0] < x1) & (b[:, 3] > y0) & (b[:, 1] < y1))
                if len(near):
                    sums[name][near] += coverage(packed[name].take(near), window) @ values.T
    return {name: (part[:, -1] >= 0.5 * areas[name] * (1 - 1e-9), part[:, :-1]) for name, part in sums.items()}


def _add_bins(sums: NDArray, values: NDArray, row: int, col: int, edge: int, size: float) -> None:
    """Bins are whole truth pixels, and squares whole bins: sums of blocks."""
    n = int(size / (edge * TRUTH_UM) + 1e-9)
    per = SQUARE // edge
    blocks = values.reshape(len(values), per, edge, per, edge).sum(axis=(2, 4))
    rows, cols = (np.arange(at * per, min((at + 1) * per, n)) for at in (row, col))
    index = rows[:, None] * n + cols[None, :]
    sums[index.ravel()] = blocks[:, : len(rows), : len(cols)].reshape(len(values), -1).T


def _add(
    sdata: SpatialData,
    made: World,
    name: str,
    geometries: NDArray,
    keep: NDArray[np.bool_],
    sums: NDArray,
    transformations: dict,
) -> None:
    from spatialdata.models import ShapesModel, TableModel

    mpp = made.recipe.mpp
    columns: dict[str, NDArray] = {"geometry": shapely.transform(geometries[keep], lambda xy: xy / mpp)}
    if name in _SPOTS:
        columns["radius"] = np.full(int(keep.sum()), _SPOTS[name][1] / 2 / mpp)
    if name == "cells":
        columns["cell_type"] = pd.Categorical(made.cell_types()[keep])
    index = pd.RangeIndex(int(keep.sum()))
    frame = geopandas.GeoDataFrame(columns, geometry="geometry", index=index)
    sdata.shapes[name] = ShapesModel.parse(frame, transformations=dict(transformations))

    counts = draw_counts(sums[keep] @ (made.panel.loadings * made.scale / 1e4).T, name, made.recipe.seed)
    obs = pd.DataFrame(
        {"region": pd.Categorical([name] * len(index)), "instance_id": np.arange(len(index))}, index=index.astype(str)
    )
    if name == "cells":
        obs["cell_type"] = columns["cell_type"]
    centres = shapely.centroid(columns["geometry"])
    table = AnnData(
        X=counts,
        obs=obs,
        var=pd.DataFrame(index=made.panel.names),
        obsm={"spatial": np.column_stack([shapely.get_x(centres), shapely.get_y(centres)])},
    )
    sdata.tables[f"{name}_counts"] = TableModel.parse(
        table, region=name, region_key="region", instance_key="instance_id"
    )
