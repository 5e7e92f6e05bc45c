"""Dense gene maps of a slide."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from spatialdata.models import Image2DModel

from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.region import RegionMask
from pixnet._core.slide.stain import sample, statistics
from pixnet._sdata.novelty import is_novelty
from pixnet._sdata.record import identity
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.map_writer import fingerprint
from pixnet._sdata.store.write_map import write_map
from pixnet._sdata.target import check_target
from pixnet._sdata.tissue import no_tissue, open_mask
from pixnet.tl._foreign import warn_if_foreign, warn_if_new
from pixnet.tl._map_arguments import check_map_arguments
from pixnet.tl._map_request import MapRequest, Store, resolve_request

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry
    from spatialdata import SpatialData
    from xarray import DataArray

    from pixnet._core.predict.map_grid import MapGrid
    from pixnet._core.predict.tile_runner import TileRunner
    from pixnet.models import PixNet


def predict(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    image_key: str | None = None,
    genes: str | Sequence[str] | None = None,
    store: Store | None = None,
    region: str | GeoDataFrame | BaseGeometry | Sequence[float] | None = None,
    mask_key: str | Literal[False] | None = None,
    out_mpp: float | None = None,
    tile_size: int | None = None,
    precision: str | None = None,
    key_added: str | None = None,
    scale_factors: Sequence[int] = (2, 2),
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    inplace: bool = True,
) -> DataArray | dict[str, DataArray | AnnData] | None:
    """Predict dense gene maps of a slide.

    The map is an image element that holds expected densities of transcripts, in linear space, and NaN on background:
    one channel per gene and a last channel ``__total__``, or the programs of the model, which add up to that total,
    with a table of their loadings. `pixnet.tl.aggregate` and `pixnet.pl` answer for genes from both. A second image,
    ``"{image_key}_novelty"`` (or ``"{key_added}_novelty"``), says how unlike the training tissue each place is.

    The slide is predicted tile by tile, so memory does not grow with it. The map streams to a zarr store: that of the
    object, or one under ``settings.scratch_dir`` that is deleted at exit. With a ``dask.distributed`` client in scope,
    the tiles run on its workers.

    Parameters
    ----------
    sdata
        Object that holds the H&E image. The pixel size must be known (`pixnet.pp.set_mpp`).
    model
        The model, or a checkpoint's path or name; ``None`` is the model that ships with the package.
    image_key
        The H&E image. ``None``: the recorded one, else the only one.
    genes
        Genes of the map, in this order: one name or several. ``None``: all genes of the model. ``"trusted"``: those
        whose held-out correlation is above 0 with its whole 95 % interval. ``__total__`` is always added.
    store
        ``"genes"``: a channel for each gene. ``"programs"``: the programs of the model, which give any of its genes at
        any scale, exactly. ``None``: genes where there are at most 1,000 of them or the model has no programs, else
        programs.
    region
        The part of the slide to predict: a shapes or labels element, a GeoDataFrame, a shapely polygon, or a bounding
        box ``(x0, y0, x1, y1)``; polygons and boxes in pixels of the image at full resolution. The map has the size of
        the whole slide: pixels that the region touches have the values that they have in the map of the whole slide,
        others are NaN, and so is background. ``None``: the whole slide.
    mask_key
        Labels element that marks tissue (nonzero), of any resolution. ``None``: ``"{image_key}_tissue"``, else computed
        and not kept. ``False``: everything is tissue. A map pixel is tissue when at least half of it is.
    out_mpp
        Pixel size of the map (µm/px). ``None``: that of the model's output, its pixel size times its stride. In a
        coarser map, a pixel is the mean over its tissue, weighted by area.
    tile_size
        Side of the tiles in model pixels, rounded up to whole windows of the model. It changes the memory that is
        needed and not the result. ``None``: about 256 map pixels.
    precision
        ``"float32"``, ``"bfloat16"`` or ``"float16"`` (GPU only). ``None``: ``settings.precision``, else bfloat16 if
        the device computes in it natively, else float32. The map is stored as float32 in any case.
    key_added
        Name of the map; ``None`` is ``"{image_key}_genes"``, of programs ``"{image_key}_programs"``. Their loadings are
        the table ``"{image_key}_loadings"``, or ``"{key_added}_loadings"``.
    scale_factors
        How much coarser each level of the map's pyramid is than the one before. A pixel is the mean of a block of
        pixels of that level; what is left of a last block is left out.
    device
        Torch device. ``None``: ``settings.device``, else a GPU if there is one.
    overwrite
        Replace an element of that name. The old one is kept until the new one is complete.
    resume
        Continue the map of an interrupted call with the same arguments.
    inplace
        Store the map, add it to ``sdata`` and return None. ``False`` returns it as a lazy, single-scale DataArray and
        writes nothing.

    Returns
    -------
    DataArray, dict or None
        ``(c, y, x)`` with gene names on ``c``, in the coordinate systems of the image. Of programs, a dict of two
        elements by their names: the map, and its loadings.

    Raises
    ------
    KeyError
        If an image, shapes or labels element or gene is unknown.
    OSError
        If the disk is full. What was written is deleted.
    PermissionError
        If the store cannot be written to.
    RuntimeError
        If a part of the image cannot be read (the message says which part), if one window of the model does not fit
        into the memory of the device, or if another process is writing the same map.
    TypeError
        If an argument or the image's pixels are of the wrong type.
    ValueError
        If the pixel size is unknown or more than 2 times coarser than that of the model, if there is no tissue, if
        ``region`` is empty or outside the slide, if ``key_added`` exists, if programs are asked of a model that has
        none, or an argument is out of range.

    Notes
    -----
    After an exception, Ctrl-C or a kill, the store is readable and finished tiles are kept: the same call with
    ``resume=True`` continues. Without it, the next call for the same map starts again.

    Equal calls give equal bytes on the same machine, with the same precision and the same number of torch threads, also
    if one of them was interrupted and resumed. Other processors, precisions or thread counts round differently.

    If the stain or the sharpness of the slide lies far outside that of the training slides, a warning names the
    difference: the mean optical density, its spread, the share of a colour, or the amount of detail, which a wrong
    pixel size changes. Without a mask (``mask_key=False``), glass counts as tissue, and the slide is compared only with
    training slides without a mask.

    Novelty is a percentile: 99 is farther from the training tissue than 99 % of held-out training tissue. The distance
    is that of the encoder's features, averaged over its coarsest pixel (8 to 32 µm), under a probabilistic principal
    component analysis of those of the training shapes. A warning gives the share of tissue above 99 if it is more than
    5 %; 1 % is expected. An earlier image of novelty of that name is replaced. Models that were trained by an earlier
    version, or with too few shapes, write none, and neither does ``inplace=False``.

    The log names the tissue that the model was trained on, where its ``provenance["tissue"]`` says it; set it before
    you save a model.

    napari-spatialdata shows the map as it is, with a slider for the gene. spatialdata-plot refuses NaN, so give it a
    copy with 0 on background: ``SpatialData(images={"map": sdata["he_genes"].map_over_datasets(lambda level:
    level.fillna(0))})``, then ``.pl.render_images("map", channel="ERBB2").pl.show("global")``.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> model = px.models.PixNet(["GENE1", "GENE2"], mpp=0.5, pretrained=False)
    >>> px.tl.predict(sdata, model, mask_key=False)
    >>> sdata["he_genes"]["scale0"]["image"].sizes["c"]
    3
    """
    slide = Slide.open(sdata, image_key, mask_key)
    check_map_arguments(scale_factors, tile_size, out_mpp, resume, inplace)
    request = resolve_request(slide, model, genes, store, region, out_mpp, tile_size, scale_factors, precision, device)
    key = f"{slide.key}_{request.store}" if key_added is None else key_added
    prefix = slide.key if key_added is None else key
    loadings, novelty = request.loadings(key, prefix), request.novelty(prefix)
    if inplace:
        check_target(sdata, key, "images", overwrite=overwrite, source=slide.key)
        if novelty is not None:
            replaced = novelty.key in sdata.images and is_novelty(sdata.images[novelty.key])
            check_target(sdata, novelty.key, "images", overwrite=overwrite or replaced, source=slide.key)
        for name in loadings:
            check_target(sdata, name, "tables", overwrite=overwrite)
    mask = open_mask(slide, request.grid.model_grid.out_px, request.grid.model_grid.out_margin)
    wanted = _wanted(request, mask)
    runner = _make_runner(request, wanted)
    samples = sample(runner.reader, mask)  # also of a region: the stain is that of the slide
    warn_if_foreign(slide, request.model, request.model_name, statistics(samples, mask.masked))
    if not inplace:
        lazy = _lazy_element(request, runner)
        return {key: lazy, **loadings} if loadings else lazy
    asked = request.asked(runner.model.hash)
    job = {**asked, "mask": mask.fingerprint(), "image": fingerprint([pixels for pixels, _ in samples])}
    entry = {
        "kind": "gene_map",
        "store": request.store,
        "model": request.model_name,
        "unit": request.model.unit,
        "identity": identity(request.names, request.grid.shape),
        **asked,
    }
    if request.evidence is not None and not loadings:
        entry["evidence"] = request.evidence.as_entry()
    entries = {key: entry}
    if novelty is not None:
        job["novelty"] = entry["novelty"] = novelty.key
        entries[novelty.key] = novelty.entry(entry)
    spec = request.spec(novelty)
    write_map(sdata, key, runner, spec, job, entries, tables=loadings, resume=resume, overwrite=overwrite)
    if novelty is not None:
        warn_if_new(sdata, slide, novelty.key)
    return None


def _wanted(request: MapRequest, mask: TissueMask) -> TissueMask:
    """Return the tissue that is asked for; refuse a slide, or a region, of which no map pixel is tissue."""
    slide, grid = request.slide, request.grid
    if not mask.any():
        raise ValueError(
            f"{no_tissue(slide)}. Name another mask with mask_key=, or pass mask_key=False to predict everywhere"
        )
    if not mask.near(0, 0, *grid.model_grid.out_shape):
        raise ValueError(
            f"no tissue on image {slide.key!r}: the tissue of its mask lies outside of it; check the transformation of the "
            "mask"
        )
    if _any_pixel(grid, mask):
        if request.region is None:
            return mask
        to_map = np.diag([1 / grid.ratio, 1 / grid.ratio, 1.0]) @ grid.model_grid.to_out
        wanted = RegionMask(mask, request.region.transform(to_map), grid.ratio)
        if _any_pixel(grid, wanted):
            return wanted
        raise ValueError(
            f"no tissue of image {slide.key!r} lies in region=; check where it is, or pass mask_key=False to predict all of it"
        )
    raise ValueError(
        f"no map pixel of image {slide.key!r} would have a value: at least half of a pixel must be tissue, and none of "
        f"{grid.mpp:.3g} µm is. Check the mask, or ask for smaller map pixels (out_mpp=)"
    )


def _any_pixel(grid: MapGrid, mask: TissueMask) -> bool:
    """Whether a map has any pixel in a mask that is asked per model output pixel."""
    of_map = mask.coarser(grid.ratio)
    boxes = (grid.box(i, j) for i, j in np.ndindex(*grid.tiles))
    return any(of_map.near(*box.bounds) and of_map.window(*box.bounds).any() for box in boxes)


def _make_runner(request: MapRequest, mask: TissueMask) -> TileRunner:
    """Return the runner that predicts the tiles."""
    from pixnet._core.predict.portable_model import PortableModel
    from pixnet._core.predict.tile_runner import TileRunner

    return TileRunner(
        request.slide.reader(request.grid.model_grid),
        mask,
        PortableModel(request.model),
        request.grid,
        channels=request.channels,
        n_channels=len(request.names),
        device=str(request.device),
        precision=request.precision,
        batch=4 if request.device.type == "cuda" else 1,
    )


def _lazy_element(request: MapRequest, runner: TileRunner) -> DataArray:
    """Return the map as a lazy image element."""
    from pixnet._core.predict.tile_runner import lazy_map

    return Image2DModel.parse(
        lazy_map(runner, uuid.uuid4().hex),
        dims=("c", "y", "x"),
        c_coords=request.names,
        transformations=request.transformations,
    )
