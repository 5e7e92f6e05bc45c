"""Train a PixNet on slides with measured shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from spatialdata import SpatialData

from pixnet._checked import given
from pixnet._core.train.options import GeneWeights, Loss, TrainingOptions, as_dict, resolve_options
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.inputs import SpatialDatas, is_same, named_objects
from pixnet._sdata.placement import check_placement
from pixnet._sdata.sections import MeasuredSlide, Totals, open_measured, open_section
from pixnet._settings import settings
from pixnet.tl._training_genes import (
    Tables,
    check_panels,
    check_quantity,
    choose_genes,
    number_of_programs,
    only_held_out_have,
    panels_alone,
)

if TYPE_CHECKING:
    from torch import nn

    from pixnet._core.train.crops import Section
    from pixnet.models import PixNet
    from pixnet.models._config import Decoder, Quantity, Stride, Zoom

FINEST_MPP = 0.5
"""Pixel size (µm/px) that a model works at unless a training slide is coarser."""


def train(
    sdata: SpatialDatas,
    *,
    image_key: str | None = None,
    shapes: str | Sequence[str] | None = None,
    table_key: str | Sequence[str] | None = None,
    genes: str | Sequence[str] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    totals: Totals | None = None,
    mask_key: str | Literal[False] | None = None,
    validation: str | Sequence[str] | SpatialDatas | None = None,
    model: PixNet | None = None,
    encoder: str | nn.Module | None = None,
    mpp: float | None = None,
    max_epochs: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    resume: bool = False,
    options: TrainingOptions | Mapping[str, Any] | None = None,
    patience: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    loss: Loss | None = None,
    gene_weights: GeneWeights | None = None,
    total_weight: float | None = None,
    batch_shapes: int | None = None,
    batch_crops: int | None = None,
    variants: int | None = None,
    stain: float | None = None,
    dropout: float | None = None,
    ema: float | None = None,
    adapt_norms: bool | None = None,
    tune_encoder: bool | None = None,
    refit: bool | None = None,
    stride: Stride | None = None,
    decoder: Decoder | None = None,
    widths: Sequence[int] | None = None,
    hidden: int | None = None,
    members: int | None = None,
    quantity: Quantity | None = None,
    n_programs: int | None = None,
    zoom: Zoom | None = None,
    window: int | None = None,
    halo: int | None = None,
) -> PixNet:
    """Train a model that predicts dense gene maps from H&E, on counts measured in shapes of any size.

    The map is summed over each shape, with exact pixel areas, and compared with the shape's counts: mean squared error
    plus ``0.5 (1 - PCC)`` on log1p of CP10k, and the log of the depth per area relative to the section's mean. So
    spots, bins and cells can train together, and the map answers at any scale. The encoder is frozen. Its features are
    computed once, in several turned and restained versions, and the decoder learns on them. They are kept on disk
    (``settings.scratch_dir``) until Python exits: the next training on the same slides with the same encoder finds
    them.

    Shapes are compared with their slides as in `pixnet.pp.check_spots`, and a warning is logged where they seem
    misplaced.

    Parameters
    ----------
    sdata
        One object, a list (their names are "0", "1", ...) or a dict of named ones.
    image_key
        The H&E image (uint8 RGB), whose pixel size is known.
    shapes, table_key
        The measured shapes and their tables of raw counts; ``shapes[i]`` pairs with ``table_key[i]``, in every object
        that has both. None: the recorded or only shapes, and the table that annotates them.
    genes
        Gene or genes to predict. None: all that the training tables have (any of them where they are of panels, else
        all of them) and that are detected in at least 1 % of the shapes; the 250 of highest mean
        (`pixnet.pp.select_genes`) where ``n_programs=0`` or ``quantity="log_sum"`` asks for a channel for each gene.
    layer
        Layer of the tables that holds raw counts. None: X.
    total_key
        Column of obs with all UMI of each observation. None: the sum over all columns of the table.
    totals
        ``"all"``: a table's total is that of all transcripts. ``"panel"``: it is that of the predicted genes that the
        table has, such as those of a Xenium panel; expression is then compared within them, and ``total_key`` is not
        used. A dict says it by the name of an object or a table. Tables of different panels, and of whole
        transcriptomes, train together: a gene that a table did not measure is left out of its loss. None: ``"all"``.
    mask_key
        Labels element that marks tissue. None: ``"{image_key}_tissue"``, else computed; False: everything is tissue.
    validation
        Names of objects in ``sdata`` to hold out, or further objects. None: the last of several objects. Of a single
        one, and of each where the panel of the last has genes that no other has, a block in space: a fifth of its
        shapes at one end. Validation chooses the number of passes; the model is then trained again on everything,
        validation included, for as many (``refit=False`` leaves that out).
    model
        A model to start from; it is not changed. It excludes ``encoder``, ``mpp`` and the other settings of the model.
        A model that was never trained, such as `pixnet.models.PixNet.paper` gives, starts from the mean composition of
        the training shapes; a trained model keeps what it has learned. The settings in its ``training_options`` hold
        unless they are given here.
    encoder
        Name of a registered encoder (`pixnet.models.encoders`), ``"timm/NAME"``, or a module. None:
        ``"efficientnet_lite0"``.
    mpp
        Pixel size (µm/px) to work at; slides are resampled to it. None: 0.5, or the coarsest slide's where that is
        coarser.
    max_epochs
        Largest number of passes over the shapes; training stops earlier when validation stops improving. The best pass
        gives the number of passes of the last run (``refit=False``: its weights are kept). None: the model's own, else
        30.
    seed
        Seed of everything random; the same seed gives the same weights on the same CPU and threads (a ``model`` that is
        given starts from its own weights). None: ``settings.seed``.
    device
        Torch device. None: ``settings.device``, else a CUDA GPU where there is one, else the CPU.
    resume
        Go on with the same call that was interrupted, after its last whole pass: the weights are those of a run that
        was not. The state of training is kept in ``settings.scratch_dir`` after each pass. Without such a run, start
        from the beginning.
    options
        Settings of training: `TrainingOptions`, which replace the model's own, or a mapping of some of them. The single
        settings that follow come before these.
    patience, lr, weight_decay, loss, gene_weights, total_weight, batch_shapes, batch_crops, variants, stain, dropout, ema
        Settings of training: see `TrainingOptions`. None: those of ``options``, else the model's own, else the
        defaults.
    adapt_norms, tune_encoder, refit
        The same.
    n_programs
        Number of programs of a new model, at most the number of training shapes: its map has as many channels, which
        add up to all transcripts, and answers for any number of genes. They start from a nonnegative matrix
        factorisation of the measured shapes. 0: a channel for each gene. None: 64, or a third of the training shapes
        where that is less, if there are more than 1,000 genes to predict; else a channel for each gene.
    stride, decoder, widths, hidden, members, quantity, zoom, window, halo
        Settings of a new model (``stride``, ``window`` and ``halo`` in px): see `pixnet.models.PixNet`. None: its
        defaults.

    Returns
    -------
    PixNet
        Its ``history`` has one dict for each pass of the run with held-out shapes, its ``provenance`` tells how it was
        trained.

    Raises
    ------
    KeyError
        If an element, table, layer, column or gene is missing.
    TypeError
        If an image is not uint8, or an argument is of the wrong type.
    ValueError
        If a pixel size is unknown, tables hold no raw counts or do not match their shapes, totals cannot be compared, a
        setting is out of range, or nothing is left to train or validate with.
    FloatingPointError
        If the loss becomes NaN; the pass, the batch and its sections are named.
    FileNotFoundError
        If the encoder's weights cannot be had; the message says how to supply them.
    OSError
        If the disk of ``settings.scratch_dir`` cannot hold the features; nothing is computed then.

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
    asked = given(
        max_epochs=max_epochs, patience=patience, lr=lr, weight_decay=weight_decay, loss=loss, gene_weights=gene_weights,
        total_weight=total_weight, batch_shapes=batch_shapes, batch_crops=batch_crops, variants=variants, stain=stain,
        dropout=dropout, ema=ema, adapt_norms=adapt_norms, tune_encoder=tune_encoder, refit=refit,
    )  # fmt: skip
    build = given(
        encoder=encoder, mpp=mpp, stride=stride, decoder=decoder, widths=widths, hidden=hidden, members=members,
        quantity=quantity, n_programs=n_programs, zoom=zoom, window=window, halo=halo,
    )  # fmt: skip
    _check_start(model, build)
    seed = _resolve_seed(seed)
    resolved = _resolve_options(model, options, asked)

    # open the slides and choose the genes, without reading a pixel
    objects = named_objects(sdata)
    held_out = _held_out(objects, validation)
    slides = open_measured(objects | held_out, image_key, shapes, table_key, total_key, mask_key, totals)
    tables: Tables = {m.name: m.tables(layer=layer, total_key=total_key) for m in slides}
    if validation is None and only_held_out_have(held_out, tables, genes):
        held_out = {}  # a block of each object, so that these genes can be learned
    by_gene = n_programs == 0 or (n_programs is None and quantity == "log_sum")
    chosen, tables = choose_genes(genes, model, tables, held_out, every=not by_gene)
    n_shapes = sum(len(t.total) for name, found in tables.items() if name not in held_out for t in found.values())
    if model is None:
        build["n_programs"] = None if by_gene else number_of_programs(n_programs, len(chosen), n_shapes)
        if quantity is None and build["n_programs"] is None and panels_alone(tables):
            build["quantity"] = "panel_density"
        check_quantity(tables, build.get("quantity", "density"), build["n_programs"])
    elif not model.history or model.quantity != "density":  # a trained model knows the total already
        check_quantity(tables, model.config.quantity, model.config.n_programs)
    check_panels(tables, quantity if model is None else model.quantity)

    import torch

    from pixnet._core.train.fit import fit
    from pixnet._core.train.split import split_block

    device = _device(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        net = _new_model(chosen, build, slides) if model is None else model.with_genes(chosen)
        _check_resolution(slides, net)
        sections = {m.name: open_section(m, tables[m.name], net.mpp, net.stride) for m in slides}
        training = [section for name, section in sections.items() if name not in held_out]
        valid = [sections[name] for name in held_out]
        if not valid:
            parts = [split_block(section) for section in training]
            training = [near for near, _ in parts]
            valid = [replace(far, name=f"{far.name} (held-out block)") for _, far in parts]
        for m in slides:
            check_placement(m.slide, m.pairs, {key: t.total for key, t in tables[m.name].items()})
        fresh = model is None or not model.history
        net = fit(net, training, valid, resolved, seed=seed, device=device, fresh=fresh, resume=resume)
    keys = {"image_key": image_key, "shapes": shapes, "table_key": table_key, "total_key": total_key}
    net.provenance |= _provenance(training, valid, keys, resolved, seed)
    net.stain = _stain(training)
    return net


# what is asked for -------------------------------------------------------------------------------------------------


def _check_start(model: Any, build: Mapping[str, Any]) -> None:
    """Refuse anything but a model to start from, and settings that it already has."""
    if model is None:
        return
    from pixnet.models import PixNet

    if not isinstance(model, PixNet):
        raise TypeError(
            f"model is {type(model).__name__}; a PixNet is needed (pixnet.models.load reads one from a file)"
        )
    if build:
        raise ValueError(f"model= brings its own encoder, pixel size and decoder; leave out {listed(build)}")


def _resolve_options(
    model: PixNet | None, options: TrainingOptions | Mapping[str, Any] | None, asked: Mapping[str, Any]
) -> TrainingOptions:
    """Return the settings of training, and say which of them come from the model."""
    resolved, from_model = resolve_options({} if model is None else model.training_options, options, asked)
    if from_model:
        shown = ", ".join(f"{name}={value!r}" for name, value in from_model.items())
        logger.info("settings of training that come from the model (model.training_options): %s", shown)
    return resolved


def _resolve_seed(seed: int | None) -> int:
    seed = settings.seed if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; a whole number from 0 is needed")
    return seed


def _device(device: str | None) -> str:
    """Return where to train: Apple's GPUs, which lack sparse products, only if named."""
    from pixnet._core.predict.device import resolve_device

    device = device if device is not None else settings.device
    found = resolve_device(device)
    return "cpu" if device is None and found.type == "mps" else str(found)


def _held_out(objects: dict[str, SpatialData], validation: Any) -> dict[str, SpatialData]:
    """Return the objects to validate with; empty: a block of the single object."""
    if validation is None:
        return {} if len(objects) == 1 else dict([list(objects.items())[-1]])
    names = [validation] if isinstance(validation, str) else validation
    if isinstance(names, Sequence) and names and all(isinstance(n, str) for n in names):
        unknown = [n for n in names if n not in objects]
        if unknown:
            raise KeyError(
                f"validation names {unknown[0]!r}, which is not an object of sdata; it has: {listed(objects)}"
            )
        if len(set(names)) == len(objects):
            raise ValueError("validation holds out every object; at least one has to be left for training")
        return {n: objects[n] for n in names}
    others = named_objects(validation, "validation")
    for name, one in others.items():
        if any(is_same(one, o) for o in objects.values()):
            raise ValueError(
                f"validation holds an object ({name!r}) that is in sdata too; hold it out by its name instead"
            )
    return {f"validation {name}" if name in objects else name: one for name, one in others.items()}


def _new_model(genes: list[str], build: Mapping[str, Any], slides: Sequence[MeasuredSlide]) -> PixNet:
    """Return a model that works at 0.5 µm/px or at the coarsest slide's pixel size, unless told otherwise."""
    from pixnet.models import PixNet

    mpp = max(FINEST_MPP, *(m.slide.mpp for m in slides))
    # A copy, since training may change it: the caller's module, and the folds of a cross-validation, stay as they were.
    return PixNet(genes, **{"mpp": mpp, **build, "encoder": copy.deepcopy(build.get("encoder"))})


def _check_resolution(slides: Sequence[MeasuredSlide], model: PixNet) -> None:
    """Refuse slides that are too coarse for the model, and name those that have to be enlarged."""
    for measured in slides:
        if measured.slide.grid(model.mpp, model.stride).enlarged:
            logger.warning(
                "slide %r has %.3g µm/px and is enlarged to the model's %.3g µm/px; detail is missing",
                measured.name,
                measured.slide.mpp,
                model.mpp,
            )


# what is remembered -------------------------------------------------------------------------------------------------


def _provenance(
    training: Sequence[Section],
    valid: Sequence[Section],
    keys: Mapping[str, Any],
    options: TrainingOptions,
    seed: int,
) -> dict[str, Any]:
    """Return how the model came about, JSON-plain."""
    from importlib.metadata import version

    return {
        "pixnet": version("pixnet"),
        "training": {s.name: {t.name: len(t.shapes) for t in s.targets} for s in training},
        "validation": {s.name: {t.name: len(t.shapes) for t in s.targets} for s in valid},
        "mpp": {s.name: s.grid.mpp for s in training},
        **{key: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for key, v in keys.items()},
        "options": as_dict(options),
        "seed": seed,
    }


def _stain(training: Sequence[Section]) -> list[dict[str, Any]]:
    """Return the stain statistics of the training slides: predict compares a new slide with them."""
    from pixnet._core.slide.stain import slide_statistics

    found = [slide_statistics(s.reader, s.mask) for s in training]
    return [f for f in found if f is not None]
