"""Sum the pixels of an image up over shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pixnet._core.coverage import WEIGHTS, ShapeArrays, Weights
from pixnet._core.uncertainty import check_level
from pixnet._core.zonal import VALID_NAMES, ZonalStatistics, find_statistic, zonal_statistics
from pixnet._logging import logger
from pixnet._names import check_genes, listed
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_any_image, resolve_shapes
from pixnet._sdata.novelty import find_novelty
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names, full_resolution, is_gene_map
from pixnet._sdata.selection import Selection
from pixnet._sdata.shapes import check_element, read_shapes
from pixnet._sdata.store import element_store as store
from pixnet._sdata.store.bound import check_bound
from pixnet._sdata.tables import Plan, build_table, mean_novelty, table_rows
from pixnet._sdata.target import check_target
from pixnet._sdata.transforms import shared_coordinate_system, to_coordinate_system


def aggregate(
    sdata: SpatialData,
    shapes: str | Sequence[str],
    *,
    image_key: str | None = None,
    genes: str | Sequence[str] | None = None,
    agg_func: str | Sequence[str] = "mean",
    weights: Weights = "area",
    min_coverage: float = 0.0,
    interval: float | None = None,
    coordinate_system: str | None = None,
    key_added: str | Mapping[str, str] | None = None,
    overwrite: bool = False,
    inplace: bool = True,
) -> AnnData | dict[str, AnnData] | None:
    """Aggregate an image over shapes: a table with one row for each spot, cell, bin or region.

    Every pixel counts with the exact share of its area that lies inside the shape, so shapes of any size work, down to
    parts of a pixel, and bins added up give the spots that they make up. The shapes are moved into the pixels of the
    image's full-resolution level; the image is never resampled, and is read once for all shapes elements.

    Parameters
    ----------
    sdata
        Object with the image and the shapes.
    shapes
        Name of a shapes element (polygons, multipolygons, circles; overlaps and holes count as they are) or of a labels
        element (one row for each label but 0), or a list of names: one table is made for each.
    image_key
        Any image: a gene map from :func:`pixnet.tl.predict` or any other. None: the gene map that pixnet made, or
        the only one.
    genes
        Channels to aggregate, one name or several; None: all. ``"trusted"``: the genes of a gene map whose held-out
        correlation is above 0 with its whole 95 % interval.
    agg_func
        Statistic, or a list of them: ``"mean"``, ``"sum"``, ``"std"``, ``"min"``, ``"max"``, ``"median"``, and ``"q"``
        with a percentage for any quantile, such as ``"q90"`` or ``"q2.5"``. All weight pixels by the part of their area
        inside the shape, but min and max, which are over all pixels with any. ``"mean"`` is for what has a level
        (intensity), ``"sum"`` for what adds up (counts per pixel).
    weights
        ``"area"``: the exact share of each pixel. ``"center"``: whole pixels, those whose centre is inside; quicker,
        and wrong by some percent for shapes a few pixels across.
    min_coverage
        Rows of which a smaller share (0 to 1) has predictions become NaN.
    interval
        Probability of an interval for each value, such as 0.9: layers ``"lower"`` and ``"upper"``. None: none.
    coordinate_system
        Where shapes and image meet. None: "global" if shared, else the first shared one.
    key_added
        Name of the table, or a dict of them by shapes element. None: ``"{shapes}_genes"`` from a gene map,
        ``"{shapes}_{image_key}"`` from any other image.
    overwrite
        Replace a table of that name.
    inplace
        Add the tables to ``sdata``, and to its store if it has one. Otherwise return them and write nothing.

    Returns
    -------
    AnnData, dict or None
        None if ``inplace``; else a table or, for a list of shapes, a dict of tables by name of the shapes. Rows are the
        shapes, in their order, NaN where nothing was predicted. A table has

        ``X``
            float32. From a gene map: CP10k, counts per 10,000 transcripts, as the ratio of sums
            ``1e4 * sum(gene) / sum(__total__)`` (take ``log1p`` yourself, after aggregation). A map of the published
            model (``PixNet.paper``), whose total is called ``__total_log_sum__``: ``expm1`` of its sum over the
            predicted area in µm². From any other image: the (first) statistic of each channel.
        ``layers``
            From a gene map: ``"density"``, the area mean of its values; with ``interval``, ``"lower"`` and ``"upper"``
            in CP10k; statistics other than the mean are layers of these values (``"sum"`` times µm²). From any other
            image: the further statistics; ``"sum"`` is over pixels.
        ``obs``
            ``region`` and ``instance_id``, which link rows to shapes; ``area`` of the whole shape in µm²;
            ``coverage``, the share of it that has predictions; from a gene map ``total``, the mean of ``__total__``
            over the predicted pixels / 1e4, so that ``X = density / total`` where the map holds densities; and
            ``novelty``, the mean percentile of how unlike the training tissue it is, where `pixnet.tl.predict` wrote
            that.
        ``var``
            From a gene map whose model knows: what held-out shapes showed of each gene. ``validation_pearson`` with the
            ends of its 95 % interval (``_low``, ``_high``), ``validation_ratio`` (measured over predicted amounts,
            before they were balanced), ``noise_ceiling`` (the r of a perfect prediction) and ``dispersion``.
        ``obsm["spatial"]``
            Centroids in the coordinate system.
        ``uns["pixnet"]``
            Parameters, units and the model.

    Raises
    ------
    KeyError
        If an element or a gene is not there.
    TypeError
        If an argument or a geometry is of the wrong type.
    ValueError
        If an argument has a wrong value, no coordinate system is shared, ids repeat, geometries are invalid, the name
        of a table is taken, or sums need the pixel size and it is not known. All of this is checked before any pixel is
        read.

    Notes
    -----
    A quantile is the value below which that share of a shape's area lies; where a range of values does it, its middle,
    so that the median of whole pixels is numpy's. Quantiles are exact. For this the pixels of shapes that reach over
    several tiles of the image (512 px, or its chunks if larger) are kept until the last tile of the shape, which may
    take 2 GB; an aggregation that would take more is refused before any pixel is read. Quantiles of a gene map are
    those of its densities, pixel by pixel.

    Intervals: the expression of a shape is taken to be Gamma distributed around the prediction, so that counts of a
    shape are negative binomial. A gene's dispersion is what held-out shapes had beyond counting noise. The error of the
    model is taken to be a field in space whose correlation falls exponentially with distance, over a length that
    neighbouring held-out shapes tell; a shape sees its mean, so smaller shapes have more dispersion and larger ones
    less.

    If a ``dask.distributed`` client is in scope, its workers do the work, with the same result. Where the pixel size of
    the image is unknown, ``area`` is in pixels, and ``uns["pixnet"]["area_unit"]`` says so.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=200, n_genes=5)
    >>> px.tl.aggregate(sdata, ["cells", "spots"], image_key="truth")
    >>> sdata.tables["cells_genes"].X.shape[1]
    5
    """
    check_sdata(sdata)
    image_key = resolve_any_image(sdata, image_key)
    names = resolve_shapes(sdata, shapes)
    plan = _check(sdata, image_key, names, genes, agg_func, weights, min_coverage, coordinate_system, interval)
    keys = _table_keys(names, key_added, plan)
    if inplace:
        for key in keys.values():
            check_target(sdata, key, "tables", overwrite=overwrite)
    # Labels are read last: reading shapes checks them, and no pixel may be read before all is checked.
    for name in set(names) - set(sdata.shapes):
        check_element(sdata, name)
    order = sorted(names, key=lambda name: name not in sdata.shapes)
    found = {name: read_shapes(sdata, name, image_key, plan.systems[name]) for name in order}
    for name, element in found.items():
        if not len(element.ids):
            raise ValueError(f"{name!r} is empty: it has no shapes to aggregate over")
    with ThreadPoolExecutor(1) as pool:  # ids and centroids need no pixels, and pixels are waited for
        rows = {name: pool.submit(table_rows, sdata, plan, name, element) for name, element in found.items()}
        geometries = ShapeArrays.concatenate([element.geometries for element in found.values()])
        sums = zonal_statistics(
            plan.data.data,
            geometries,
            channels=plan.channels,
            validity=None if plan.selection is None else len(plan.channels) - 1,
            statistics=plan.computed,
            weights=weights,
            description=f"aggregate {image_key}",
        )
    check_bound(plan.data, f"image {image_key!r}")  # as what was read is nothing if its store went meanwhile
    novelty = None if plan.novelty_key is None else mean_novelty(sdata, image_key, plan.novelty_key, geometries)

    parts, places, start = {}, {}, 0
    for name, element in found.items():
        places[name] = slice(start, start + len(element.ids))
        parts[name] = _take(sums, places[name])
        start += len(element.ids)
    del sums
    tables = {}
    for name, place in places.items():
        own = None if novelty is None else novelty[place]
        tables[name] = build_table(sdata, plan, name, rows[name].result(), parts.pop(name), own)
    if not inplace:
        one = isinstance(shapes, str) or shapes is None
        return tables[names[0]] if one else {name: tables[name] for name in names}
    for name in names:
        table = tables[name]
        store.put(sdata, keys[name], table, overwrite=overwrite)
        logger.info("added table sdata.tables[%r]: %d shapes x %d channels", keys[name], *table.shape)
    return None


def _check(
    sdata: SpatialData,
    image_key: str,
    names: list[str],
    genes: str | Sequence[str] | None,
    agg_func: Any,
    weights: Weights,
    min_coverage: float,
    coordinate_system: str | None,
    interval: float | None,
) -> Plan:
    image = sdata.images[image_key]
    data = full_resolution(image)
    if data.dims != ("c", "y", "x"):
        raise ValueError(f"image {image_key!r} has dimensions {data.dims}; a 2D image (c, y, x) is needed")
    if 0 in data.shape:
        what = "no channels" if data.sizes["c"] == 0 else "no pixels"
        raise ValueError(f"image {image_key!r} has {what}: its shape (c, y, x) is {data.shape}")
    if data.dtype.kind not in "biuf":
        raise TypeError(f"image {image_key!r} is {data.dtype}; numbers are needed")

    functions = [agg_func] if isinstance(agg_func, str) else agg_func
    if not isinstance(functions, Sequence) or not all(isinstance(function, str) for function in functions):
        raise TypeError(f"agg_func is {agg_func!r}; a name or a list of names is needed")
    statistics = []
    for function in functions:
        found = find_statistic(function)
        if found is None:
            raise ValueError(f"agg_func has {function!r}; valid: {VALID_NAMES}")
        statistics.append(found)
    if not functions or len(set(functions)) != len(functions):
        raise ValueError(f"agg_func is {agg_func!r}; one or several different ones of {VALID_NAMES} are needed")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; valid: {', '.join(map(repr, WEIGHTS))}")
    if isinstance(min_coverage, bool) or not isinstance(min_coverage, int | float | np.number):
        raise TypeError(f"min_coverage is {min_coverage!r}; a number from 0 to 1 is needed")
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage is {min_coverage}; a share from 0 to 1 is needed")

    check_bound(data, f"image {image_key!r}")
    available = channel_names(image)
    _check_unique(image_key, available)
    gene_map, selection = None, None
    if is_gene_map(image):
        gene_map = GeneMap.open(sdata, image_key)
        selection = _select(gene_map, genes)
        for statistic in statistics:
            selection.check_statistic(statistic)
        chosen, channels = selection.genes, selection.channels
    else:
        chosen, channels = _channels(image_key, available, genes)
    systems = {}
    for name in names:
        systems[name] = shared_coordinate_system(sdata, name, image_key, coordinate_system)
        for key in (name, image_key):
            to_coordinate_system(sdata, key, systems[name])
    mpp = find_mpp(sdata, image_key)
    if mpp is None:
        if selection is not None and any(s.extensive for s in [*statistics, *selection.needs]):
            raise ValueError(
                f"sums of the gene map {image_key!r} are per µm², but its pixel size is unknown: it was resampled, or its slide's "
                f"was unknown; state it with pixnet.pp.set_mpp(sdata, {image_key!r}, mpp)"
            )
        logger.warning(
            "the pixel size (µm/px) of %r is unknown, so obs['area'] is in pixels; state it with pixnet.pp.set_mpp",
            image_key,
        )
    if interval is not None:
        _check_interval(interval, gene_map, image_key, mpp)
    return Plan(
        image_key=image_key,
        data=data,
        gene_map=gene_map,
        selection=selection,
        names=chosen,
        channels=channels,
        statistics=statistics,
        weights=weights,
        min_coverage=float(min_coverage),
        systems=systems,
        mpp=mpp,
        model=gene_map.made.get("model") if gene_map is not None else None,
        interval=interval,
        novelty_key=None if gene_map is None else find_novelty(sdata, gene_map.made),
    )


def _check_interval(interval: float, gene_map: GeneMap | None, image_key: str, mpp: float | None) -> None:
    """Refuse intervals where nothing is known of the error."""
    check_level(interval)
    if gene_map is None:
        raise ValueError(f"interval= is for gene maps, and image {image_key!r} is not one; leave it out")
    if gene_map.quantity != "density":
        raise ValueError(
            f"interval= is for maps of densities, and {image_key!r} holds {gene_map.quantity!r}; leave it out"
        )
    if gene_map.evidence is None:
        raise ValueError(
            f"interval= needs what held-out shapes showed of each gene, and gene map {image_key!r} has none: its model was "
            "trained by an earlier version, or the record of the map was lost. Predict again with a model that "
            "pixnet.tl.train made"
        )
    if mpp is None:
        raise ValueError(
            f"interval= depends on the area of each shape, and the pixel size of {image_key!r} is unknown; state it with "
            f"pixnet.pp.set_mpp(sdata, {image_key!r}, mpp)"
        )


def _check_unique(image_key: str, channels: list[str]) -> None:
    """Refuse an image in which channels share a name."""
    duplicates = pd.Index(channels)
    if not duplicates.is_unique:
        repeated = listed(duplicates[duplicates.duplicated()].unique()[:5])
        raise ValueError(f"image {image_key!r} has several channels of one name: {repeated}; rename them")


def _select(gene_map: GeneMap, genes: Sequence[str] | str | None) -> Selection:
    """Return the genes asked for."""
    if not gene_map.genes:
        raise ValueError(f"gene map {gene_map.key!r} contains no genes, only {gene_map.total_name!r}")
    return gene_map.select(genes)


def _channels(image_key: str, available: list[str], genes: Sequence[str] | str | None) -> tuple[list[str], list[int]]:
    """Return names and indices of the channels asked for."""
    position = {name: index for index, name in enumerate(available)}
    chosen = list(position) if genes is None else check_genes(genes)
    unknown = [gene for gene in chosen if gene not in position]
    if unknown:
        offered = list(position)
        shown = listed(offered[:10]) + (f" and {len(offered) - 10} more" if len(offered) > 10 else "")
        raise KeyError(f"image {image_key!r} has no channel {listed(unknown[:5])} (genes=); it has {shown}")
    return chosen, [position[name] for name in chosen]


def _table_keys(names: list[str], key_added: str | Mapping[str, str] | None, plan: Plan) -> dict[str, str]:
    """Return the name of the table of each shapes element."""
    keys = {name: f"{name}_{'genes' if plan.gene_map else plan.image_key}" for name in names}
    if isinstance(key_added, Mapping):
        for name in key_added:
            if name not in keys:
                raise KeyError(f"key_added has {name!r}, which is not among the shapes: {listed(names)}")
        keys |= key_added
    elif isinstance(key_added, str):
        if len(names) > 1:
            raise ValueError(f"key_added is one name for {len(names)} tables; pass a dict by name of the shapes")
        keys[names[0]] = key_added
    elif key_added is not None:
        raise TypeError(f"key_added is {key_added!r}; a name or a dict of names is needed")
    if len(set(keys.values())) != len(keys):
        raise ValueError(f"key_added gives two tables one name: {keys}")
    return keys


def _take(sums: ZonalStatistics, rows: slice) -> ZonalStatistics:
    return ZonalStatistics(sums.area[rows], {name: values[rows] for name, values in sums.values.items()})
