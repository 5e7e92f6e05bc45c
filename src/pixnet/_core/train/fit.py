"""Training from sections to a fitted model: crops, features, a run with held-out shapes, and one on everything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pixnet._core.train.checkpoints import Checkpoints, job_hash
from pixnet._core.train.crops import Section, crop_size
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.evidence import assess, balance, predict_shapes, ratio_of
from pixnet._core.train.features import adapt_norms, set_feature_statistics, with_features
from pixnet._core.train.novelty import fit_novelty
from pixnet._core.train.objective import Objective
from pixnet._core.train.options import TrainingOptions
from pixnet._core.train.trainer import Row, Trainer, passes_as_far, snapshot
from pixnet._logging import logger
from pixnet.models._pixnet import PixNet


def fit(
    model: PixNet,
    training: Sequence[Section],
    validation: Sequence[Section],
    options: TrainingOptions,
    *,
    seed: int,
    device: str,
    fresh: bool = True,
    resume: bool = False,
    objective: Objective | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> PixNet:
    """Train a model in place and return it, with the weights that validated best.

    Parameters
    ----------
    model
        The model.
    training, validation
        Sections; no shape may be in both.
    options
        Settings of training.
    seed
        Seed of everything random.
    device
        Torch device.
    fresh
        Whether the decoder is new: batch norms, feature statistics and baseline are then set from the training
        sections.
    resume
        Go on with a run of the same model, settings and sections that was interrupted, after the last of its passes.
    objective
        The losses; None: those that the options name.
    on_epoch
        Called after each pass with its row (see `Trainer`).

    Raises
    ------
    ValueError
        If nothing is left to train on or to validate with.
    FloatingPointError
        If the loss becomes NaN; the batch is named.

    Notes
    -----
    A loss of logs of noisy counts leaves amounts too low; one factor for each gene, from the held-out shapes, brings
    their sums to what was measured. What these shapes then show of each gene is ``model.evidence``. The last run has
    none to be compared with: its own ratio over all shapes is multiplied by what the first run's rose from seen to
    held-out shapes. ``model.novelty`` compares features with those of the training shapes, in percentiles of the
    held-out ones.

    ``model.history`` gets one row for each pass that was validated; the passes of the last run on everything
    (``refit``) have nothing to be validated with and leave none. ``provenance["epochs"]`` tells which pass was
    best, ``provenance["refit_epochs"]`` how many the last run made. Rows of one call have the same ``run``.
    """
    objective = Objective(options) if objective is None else objective
    size = crop_size([*training, *validation])
    train, valid = CropDataset.of(training, size), CropDataset.of(validation, size)
    _report(train, valid)
    checkpoints = Checkpoints(job_hash(model, training, validation, options, seed, device))
    saved = checkpoints.load() if resume else None
    if resume and saved is None:
        logger.info(
            "there is no interrupted run of these settings and slides to go on with; training starts from the beginning"
        )
    try:
        epochs = _fit(
            model, train, valid, options, objective, seed, device, fresh, on_epoch, checkpoints.save, saved or {}
        )
    except KeyboardInterrupt:
        logger.warning(
            "training was interrupted; the same call with resume=True goes on after its last whole pass, and in this process "
            "finds the features that are there"
        )
        raise
    except FloatingPointError:
        checkpoints.remove()
        raise
    checkpoints.remove()
    model.provenance["epochs"] = epochs
    model.encoder.requires_grad_(True)
    return model.eval().to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _fit(
    model: PixNet,
    train: CropDataset,
    valid: CropDataset,
    options: TrainingOptions,
    objective: Objective,
    seed: int,
    device: str,
    fresh: bool,
    on_epoch: Callable[[Row], None] | None,
    save: Callable[[dict[str, Any]], None],
    saved: Mapping[str, Any],
) -> int:
    """Compute features and make both runs; return the pass that validated best. ``saved`` is what ``save`` was given last."""
    rng = torch.Generator().manual_seed(seed)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.encoder.requires_grad_(options.tune_encoder)
    if fresh and (model.config.zoom > 1 if options.adapt_norms is None else options.adapt_norms):
        adapt_norms(model, train, rng, device)
    variants = 1 if options.tune_encoder else options.variants
    versions = (variants, variants if options.refit else 1)
    train, valid = with_features((train, valid), model, versions, options.stain, device)
    start = snapshot(model)
    objective.prepare(train, model.head.gene_weights)
    before = list(model.history)
    number = 1 + max((row.get("run", 1) for row in before), default=0)

    def validated(row: Row) -> None:
        model.history.append({"run": number, **row})
        if on_epoch is not None:
            on_epoch(row)

    if saved:
        model.history = [*before, *saved["history"]]
        run, state = ("on everything", saved["again"]) if "again" in saved else ("with held-out shapes", saved["first"])
        logger.info("going on after pass %d of the run %s", state["epoch"], run)
    if fresh:
        initialise(model, train, seed)
    first = Trainer(model, train, valid, objective, rng=rng, device=device, on_epoch=validated)
    first.keep = lambda state: save({"first": state, "history": model.history[len(before) :]})
    if saved:
        first.restore(saved["first"])
    state, epochs = first.run()
    whole = copy.deepcopy(first.state())
    model.load_state_dict(state)
    drawn = np.random.default_rng(seed)
    seen, held_out = (predict_shapes(model, dataset, device, drawn) for dataset in (train, valid))
    ratio = ratio_of(held_out)
    balance(model, ratio, held_out)
    model.evidence = assess(predict_shapes(model, valid, device, drawn), ratio, seed)
    generalised = ratio / ratio_of(seen)
    model.provenance.pop("refit_epochs", None)  # of an earlier training
    if options.refit:
        passes = passes_as_far(epochs, options.max_epochs) if model.head.refit_in_full else epochs
        model.provenance["refit_epochs"] = passes
        logger.info(
            "training again on all sections, %d passes (the best of the first run was number %d)", passes, epochs
        )
        both = train.join(valid)
        model.load_state_dict(start)
        if fresh:
            initialise(model, both, seed)
        again = Trainer(model, both, None, objective, rng=rng, device=device, epochs=passes, on_epoch=on_epoch)
        again.keep = lambda state: save({"first": whole, "again": state, "history": model.history[len(before) :]})
        if "again" in saved:
            again.restore(saved["again"])
        state, _ = again.run()
        model.load_state_dict(state)
        seen = predict_shapes(model, both, device, drawn)
        balance(model, ratio_of(seen) * generalised, seen)
    fit_novelty(model, train, valid, device, seed)
    return epochs


def initialise(model: PixNet, dataset: CropDataset, seed: int) -> None:
    """Let a model start from the statistics of the features and from what was measured in the shapes."""
    set_feature_statistics(model, dataset)
    model.start(dataset.measured(seed))


def _report(train: CropDataset, valid: CropDataset) -> None:
    """Say how many shapes are used, and refuse to go on without any."""
    for dataset, use, argument in ((train, "train on", "shapes="), (valid, "validate with", "validation=")):
        if not len(dataset):
            raise ValueError(
                f"no shapes are left to {use}: every one lies outside its image, off the tissue (less than half its area) or "
                f"has no counts. Look at the mask with pixnet.pp.tissue_mask, or choose others with {argument}"
            )
        for key, n in dataset.left_out.items():
            logger.info("%s: %d shapes lie outside the image or mostly off the tissue and are left out", key, n)
    logger.info("training on %s, validating with %s", _counted(train.n_shapes), _counted(valid.n_shapes))


def _counted(n: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in n.items())
