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
from pixnet._names import TOTALS, check_genes
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import check_key_free, check_replaces
from pixnet._sdata.record import identity
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.element_store import local_store
from pixnet._sdata.store.map_writer import MapSpec, fingerprint
from pixnet._sdata.store.write_map import write_map
from pixnet._sdata.tissue import no_tissue, open_mask
from pixnet._settings import settings

if TYPE_CHECKING:
    import torch
    from spatialdata import SpatialData
    from xarray import DataArray

    from pixnet._core.predict.tile_runner import TileRunner
    from pixnet.models import PixNet


def predict(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    image_key: str | None = None,
    genes: str | Sequence[str] | None = None,
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
) -> DataArray | None:
    """Predict dense gene maps of a slide.

    The map is an image element with one channel per gene and a last channel ``__total__``. It holds expected densities
    of transcripts, in linear space, and NaN on background. The slide is predicted tile by tile, so memory does not grow
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
        Name of the map; ``None`` is ``"{image_key}_genes"``.
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
    DataArray or None
        ``(c, y, x)`` with gene names on ``c``, in the coordinate systems of the image.

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
        ``key_added`` exists, or an argument is out of range.

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
    key = f"{slide.key}_genes" if key_added is None else key_added
    if inplace:
        _check_target(slide, key, overwrite)
    _check_arguments(scale_factors, tile_size, out_mpp, resume, inplace)
    request = _resolve(slide, model, genes, out_mpp, tile_size, scale_factors, precision, device)
    mask = _open_tissue(request)
    runner = _make_runner(request, mask)
    samples = sample(runner.reader, mask)
    _warn_if_foreign(request, statistics(samples, mask.masked))
    if not inplace:
        return _lazy_element(request, runner)
    asked = request.asked(runner.model.hash)
    job = {**asked, "mask": mask.fingerprint(), "image": fingerprint([pixels for pixels, _ in samples])}
    entry = {
        "kind": "gene_map",
        "model": request.model_name,
        "unit": request.model.unit,
        "identity": identity(request.names, request.grid.shape),
        **asked,
    }
    write_map(sdata, key, runner, request.spec, job, entry, resume=resume, overwrite=overwrite)
    return None


@dataclass(frozen=True)
class _Request:
    """A prediction with all names resolved and all arguments checked."""

    slide: Slide
    model: PixNet
    model_name: str | None
    genes: list[str]
    channels: list[int] | None
    grid: MapGrid
    scale_factors: list[int]
    device: torch.device
    precision: str
    threads: int | None

    @property
    def names(self) -> list[str]:
        """Names of the map's channels."""
        return [*self.genes, TOTALS[self.model.quantity]]

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
            "genes": self.genes,
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
    chosen, channels = _resolve_genes(resolved, genes)
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
    return _Request(slide, resolved, model_name, chosen, channels, tiles, factors, on, precision, threads)


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


def _check_target(slide: Slide, key: str, overwrite: bool) -> None:
    """Check that the map can be stored under a name."""
    check_key_free(slide.sdata, key, overwrite)
    check_replaces(slide.sdata, key, "images")
    if key == slide.key:
        raise ValueError(f"key_added is {key!r}, the image that is predicted from; choose another name")
    local_store(slide.sdata)


def _resolve_genes(model: PixNet, genes: str | Sequence[str] | None) -> tuple[list[str], list[int] | None]:
    """Return the genes of the map, and the model's channels that it takes (None: all)."""
    if genes is None:
        return list(model.genes), None
    chosen = check_genes(genes, among=model.genes, where="the model")
    if chosen == model.genes:
        return chosen, None
    position = {gene: k for k, gene in enumerate(model.genes)}
    return chosen, [*(position[gene] for gene in chosen), len(model.genes)]


def _check_arguments(scale_factors: Any, tile_size: Any, out_mpp: Any, resume: bool, inplace: bool) -> None:
    """Check the arguments that can be checked one by one."""
    try:
        factors = list(scale_factors)
    except TypeError:
        raise TypeError(f"scale_factors is {scale_factors!r}; a sequence such as (2, 2) is needed") from None
    if any(isinstance(f, bool) or not isinstance(f, int | np.integer) or f < 2 for f in factors):
        raise ValueError(
            f"scale_factors is {scale_factors!r}; whole numbers of at least 2 are needed, or () for one level"
        )
    if tile_size is not None and (isinstance(tile_size, bool) or not isinstance(tile_size, int | np.integer)):
        raise TypeError(f"tile_size is {tile_size!r}; a number of pixels (int) or None is needed")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size is {tile_size!r}; it must be positive")
    if out_mpp is not None and (isinstance(out_mpp, bool) or not isinstance(out_mpp, int | float | np.number)):
        raise TypeError(f"out_mpp is {out_mpp!r}; a pixel size in µm/px (a number) or None is needed")
    if out_mpp is not None and not (np.isfinite(out_mpp) and out_mpp > 0):
        raise ValueError(f"out_mpp is {out_mpp!r}; it must be positive")
    if resume and not inplace:
        raise ValueError("resume=True continues a stored map, and inplace=False does not store one: pass one of them")
