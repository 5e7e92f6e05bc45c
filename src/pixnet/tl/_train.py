"""Train a PixNet on slides with measured shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from spatialdata import SpatialData

from pixnet._logging import logger
from pixnet._names import check_genes, listed
from pixnet._sdata.counts import check_totals_alike
from pixnet._sdata.inputs import SpatialDatas, named_objects
from pixnet._sdata.sections import Source, open_section, resolve_sources, split_block
from pixnet._settings import settings

if TYPE_CHECKING:
    from torch import nn

    from pixnet._core.train.crops import Section
    from pixnet._core.train.options import TrainingOptions
    from pixnet.models import PixNet

FINEST_MPP = 0.5
"""um per pixel that a model works at unless a training slide is coarser."""


def train(
    sdata: SpatialDatas,
    *,
    image_key: str | None = None,
    shapes: str | Sequence[str] | None = None,
    table_key: str | Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    mask_key: str | bool | None = None,
    validation: str | Sequence[str] | SpatialDatas | None = None,
    model: PixNet | None = None,
    encoder: str | nn.Module = "efficientnet_lite0",
    mpp: float | None = None,
    max_epochs: int | None = None,
    seed: int | None = 0,
    device: str | None = None,
    **recipe: Any,
) -> PixNet:
    """Train a model that predicts dense gene maps from H&E, on counts measured in shapes of any size.

    The map is summed over each shape, with exact pixel areas, and compared with the shape's counts: mean squared error
    plus ``0.5 (1 - PCC)`` on log1p of CP10k, and the log of the depth per area relative to the section's mean. So spots,
    bins and cells can train together, and the map answers at any scale. The encoder is frozen; features of the shapes'
    surroundings are computed once, in several turned and restained versions, and the decoder learns on them.

    Parameters
    ----------
    sdata
        One object, a list (their names are "0", "1", ...) or a dict of named ones.
    image_key
        The H&E image (uint8 RGB), with um/px on record.
    shapes, table_key
        The measured shapes and their tables of raw counts; ``shapes[i]`` pairs with ``table_key[i]``, in every object
        that has both. None: the recorded or only shapes, and the table that annotates them.
    genes
        Genes to predict. None: those of `pixnet.pp.select_genes` over the training tables.
    layer
        Layer of the tables that holds raw counts. None: X.
    total_key
        Column of obs with all UMI of each observation. None: the sum over all columns of the table.
    mask_key
        Labels element that marks tissue. None: ``"{image_key}_tissue"``, else computed; False: everything is tissue.
    validation
        Names of objects in ``sdata`` to hold out, or further objects. None: the last of several objects; of a single one
        a block in space, a fifth of its shapes at one end. It chooses the number of passes; the model is then trained
        again on everything, validation included, for as many (``refit=False`` leaves that out).
    model
        A model to start from; it is not changed. Excludes ``encoder``, ``mpp`` and the model's settings under ``recipe``. One
        that was never trained, such as `pixnet.models.PixNet.paper` gives, starts from the mean composition of the training
        shapes; a trained one from what it knows. It may carry settings of training (``config["recipe"]``), which hold unless given here.
    encoder
        Name of a registered encoder (`pixnet.models.encoders`), ``"timm/NAME"``, or a module.
    mpp
        um per pixel to work at; slides are resampled to it. None: 0.5, or the coarsest slide's where that is coarser.
    max_epochs
        Passes over the shapes at most; training stops earlier when validation stops improving. The best pass gives the number
        of passes of the last run (``refit=False``: its weights are kept). None: the model's own, else 30.
    seed
        Of everything random; the same seed gives the same weights on the same CPU and threads (a ``model`` that is
        given starts from its own weights). None: ``settings.seed``.
    device
        Torch device. None: ``settings.device``, else a CUDA GPU where there is one, else the CPU.
    **recipe
        Other settings of training: ``patience``, ``lr``, ``weight_decay``, ``loss``, ``total_weight``, ``batch_shapes``,
        ``batch_crops``, ``variants``, ``stain``, ``dropout``, ``ema``, ``adapt_norms``, ``tune_encoder``, ``refit``; and of the model:
        ``decoder``, ``widths``, ``hidden``, ``zoom``, ``members``, ``link``, ``quantity``, ``stride``, ``window``, ``halo`` (see
        `pixnet.models.PixNet`). ``loss`` is one of ``"mse+pcc"``, ``"mse"``, ``"pcc"``, ``"poisson+pcc"`` and ``"nb+pcc"``: a
        negative binomial likelihood of the raw counts, each gene's dispersion taken from the training shapes.
        ``adapt_norms``: whether the batch norms of a new model's encoder take the statistics of the training tissue; None:
        where images are enlarged (``zoom``).

    Returns
    -------
    PixNet
        With ``.genes``, ``.mpp``, ``.stride``, ``.history`` (one dict per pass of the run with held-out shapes) and ``.config``.

    Raises
    ------
    KeyError
        If an element, table, layer, column or gene is missing.
    TypeError
        If an image is not uint8, or an argument is of the wrong type.
    ValueError
        If um/px is unknown, tables hold no raw counts or do not match their shapes, totals cannot be compared, or
        nothing is left to train or validate with.
    FloatingPointError
        If the loss becomes NaN; the pass, the batch and its sections are named.
    FileNotFoundError
        If the encoder's weights cannot be had; the message says how to supply them.

    References
    ----------
    Zhang, Yang & Pan, "From Spots to Pixels", arXiv 2503.01347: sparse supervision by sums over shapes, and the loss.
    Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", arXiv 1603.04779: adapted batch norms.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600, n_genes=10)
    >>> model = px.tl.train(sdata, shapes="spots", max_epochs=2, variants=1, mpp=1.0)
    >>> model.genes == px.pp.select_genes(sdata, table_key="spots_counts")
    True
    """
    if model is not None:
        _check_model(model)
    build, recipe = _settings_of(recipe | {"max_epochs": max_epochs}, model)
    seed = settings.seed if seed is None else seed
    _check_numbers(seed, mpp)
    if model is not None and (encoder != "efficientnet_lite0" or mpp is not None or build):
        raise ValueError(
            "model= brings its own encoder, mpp and decoder; leave out encoder=, mpp= and the model's settings"
        )

    objects = named_objects(sdata)
    held_out = _held_out(objects, validation)
    keys = (image_key, shapes, table_key, total_key)
    train_sources = resolve_sources({k: v for k, v in objects.items() if k not in held_out}, *keys, mask_key)
    valid_sources = resolve_sources(held_out, *keys, mask_key) if held_out else []
    sources = [*train_sources, *valid_sources]
    _check_totals(sources, total_key)
    genes = _genes(genes, model, train_sources, layer, total_key)
    _check_genes_everywhere(genes, sources)
    model_mpp = model.mpp if model is not None else _model_mpp(mpp, sources)

    import torch

    from pixnet._core.train.loop import fit

    device = _device(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        net = _network(model, genes, encoder, model_mpp, build)
        for source in sources:  # refuses slides that are too coarse before anything is read
            if source.slide.grid(net.mpp, net.stride).enlarged:
                logger.warning(
                    "slide %r has %.3g um/px and is enlarged to the model's %.3g um/px; detail is missing",
                    source.name, source.slide.mpp, net.mpp,
                )  # fmt: skip
        options = {"layer": layer, "total_key": total_key}
        training = [open_section(s, genes, net.mpp, net.stride, **options) for s in train_sources]
        valid = [open_section(s, genes, net.mpp, net.stride, **options) for s in valid_sources]
        if not valid:
            training, valid = _cut(training)
        net = fit(net, training, valid, recipe, seed=seed, device=device, fresh=not _trained(model))
    net.provenance |= _provenance(training, valid, keys, recipe, seed)
    net.stain = _stain(training)
    return net


# what is asked for -------------------------------------------------------------------------------------------------


def _settings_of(given: dict[str, Any], model: PixNet | None) -> tuple[dict[str, Any], TrainingOptions]:
    """Tell settings of the model from those of training, where a model's own hold unless given; refuse others."""
    from pixnet._core.train.options import TrainingOptions

    of_model = ("decoder", "widths", "hidden", "zoom", "members", "link", "quantity", "stride", "window", "halo")
    of_training = [f.name for f in fields(TrainingOptions)]
    for name in given:
        if name not in of_model and name not in of_training:
            raise TypeError(
                f"train() has no argument {name!r}; settings it takes besides the named ones: {listed([*of_training, *of_model])}"
            )
    build = {k: v for k, v in given.items() if k in of_model}
    own = {} if model is None else model.training_options
    return build, TrainingOptions.of(own, {k: v for k, v in given.items() if k in of_training})


def _check_model(model: Any) -> None:
    from pixnet.models import PixNet

    if not isinstance(model, PixNet):
        raise TypeError(
            f"model is {type(model).__name__}; a PixNet is needed (pixnet.models.load reads one from a file)"
        )


def _trained(model: PixNet | None) -> bool:
    return model is not None and bool(model.history)


def _device(device: str | None) -> str:
    """Return where to train: Apple's GPUs, which lack sparse products, only if named."""
    from pixnet._core.predict.device import resolve_device

    device = device if device is not None else settings.device
    found = resolve_device(device)
    return "cpu" if device is None and found.type == "mps" else str(found)


def _check_numbers(seed: Any, mpp: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; a whole number from 0 is needed")
    if mpp is not None and not mpp > 0:
        raise ValueError(f"mpp is {mpp!r}; um per pixel must be positive")


def _held_out(objects: dict[str, SpatialData], validation: Any) -> dict[str, SpatialData]:
    """Return the objects to validate with; empty: a block of the single object."""
    if validation is None:
        return {} if len(objects) == 1 else dict([list(objects.items())[-1]])
    names = [validation] if isinstance(validation, str) else validation
    if isinstance(names, Sequence) and names and all(isinstance(n, str) for n in names):
        unknown = [n for n in names if n not in objects]
        if unknown:
            raise KeyError(f"validation names {unknown[0]!r}, no object of sdata; it has: {listed(objects)}")
        if len(set(names)) == len(objects):
            raise ValueError("validation holds out every object; at least one has to be left for training")
        return {n: objects[n] for n in names}
    others = named_objects(validation, "validation")
    for name, one in others.items():
        if any(one is o for o in objects.values()):
            raise ValueError(
                f"validation holds an object ({name!r}) that is in sdata too; hold it out by its name instead"
            )
    return {f"validation {name}" if name in objects else name: one for name, one in others.items()}


def _check_totals(sources: Sequence[Source], total_key: str | None) -> None:
    columns = {f"{t} of object {s.name}": s.sdata.tables[t].n_vars for s in sources for t in s.pairs.values()}
    check_totals_alike(columns, total_key)


def _genes(
    genes: Sequence[str] | None,
    model: PixNet | None,
    sources: Sequence[Source],
    layer: str | None,
    total_key: str | None,
) -> list[str]:
    """Return the genes to predict: as given, the model's, or those of highest mean; without counts they are kept out."""
    if genes is not None:
        return _without_silent(check_genes(genes), sources, layer)
    if model is not None:
        return list(model.genes) if _trained(model) else _without_silent(list(model.genes), sources, layer)
    from pixnet.pp import select_genes

    # Tables are chosen per object; objects may call them differently, so each is asked for its own.
    keys = list(dict.fromkeys(t for s in sources for t in s.pairs.values()))
    objects = {s.name: s.sdata for s in sources}
    if all(set(keys) <= set(s.pairs.values()) for s in sources):
        found = select_genes(objects, table_key=keys, total_key=total_key, layer=layer)
    else:
        common: set[str] | None = None
        for s in sources:
            have = select_genes(s.sdata, table_key=list(s.pairs.values()), n_top=None, total_key=total_key, layer=layer)
            common = set(have) if common is None else common & set(have)
        first = sources[0]
        ranked = select_genes(
            first.sdata, table_key=list(first.pairs.values()), n_top=None, total_key=total_key, layer=layer
        )
        found = [g for g in ranked if g in (common or ())][:250]
    return _without_silent(found, sources, layer)


def _check_genes_everywhere(genes: list[str], sources: Sequence[Source]) -> None:
    """Refuse a table that lacks a gene before any slide is opened."""
    from pixnet._sdata.genes import gene_positions

    for source in sources:
        for key in source.pairs.values():
            gene_positions(source.sdata.tables[key], key, genes)


def _without_silent(genes: list[str], sources: Sequence[Source], layer: str | None) -> list[str]:
    """Leave out genes without a single count in any training table, by name."""
    import numpy as np

    from pixnet._sdata.counts import counts_matrix, gene_positions

    seen = np.zeros(len(genes), dtype=bool)
    for source in sources:
        for key in source.pairs.values():
            table = source.sdata.tables[key]
            matrix = counts_matrix(table, key, layer)[:, gene_positions(table, key, genes)]
            seen |= np.asarray(matrix.sum(axis=0)).ravel() > 0
    silent = [g for g, s in zip(genes, seen) if not s]
    if silent:
        logger.warning(
            "%d genes have no counts in the training tables and are left out: %s", len(silent), listed(silent[:10])
        )
    kept = [g for g, s in zip(genes, seen) if s]
    if not kept:
        raise ValueError("none of the genes has a count in the training tables")
    return kept


def _model_mpp(mpp: float | None, sources: Sequence[Source]) -> float:
    return float(mpp) if mpp is not None else max(FINEST_MPP, *(s.slide.mpp for s in sources))


def _network(model: PixNet | None, genes: list[str], encoder: Any, mpp: float, build: dict[str, Any]) -> PixNet:
    from pixnet.models import PixNet

    if model is not None:
        return model.with_genes(genes)
    # A copy, since training may change it: the caller's module, and the folds of a cross-validation, stay as they were.
    return PixNet(genes, mpp=mpp, encoder=encoder if isinstance(encoder, str) else copy.deepcopy(encoder), **build)


def _cut(sections: list[Section]) -> tuple[list[Section], list[Section]]:
    """Hold out a block of the single section; the tissue on the other side of the line trains."""
    near, far = split_block(sections[0])
    return [near], [replace(far, name=f"{far.name} (held-out block)")]


# what is remembered -------------------------------------------------------------------------------------------------


def _provenance(training, valid, keys, recipe, seed) -> dict[str, Any]:
    """Return how the model came about, JSON-plain."""
    from pixnet import __version__

    image_key, shapes, table_key, total_key = keys

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {
        "pixnet": __version__,
        "training": {s.name: {t.name: len(t.geometries) for t in s.targets} for s in training},
        "validation": {s.name: {t.name: len(t.geometries) for t in s.targets} for s in valid},
        "mpp": {s.name: s.grid.mpp for s in training},
        "image_key": image_key,
        "shapes": plain(shapes),
        "table_key": plain(table_key),
        "total_key": total_key,
        "options": {f.name: getattr(recipe, f.name) for f in fields(recipe)},
        "seed": seed,
    }


def _stain(training: Sequence[Section]) -> list[dict[str, Any]]:
    """Return the stain statistics of the training slides: what predict compares a new slide with."""
    from pixnet._core.slide.stain import slide_statistics

    found = [slide_statistics(s.reader, s.mask) for s in training]
    return [f for f in found if f is not None]
