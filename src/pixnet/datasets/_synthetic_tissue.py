"""A synthetic H&E tissue whose expression is known everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dask.array as da
import geopandas
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from dask.base import tokenize
from numpy.typing import NDArray

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet._core.slide.pyramid import CHUNK
from pixnet._names import TOTAL
from pixnet._sdata.raster_element import pyramid, raster_element
from pixnet.datasets._synthetic.genes import PLATFORMS, draw_counts
from pixnet.datasets._synthetic.world import SQUARE, TRUTH_UM, TissueSpec, World, WorldArray, world

if TYPE_CHECKING:
    from spatialdata import SpatialData

# Pictures up to this many pixels are kept in memory; larger ones are painted when they are read.
_IN_MEMORY = 4096 * 4096


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

    The tissue has glands, tumour nests with hypoxic centres, lymphoid aggregates, fat, vessels and fibrous stroma on
    empty glass. Nuclei and cytoplasm look as the type of their cell does; haematoxylin and eosin absorb light, and
    the optics blur it. A gene belongs to a cell type, to hypoxia, or to a gradient that leaves no trace in the picture,
    and is shared out between nucleus and cytoplasm. Counts are negative binomial around sums of the true map.

    Equal arguments give equal data on the same machine with the same number of threads, however the picture and the map
    are chunked; between machines the map may differ by float32 rounding.

    Parameters
    ----------
    size_um
        Edge of the square slide (µm), at least 150.
    mpp
        Pixel size of the picture (µm/px), 0.2 to 4.
    n_genes
        Size of the gene panel. A gene is named after its program: ``TUM`` tumour, ``EPI`` glands, ``FIB``, ``TCE``,
        ``BCE``, ``END``, ``MAC``, ``PLA``, ``MUS``, ``ADI`` cell types, ``ALL`` every cell, ``HYP`` hypoxia, ``GRA``
        the gradient.
    seed
        Seed of the tissue and of the counts.
    stain_seed
        Seed of the staining run (colours and strength); 0 is an average one. The tissue stays the same.
    panel_seed
        Seed of the genes: the program of each, its strength, and its share in nuclei. It does not follow ``seed``: a
        gene means the same on every slide, so a model can be trained on one and tested on another.
    shapes
        Shapes to measure: any of ``"spots"`` (Visium: 55 µm, 100 µm apart, hexagonal), ``"cells"``, ``"bins"`` (8 µm),
        ``"spots_legacy"`` (100 µm, 200 µm apart, square), ``"bins_002um"`` (2 µm).
    lazy
        Paint the picture when it is read instead of keeping it in memory. ``None`` does so above 4096 x 4096 px.

    Returns
    -------
    SpatialData
        - image ``"he"``: multiscale ``uint8 (3, y, x)``;
        - image ``"truth"``: the expected density of transcripts at 2 µm/px, one channel per gene and ``__total__`` last,
          float32, lazy, NaN off tissue, averaging 10,000 in ``__total__`` over the tissue: a gene map as
          :func:`pixnet.tl.predict` makes it;
        - for each name of ``shapes`` the element (its shapes lie at least half on tissue) and the table
          ``"{name}_counts"`` of raw counts, whose expectation is the sum of ``truth`` over the shape, times a depth for
          each platform and a capture efficiency for each shape. ``cells`` are polygons that do not overlap, with their
          ``cell_type``.

        The coordinate systems are ``"global"`` (pixels of ``"he"``) and ``"um"``.

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

    from pixnet._sdata.describe import describe

    _check(size_um, mpp, n_genes, seed=seed, stain_seed=stain_seed, panel_seed=panel_seed)
    if isinstance(shapes, str):
        shapes = (shapes,)
    unknown = [name for name in shapes if name not in PLATFORMS]
    if unknown:
        raise ValueError(f"shapes has {unknown[0]!r}; valid: {', '.join(map(repr, PLATFORMS))}")
    made = world(TissueSpec(float(size_um), float(mpp), int(n_genes), int(seed), int(stain_seed), int(panel_seed)))

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
    defaults = {"image_key": "he", **({"shapes": "spots"} if "spots" in shapes else {})}
    describe(sdata, {"he": mpp, "truth": TRUTH_UM}, **defaults)

    places = {name: _places(name, made) for name in dict.fromkeys(shapes)}
    for name, (keep, sums) in _aggregate(made, places).items():
        _add(sdata, made, name, places[name], keep, sums, transformations)
    return sdata


def _check(size_um: float, mpp: float, n_genes: int, **seeds: int) -> None:
    """Refuse arguments that are out of range."""
    if not (np.isfinite(size_um) and 150 <= size_um <= 50_000):
        raise ValueError(f"size_um is {size_um!r}; 150 to 50,000 µm are possible")
    if not (np.isfinite(mpp) and 0.2 <= mpp <= 4):
        raise ValueError(f"mpp is {mpp!r}; 0.2 to 4 µm/px are possible")
    for name, value, least in (("n_genes", n_genes, 1), *((name, seed, 0) for name, seed in seeds.items())):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; a whole number of at least {least} is needed")


def _dask(source: WorldArray, chunk: int) -> da.Array:
    """Wrap the picture or the map as a dask array."""
    name = f"synthetic-{source.what}-{tokenize(source.source.spec)}"
    return da.from_array(source, chunks=(source.shape[0], chunk, chunk), name=name, fancy=False, asarray=False)


def _places(name: str, made: World) -> NDArray[np.object_]:
    """Return the geometries of a platform in µm; spots are points."""
    if name == "cells":
        return made.outlines()
    platform, size = PLATFORMS[name], made.size
    if platform.edge:
        n = int(size / platform.edge + 1e-9)
        y, x = (index.ravel() * platform.edge for index in np.indices((n, n)))
        return shapely.box(x, y, x + platform.edge, y + platform.edge)
    # Legacy arrays are square; Visium's are hexagonal. Both start half a pitch from the corner.
    hexagonal = name == "spots"
    rise = platform.pitch * (np.sqrt(3) / 2 if hexagonal else 1)
    row, col = (index.ravel() for index in np.indices((int(size / rise) + 1, int(size / platform.pitch) + 1)))
    x = (col + 0.5 + (0.5 * (row % 2) if hexagonal else 0)) * platform.pitch
    y = (row + 0.5) * rise
    inside = np.maximum(x, y) + platform.diameter / 2 <= size
    return shapely.points(x[inside], y[inside])


def _aggregate(made: World, places: dict[str, NDArray]) -> dict[str, tuple[NDArray, NDArray]]:
    """Return, by name, the shapes that are at least half on tissue, and ``(shapes, sources)``: sums over each shape."""
    n_sources = made.panel.loadings.shape[1]
    to_pixels = np.diag([1 / TRUTH_UM, 1 / TRUTH_UM, 1.0])
    packed = {
        name: ShapeArrays.from_geometries(geometries, PLATFORMS[name].diameter / 2 or None).transform(to_pixels)
        for name, geometries in places.items()
    }
    # The last column counts tissue.
    sums = {name: np.zeros((len(geometries), n_sources + 1)) for name, geometries in places.items()}
    rows, cols = (-(-length // SQUARE) if places else 0 for length in made.truth_shape)
    for row, col in np.ndindex(rows, cols):
        sources = made.square(row, col).reshape(n_sources, -1).astype(np.float64)
        values = np.concatenate([np.nan_to_num(sources), np.isfinite(sources[:1])])
        y0, x0 = row * SQUARE, col * SQUARE
        for name, geometries in packed.items():
            b = geometries.bounds
            inside = (b[:, 2] > x0) & (b[:, 0] < x0 + SQUARE) & (b[:, 3] > y0) & (b[:, 1] < y0 + SQUARE)
            near = np.flatnonzero(inside)
            if len(near):
                sums[name][near] += coverage(geometries.take(near), (y0, x0, SQUARE, SQUARE)) @ values.T
    return {
        name: (part[:, -1] >= 0.5 * packed[name].area * (1 - 1e-9), part[:, :-1] * TRUTH_UM**2)
        for name, part in sums.items()
    }


def _add(
    sdata: SpatialData,
    made: World,
    name: str,
    geometries: NDArray,
    keep: NDArray[np.bool_],
    sums: NDArray,
    transformations: dict[str, Any],
) -> None:
    """Add the shapes that are kept, and their counts, to the object."""
    from spatialdata.models import ShapesModel, TableModel

    mpp = made.spec.mpp
    columns: dict[str, NDArray] = {"geometry": shapely.transform(geometries[keep], lambda xy: xy / mpp)}
    if PLATFORMS[name].diameter:
        columns["radius"] = np.full(int(keep.sum()), PLATFORMS[name].diameter / 2 / mpp)
    if name == "cells":
        columns["cell_type"] = pd.Categorical(made.cell_types()[keep])
    index = pd.RangeIndex(int(keep.sum()))
    frame = geopandas.GeoDataFrame(columns, geometry="geometry", index=index)
    sdata.shapes[name] = ShapesModel.parse(frame, transformations=dict(transformations))

    counts = draw_counts(sums[keep] @ (made.panel.loadings * made.scale / 1e4).T, name, made.spec.seed)
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
