"""Dense gene maps of a slide."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale
from spatialdata.transformations import Sequence as Chain

from pixnet._logging import logger
from pixnet._names import TOTALS, check_genes, listed
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import check_key_free, check_replaces
from pixnet._sdata.record import identity
from pixnet._sdata.store.element_store import local_store
from pixnet._sdata.store.map_writer import MapSpec, MapWriter, fingerprint
from pixnet._sdata.store.write_map import store_map
from pixnet._settings import settings

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

    from pixnet.models import PixNet

DTYPES = ("float32", "float16")


def predict(
    sdata: SpatialData,
    model: PixNet | str | Path | None = None,
    *,
    image_key: str | None = None,
    genes: Sequence[str] | None = None,
    mask_key: str | bool | None = None,
    out_mpp: float | None = None,
    tile_size: int | None = None,
    precision: str | None = None,
    key_added: str | None = None,
    dtype: str = "float32",
    scale_factors: Sequence[int] = (2, 2),
    device: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    inplace: bool = True,
) -> DataArray | None:
    """Predict dense gene maps of a slide.

    The map is an image element with one channel per gene and a last channel ``__total__``: expected densities of
    transcripts, in linear space, NaN on background. The slide is predicted tile by tile, so memory does not grow with
    it, and the map streams to a zarr store: the object's own, or one under ``settings.scratch_dir`` that goes at exit.
    With a ``dask.distributed`` client in scope the tiles run on its workers.

    Parameters
    ----------
    sdata
        Object that holds the H&E image; its um/px must be known (`pixnet.pp.set_mpp`).
    model
        The model, or a checkpoint's path or name; ``None`` is the model that ships with the package.
    image_key
        The H&E image. ``None``: the recorded one, else the only one.
    genes
        Genes of the map, in this order; ``None``: all of the model's. ``__total__`` comes in any case.
    mask_key
        Labels element that marks tissue (nonzero), of any resolution. ``None``: ``"{image_key}_tissue"``, else computed
        and not kept. ``False``: everything is tissue. A map pixel is tissue when at least half of it is.
    out_mpp
        um per map pixel, the model's own (its um/px times its stride) or coarser: then the mean over the tissue in each
        pixel, by area.
    tile_size
        Model pixels a side of the tiles, rounded up to the model's windows. It sets the memory, not the result.
        ``None``: about 256 map pixels.
    precision
        ``"float32"``, ``"bfloat16"`` or ``"float16"`` (GPU only); ``None`` is ``settings.precision``, else bfloat16 where
        the device computes in it natively, else float32.
    key_added
        Name of the map; ``None`` is ``"{image_key}_genes"``.
    dtype
        Of the stored map: ``"float32"``, or ``"float16"``, which halves it but overflows where ``__total__`` exceeds
        65,504 and is refused by some of SpatialData's operations.
    scale_factors
        How much coarser each level of the map's pyramid is than the one before.
    device
        Torch device; ``None`` is ``settings.device``, else a GPU where there is one.
    overwrite
        Replace an element of that name. The old one stays whole until the new one is.
    resume
        Go on with the map of an interrupted call with the same arguments.
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
        If the disk is full; what was written is deleted.
    PermissionError
        If the store cannot be written to.
    RuntimeError
        If a part of the image cannot be read: the message says which. If the device's memory does not hold one window of
        the model, or another process is writing the same map.
    TypeError
        If an argument or the image's pixels are of the wrong type.
    ValueError
        If um/px is unknown or more than 2 times coarser than the model's, if there is no tissue, if ``key_added``
        exists, or an argument is out of range.

    Notes
    -----
    Interrupted by an exception, Ctrl-C or a kill, the store stays readable and what is done is kept:
    ``resume=True`` goes on and ends with the same bytes. The next call for the same map without it starts again.

    A slide whose stain or sharpness lies far outside that of the training slides gets a warning that names what differs: a
    mean optical density, its spread, the share of a colour, or detail, as a wrong um/px makes it. Without a mask
    (``mask_key=False``) glass counts as tissue, and such slides are compared with training slides of their kind only.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> model = px.models.PixNet(["GENE1", "GENE2"], mpp=0.5, pretrained=False)
    >>> px.tl.predict(sdata, model, mask_key=False)
    >>> sdata["he_genes"]["scale0"]["image"].sizes["c"]
    3
    """
    from pixnet._core.predict.device import resolve_device, resolve_precision
    from pixnet._core.predict.map_grid import choose_map_grid
    from pixnet._core.predict.portable_model import PortableModel
    from pixnet._core.predict.tile_runner import TileRunner
    from pixnet._core.slide.mask import TissueMask
    from pixnet._core.slide.stain import differences, sample, statistics
    from pixnet._sdata.slide import Slide
    from pixnet._sdata.tissue import open_mask
    from pixnet.models._checkpoint import resolve_model

    # what is meant, and whether it can be done
    check_sdata(sdata, "tl.predict")
    slide = Slide.open(sdata, image_key, mask_key)
    image_key, mpp = slide.key, slide.mpp
    key = f"{image_key}_genes" if key_added is None else key_added
    if inplace:
        check_key_free(sdata, key, overwrite)
        check_replaces(sdata, key, "images")
        if key == image_key:
            raise ValueError(f"key_added is {key!r}, the image that is predicted from; choose another name")
        local_store(sdata)
    _check_arguments(dtype, scale_factors, tile_size, out_mpp, resume, inplace)
    device = resolve_device(settings.device if device is None else device)
    precision = resolve_precision(settings.precision if precision is None else precision, device)
    model, model_name = resolve_model(model)
    genes, channels = _resolve_genes(model, genes)
    grid = slide.grid(model.mpp, model.stride)
    gpu = device.type == "cuda"
    layout = choose_map_grid(grid, model.window, model.halo, out_mpp, tile_size, wide=gpu)
    if grid.enlarged:
        logger.warning(
            "image %r has %.3g um/px, coarser than the %.3g um/px of the model: it is enlarged, and detail that the model "
            "was trained on is missing; expect worse maps",
            image_key,
            mpp,
            model.mpp,
        )

    # the tissue, and the runner
    mask = open_mask(slide, grid.out_px)
    if not getattr(mask, "mask", np.True_).any():
        raise ValueError(
            f"the mask of image {image_key!r} has no tissue; check it, name another with mask_key=, or pass mask_key=False to "
            "predict everywhere"
        )
    packed = PortableModel(model)
    runner = TileRunner(
        slide.reader(grid),
        mask,
        packed,
        layout,
        channels=channels,
        n_channels=len(genes) + 1,
        dtype=dtype,
        device=str(device),
        precision=precision,
        batch=4 if gpu else 1,
    )
    if not runner.tiles():
        raise ValueError(
            f"no tissue on image {image_key!r}: its mask lies outside of it; check the transformation of the mask"
        )
    samples = sample(runner.reader, mask)
    differs = differences(statistics(samples, isinstance(mask, TissueMask)), model.config.get("stain"))
    if differs:
        logger.warning(
            "the stain of image %r lies far outside that of the slides the model was trained on: %s. Do not trust the map "
            "without checking it against measured genes; pixnet.pp.normalize_stain may help",
            image_key,
            "; ".join(differs),
        )
    to_image = Scale([layout.px[1], layout.px[0]], axes=("x", "y"))
    transformations = {name: Chain([to_image, system]) for name, system in slide.transformations.items()}
    names = [*genes, TOTALS[model.quantity]]
    if not inplace:
        from pixnet._core.predict.tile_runner import lazy_map

        array = lazy_map(runner, uuid.uuid4().hex)
        return Image2DModel.parse(array, dims=("c", "y", "x"), c_coords=names, transformations=transformations)

    # the map, and what is known of it
    entry = {
        "kind": "gene_map",
        "image_key": image_key,
        "model": model_name,
        "genes": list(genes),
        "unit": model.config.get("unit"),
        "identity": identity(names, layout.shape),
        "params": {
            "model_hash": packed.hash,
            "model_mpp": model.mpp,
            "image_mpp": mpp,
            "mask_key": mask_key,
            "out_mpp": None if out_mpp is None else float(out_mpp),
            "precision": precision,
            "device": device.type,
            "dtype": dtype,
            "scale_factors": [int(f) for f in scale_factors],
            "tile_size": layout.window * max(1, round(layout.tile * layout.ratio / layout.core)),
        },
    }
    spec = MapSpec(names, layout.shape, dtype, layout.chunk, tuple(int(f) for f in scale_factors), transformations)
    job = {
        "image_key": image_key,
        "genes": list(genes),
        "mpp": layout.mpp,
        **entry["params"],
        "mask": fingerprint([np.packbits(mask.mask), mask.to_mask] if hasattr(mask, "mask") else []),
        "image": fingerprint([pixels for pixels, _ in samples]),
        "shape": list(layout.shape),
    }
    stream = MapWriter.open(sdata, key, spec, job, resume)
    store_map(runner, stream, sdata, key, entry)
    return None


def _resolve_genes(model: PixNet, genes: Sequence[str] | None) -> tuple[list[str], list[int] | None]:
    """Return the genes of the map, and the model's channels that it takes (None: all)."""
    if genes is None:
        return list(model.genes), None
    genes = check_genes(genes)
    position = {gene: k for k, gene in enumerate(model.genes)}
    unknown = [gene for gene in genes if gene not in position]
    if unknown:
        shown = listed(model.genes[:10]) + (f", ... ({len(model.genes)} in all)" if len(model.genes) > 10 else "")
        raise KeyError(
            f"the model does not predict {listed(unknown[:5])}{' ...' if len(unknown) > 5 else ''}; its genes (model.genes): "
            f"{shown}"
        )
    if genes == list(model.genes):
        return genes, None
    return genes, [*(position[gene] for gene in genes), len(model.genes)]


def _check_arguments(dtype: Any, scale_factors: Any, tile_size: Any, out_mpp: Any, resume: bool, inplace: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; valid: {', '.join(map(repr, DTYPES))}")
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
        raise TypeError(f"out_mpp is {out_mpp!r}; um per map pixel (a number) or None is needed")
    if out_mpp is not None and not (np.isfinite(out_mpp) and out_mpp > 0):
        raise ValueError(f"out_mpp is {out_mpp!r}; it must be positive")
    if resume and not inplace:
        raise ValueError("resume=True goes on with a stored map, and inplace=False stores none: pass one of them")
