"""Dense gene maps of a slide."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale
from spatialdata.transformations import Sequence as Chain

from pixnet._core.predict.map_grid import MapGrid, choose_map_grid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.stain import differences, sample, statistics
from pixnet._logging import logger
from pixnet._names import check_genes
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import check_key_free, check_replaces
from pixnet._sdata.loadings import loadings_table
from pixnet._sdata.record import identity
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.element_store import local_store
from pixnet._sdata.store.map_writer import MapSpec, fingerprint
from pixnet._sdata.store.write_map import write_map
from pixnet._sdata.tissue import no_tissue, open_mask
from pixnet._settings import settings
from pixnet.tl._map_arguments import check_map_arguments

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray

    from pixnet._core.predict.tile_runner import TileRunner
    from pixnet.models import PixNet


Store = Literal["genes", "programs"]

MOST_CHANNELS = 1000
"""Genes up to which a map has a channel for each, unless told otherwise."""


def predict(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    image_key: str | None = None,
    genes: str | Sequence[str] | None = None,
    store: Store | None = None,
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

    The map is an image element that holds expected densities of transcripts, in linear space, and NaN on background: one
    channel per gene and a last channel ``__total__``, or the programs of the model, which add up to that total, with a table
    of their loadings. `pixnet.tl.aggregate` and `pixnet.pl` answer for genes from both. The slide is predicted tile by tile, so memory does not grow
    with it. The map streams to a zarr store: that of the object, or one under ``settings.scratch_dir`` that is deleted
    at exit. With a ``dask.distributed`` client in scope, the tiles run on its workers.

    Parameters
    ----------
    sdata
        Object that holds the H&E image. The pixel size must be known (`pixnet.pp.set_mpp`).
    model
        The model, or a checkpoint's path or name; ``None`` is the model that ships with the package.
    image_key
        The H&E image. ``None``: the recorded one, else the only one.
    genes
        Genes of the map, in this order: one name or several. ``None``: all genes of the model. ``__total__`` is always
        added.
    store
        ``"genes"``: a channel for each gene. ``"programs"``: the programs of the model, which give any of its genes at any
        scale, exactly. ``None``: genes where there are at most 1,000 of them or the model has no programs, else programs.
    mask_key
        Labels element that marks tissue (nonzero), of any resolution. ``None``: ``"{image_key}_tissue"``, else computed
        and not kept. ``False``: everything is tissue. A map pixel is tissue when at least half of it is.
    out_mpp
        Pixel size of the map (µm/px). ``None``: that of the model's output, its pixel size times its stride. In a
        coarser map, a pixel is the mean over its tissue, weighted by area.
    tile_size
        Side of the tiles in model pixels, rounded up to whole windows of the model. It changes the memory that is needed
        and not the result. ``None``: about 256 map pixels.
    precision
        ``"float32"``, ``"bfloat16"`` or ``"float16"`` (GPU only). ``None``: ``settings.precision``, else bfloat16 if the
        device computes in it natively, else float32. The map is stored as float32 in any case.
    key_added
        Name of the map; ``None`` is ``"{image_key}_genes"``, of programs ``"{image_key}_programs"``. Their loadings are the
        table ``"{image_key}_loadings"``, or ``"{key_added}_loadings"``.
    scale_factors
        How much coarser each level of the map's pyramid is than the one before. A pixel is the mean of a block of pixels
        of that level; what is left of a last block is left out.
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
        ``(c, y, x)`` with gene names on ``c``, in the coordinate systems of the image. Of programs, a dict of two elements by
        their names: the map, and its loadings.

    Raises
    ------
    KeyError
        If an image, labels element or gene is unknown.
    OSError
        If the disk is full. What was written is deleted.
    PermissionError
        If the store cannot be written to.
    RuntimeError
        If a part of the image cannot be read (the message says which part), if one window of the model does not fit into
        the memory of the device, or if another process is writing the same map.
    TypeError
        If an argument or the image's pixels are of the wrong type.
    ValueError
        If the pixel size is unknown or more than 2 times coarser than that of the model, if there is no tissue, if
        ``key_added`` exists, if programs are asked of a model that has none, or an argument is out of range.

    Notes
    -----
    After an exception, Ctrl-C or a kill, the store is readable and finished tiles are kept: the same call with
    ``resume=True`` continues. Without it, the next call for the same map starts again.

    Equal calls give equal bytes on the same machine, with the same precision and the same number of torch threads, also
    if one of them was interrupted and resumed. Other processors, precisions or thread counts round differently.

    If the stain or the sharpness of the slide lies far outside that of the training slides, a warning names the
    difference: the mean optical density, its spread, the share of a colour, or the amount of detail, which a wrong pixel
    size changes. Without a mask (``mask_key=False``), glass counts as tissue, and the slide is compared only with
    training slides without a mask.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> model = px.models.PixNet(["GENE1", "GENE2"], mpp=0.5, pretrained=False)
    >>> px.tl.predict(sdata, model, mask_key=False)
    >>> sdata["he_genes"]["scale0"]["image"].sizes["c"]
    3
    """
    check_sdata(sdata, "tl.predict")
    slide = Slide.open(sdata, image_key, mask_key)
    check_map_arguments(scale_factors, tile_size, out_mpp, resume, inplace)
    request = _resolve(slide, model, genes, store, out_mpp, tile_size, scale_factors, precision, device)
    key = f"{slide.key}_{request.store}" if key_added is None else key_added
    loadings = request.loadings(key, slide.key if key_added is None else key)
    if inplace:
        _check_target(slide, key, "images", overwrite)
        for name in loadings:
            _check_target(slide, name, "tables", overwrite)
    mask = _open_tissue(request)
    runner = _make_runner(request, mask)
    samples = sample(runner.reader, mask)
    _warn_if_foreign(request, statistics(samples, mask.masked))
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
    write_map(sdata, key, runner, request.spec, job, entry, tables=loadings, resume=resume, overwrite=overwrite)
    return None


@dataclass(frozen=True)
class _Request:
    """A prediction with all names resolved and all arguments checked."""

    slide: Slide
    model: PixNet
    model_name: str | None
    genes: list[str]
    channels: list[int] | None
    names: list[str]
    store: Store
    grid: MapGrid
    scale_factors: list[int]
    device: torch.device
    precision: str
    threads: int | None

    def loadings(self, key: str, prefix: str) -> dict[str, AnnData]:
        """Return the table of loadings by its name; empty for a map of genes."""
        found = self.model.loadings if self.store == "programs" else None
        if found is None:
            return {}
        return {f"{prefix}_loadings": loadings_table(found, key, self.model_name, self.evidence)}

    @property
    def evidence(self) -> GeneEvidence | None:
        """What held-out shapes showed of the genes."""
        found = self.model.evidence
        return None if found is None else GeneEvidence.of(found, self.model.genes).take(self.genes)

    @property
    def transformations(self) -> dict[str, Any]:
        """Transformations of the map to each coordinate system of the image."""
        y, x = self.grid.slide_px
        to_image = Scale([x, y], axes=("x", "y"))
        return {name: Chain([to_image, system]) for name, system in self.slide.transformations.items()}

    @property
    def spec(self) -> MapSpec:
        """The stored element."""
        return MapSpec(self.names, self.grid.shape, self.grid.chunk, self.scale_factors, self.transformations)

    def asked(self, model_hash: str) -> dict[str, Any]:
        """Return everything that determines the map, apart from pixels (JSON-plain)."""
        return {
            "image_key": self.slide.key,
            "image_mpp": self.slide.mpp,
            "mask_key": self.slide.mask_key,
            "genes": self.genes if self.store == "genes" else [],
            "store": self.store,
            "model_hash": model_hash,
            "model_mpp": self.model.mpp,
            "mpp": self.grid.mpp,
            "shape": list(self.grid.shape),
            "tile_size": self.grid.tile_size,
            "scale_factors": self.scale_factors,
            "precision": self.precision,
            "device": self.device.type,
            "torch_threads": self.threads,
        }


def _resolve(
    slide: Slide,
    model: PixNet | str | Path | None,
    genes: str | Sequence[str] | None,
    store: Store | None,
    out_mpp: float | None,
    tile_size: int | None,
    scale_factors: Sequence[int],
    precision: str | None,
    device: str | None,
) -> _Request:
    """Resolve and check the model, the genes, the grid and where to run."""
    import torch

    from pixnet._core.predict.device import resolve_device, resolve_precision
    from pixnet.models._load import resolve_model

    on = resolve_device(settings.device if device is None else device)
    precision = resolve_precision(settings.precision if precision is None else precision, on)
    resolved, model_name = resolve_model(model)
    store = _resolve_store(resolved, genes, store)
    chosen, channels, names = _resolve_genes(resolved, genes, store)
    grid = slide.grid(resolved.mpp, resolved.stride)
    wide, reach = on.type == "cuda", resolved.reach
    tiles = choose_map_grid(grid, resolved.window, resolved.halo, out_mpp, tile_size, wide, reach)
    if grid.enlarged:
        logger.warning(
            "image %r has %.3g µm/px, coarser than the %.3g µm/px of the model: it is enlarged, and detail that the model "
            "was trained on is missing; expect worse maps",
            slide.key,
            slide.mpp,
            resolved.mpp,
        )
    factors = [int(factor) for factor in scale_factors]
    threads = torch.get_num_threads() if on.type == "cpu" else None
    return _Request(slide, resolved, model_name, chosen, channels, names, store, tiles, factors, on, precision, threads)


def _open_tissue(request: _Request) -> TissueMask:
    """Read or compute the tissue mask; refuse a slide of which no map pixel is tissue."""
    slide, grid = request.slide, request.grid
    mask = open_mask(slide, grid.model_grid.out_px)
    if not mask.any():
        raise ValueError(
            f"{no_tissue(slide)}. Name another mask with mask_key=, or pass mask_key=False to predict everywhere"
        )
    if not mask.near(0, 0, *grid.model_grid.out_shape):
        raise ValueError(
            f"no tissue on image {slide.key!r}: the tissue of its mask lies outside of it; check the transformation of the "
            "mask"
        )
    map_mask = mask.coarser(grid.ratio)
    boxes = (grid.box(i, j) for i, j in np.ndindex(*grid.tiles))
    if not any(map_mask.near(*box.bounds) and map_mask.window(*box.bounds).any() for box in boxes):
        raise ValueError(
            f"no map pixel of image {slide.key!r} would have a value: of none, {grid.mpp:.3g} µm wide, at least half is "
            "tissue on the slide. Check the mask, or ask for smaller map pixels (out_mpp=)"
        )
    return mask


def _make_runner(request: _Request, mask: TissueMask) -> TileRunner:
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


def _warn_if_foreign(request: _Request, found: dict[str, Any] | None) -> None:
    """Warn if the slide looks unlike those that the model was trained on."""
    differs = differences(found, request.model.stain)
    if differs:
        logger.warning(
            "the stain of image %r lies far outside that of the slides the model was trained on: %s. Do not trust the map "
            "without checking it against measured genes; pixnet.pp.normalize_stain may help",
            request.slide.key,
            "; ".join(differs),
        )


def _lazy_element(request: _Request, runner: TileRunner) -> DataArray:
    """Return the map as a lazy image element."""
    from pixnet._core.predict.tile_runner import lazy_map

    return Image2DModel.parse(
        lazy_map(runner, uuid.uuid4().hex),
        dims=("c", "y", "x"),
        c_coords=request.names,
        transformations=request.transformations,
    )


def _check_target(slide: Slide, key: str, kind: str, overwrite: bool) -> None:
    """Check that the map, or its loadings, can be stored under a name."""
    check_key_free(slide.sdata, key, overwrite)
    check_replaces(slide.sdata, key, kind)
    if key == slide.key:
        raise ValueError(f"key_added is {key!r}, the image that is predicted from; choose another name")
    local_store(slide.sdata)


def _resolve_store(model: PixNet, genes: str | Sequence[str] | None, store: Store | None) -> Store:
    """Return what the map stores."""
    if store not in (None, "genes", "programs"):
        raise ValueError(f"store is {store!r}; valid: 'genes', 'programs', None")
    has_programs = model.config.n_programs is not None
    if store == "programs":
        if not has_programs:
            raise ValueError(
                "store is 'programs', and this model has a channel for each gene; leave store= out, or train one with "
                "n_programs="
            )
        if genes is not None:
            raise ValueError(
                "a map of programs answers for all genes of the model; leave out genes=, or pass store='genes'"
            )
    if store is not None:
        return store
    return "programs" if has_programs and genes is None and len(model.genes) > MOST_CHANNELS else "genes"


def _resolve_genes(
    model: PixNet, genes: str | Sequence[str] | None, store: Store
) -> tuple[list[str], list[int] | None, list[str]]:
    """Return the genes of the map, what the model is asked for (None: all its channels), and the channels' names."""
    if store == "programs":
        return model.genes, None, model.channels
    chosen = model.genes if genes is None else check_genes(genes, among=model.genes, where="the model")
    names = model.head.gene_channels(chosen)
    if names == model.channels:
        return chosen, None, names
    position = {gene: k for k, gene in enumerate(model.genes)}
    return chosen, [*(position[gene] for gene in chosen), len(model.genes)], names
