"""The training loop: crops of slides with sparse measurements in, a fitted model out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pixnet._core.train.crops import Section, crop_size
from pixnet._core.train.dataset import Batch, CropDataset, batches_of, collate
from pixnet._core.train.features import (
    adapt_norms,
    autocast,
    cache_features,
    crop_halo,
    encode_crops,
    set_feature_statistics,
    standardised,
)
from pixnet._core.train.options import TrainingOptions
from pixnet._logging import logger
from pixnet._settings import settings
from pixnet.models._losses import LOSSES, shape_loss
from pixnet.models._pixnet import PixNet

EVALUATED_CROPS = 8
"""Crops at once where nothing is learned: scores are over all shapes anyhow, and memory is what a batch takes."""


def _sums(model: PixNet, batch: Batch, features: list[Tensor | None], member: int | None = None) -> dict[str, Tensor]:
    """Return for each element the sums of the densities over its shapes, ``(shapes, genes + 1)``.

    What follows the decoders runs only on the pixels that shapes cover: the rest of the map is not looked at.
    """
    members = model.members if member is None else [model.members[member]]
    densities = []
    for m in members:
        with autocast(batch.pixel.device):
            decoded = m.decoder(features).flatten(2).transpose(1, 2)[batch.crop_of_pixel, batch.pixel]
            logits = m.logits(decoded.T[None, :, None])
        densities.append(model.density(logits)[0, :, 0].T)
    density = densities[0] if len(densities) == 1 else torch.stack(densities).mean(dim=0)
    return {name: torch.sparse.mm(w, density) for name, w in batch.weights.items()}


def _losses(
    model: PixNet, material: CropDataset, batch: Batch, sums: dict[str, Tensor], kind: str
) -> dict[str, Tensor]:
    """Return the losses, averaged over the elements."""
    found = []
    for name, s in sums.items():
        parts = (s, batch.covered(name), batch.cp10k[name], batch.depth[name])
        section = material.crops[batch.crops[0]].section  # a batch is of one section
        found.append(_loss(model, material, section, name, *parts, batch.umi[name], kind))
    return {key: torch.stack([f[key] for f in found]).mean() for key in found[0]}


def _loss(model, material, section, name, sums, covered, cp10k, depth, umi, kind) -> dict[str, Tensor]:
    predicted = model.log_expression(sums, covered, material.pixel_um2(section))
    dispersion = material.dispersion[name].to(sums.device) if kind == "nb+pcc" else None
    return shape_loss(
        predicted, sums[:, -1] / covered.clamp(min=1e-6), cp10k, depth, LOSSES[kind], umi=umi, dispersion=dispersion
    )


# the loop --------------------------------------------------------------------------------------------------------


def fit(
    model: PixNet,
    training: Sequence[Section],
    validation: Sequence[Section],
    recipe: TrainingOptions,
    *,
    seed: int,
    device: str,
    fresh: bool = True,
) -> PixNet:
    """Train a model in place and return it, with the weights that validated best.

    Parameters
    ----------
    model
        The model.
    training, validation
        Sections; no shape may be in both.
    recipe
        How.
    seed
        Of everything random.
    device
        Torch device.
    fresh
        Whether the decoder is new: batch norms, feature statistics and baseline are then set from the training sections.

    Raises
    ------
    ValueError
        If nothing is left to train on or to validate with.
    FloatingPointError
        If the loss becomes NaN; the batch is named.

    Notes
    -----
    ``model.history`` gets one row for each pass that was validated; the passes of the last run on everything
    (``refit``) have nothing to be validated with and leave none. ``config["epochs"]`` tells how many passes the weights
    have seen.
    """
    size = crop_size([*training, *validation])
    train, valid = CropDataset(training, size), CropDataset(validation, size)
    _report(train, valid)
    rng = torch.Generator().manual_seed(seed)
    model.to(device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(recipe.tune_encoder)
    if fresh and (model.config.zoom > 1 if recipe.adapt_norms is None else recipe.adapt_norms):
        adapt_norms(model, train, rng, device)
    variants = 1 if recipe.tune_encoder else recipe.variants
    cache_features(model, train, variants, recipe.stain, rng, device, "features")
    cache_features(model, valid, variants if recipe.refit else 1, recipe.stain, rng, device, "features (validation)")
    start = _snapshot(model)

    def begin(material: CropDataset) -> None:
        model.load_state_dict(start)
        if fresh:
            set_feature_statistics(model, material)
            _set_baseline(model, material)

    begin(train)
    state, epochs = _optimise(model, train, valid, recipe, rng, device)
    if recipe.refit:
        logger.info("training again on all sections, %d passes", epochs)
        both = CropDataset.joined(train, valid)
        train.features = valid.features = []
        begin(both)
        state, _ = _optimise(model, both, None, recipe, rng, device, epochs)
    model.load_state_dict(state)
    model.provenance["epochs"] = epochs
    model.encoder.requires_grad_(True)
    return model.eval().to("cpu", memory_format=torch.contiguous_format)


def _set_baseline(model: PixNet, material: CropDataset) -> None:
    if model.quantity == "density":
        model.set_baseline(material.mean_share())
    else:
        model.set_baseline(*material.mean_log())


def _changing(model: PixNet) -> dict[str, Tensor]:
    """Return the live tensors that training changes: a frozen encoder, often the most of a model, is left out."""
    tuned = any(p.requires_grad for p in model.encoder.parameters())
    return {k: v for k, v in model.state_dict().items() if tuned or not k.startswith("encoder.")}


def _snapshot(model: PixNet) -> dict[str, Tensor]:
    """Return the whole state; what training changes is copied, the rest is shared."""
    return model.state_dict() | {k: v.detach().clone() for k, v in _changing(model).items()}


def _optimise(
    model: PixNet,
    train: CropDataset,
    valid: CropDataset | None,
    recipe: TrainingOptions,
    rng: torch.Generator,
    device: str,
    epochs: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Train; return the averaged weights of the pass that validated best, or of the last, and that pass's number."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    per_epoch = len(batches_of(train, range(len(train.crops)), recipe.batch_shapes, recipe.batch_crops))
    passes = recipe.max_epochs if epochs is None else epochs
    steps = per_epoch * passes
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(t / max(steps, 1), 1))))
    )
    live = {k: v for k, v in _changing(model).items() if v.is_floating_point()}
    averaged = _snapshot(model)
    running = [averaged[k] for k in live]
    best, best_loss, best_epoch, step = averaged, math.inf, 0, 0
    label = "training" if valid is not None else "training on all"
    bar = tqdm(range(1, passes + 1), desc=label, unit="epoch", file=sys.stderr, disable=not settings.progress)
    for epoch in bar:
        losses = []
        order = torch.randperm(len(train.crops), generator=rng).tolist()
        for number, chosen in enumerate(batches_of(train, order, recipe.batch_shapes, recipe.batch_crops)):
            batch = collate(train, chosen, device, rng)
            losses.append(
                _step(
                    model, train, batch, recipe, rng, device, optimiser, trained, f"epoch {epoch}, batch {number + 1}"
                )
            )
            schedule.step()
            step += 1
            decay = min(recipe.ema, step / (step + 9))
            torch._foreach_lerp_(running, list(live.values()), 1 - decay)
        row = {"epoch": epoch, "lr": optimiser.param_groups[0]["lr"]}
        row |= {f"train_{k}": float(np.mean([loss[k] for loss in losses])) for k in losses[0]}
        if valid is None:
            bar.set_postfix(loss=f"{row['train_expression']:.3f}")
            continue
        current = _snapshot(model)
        model.load_state_dict(averaged)
        scores = evaluate_material(model, valid, recipe, device)
        model.load_state_dict(current)
        row |= {f"val_{k}": v for k, v in scores.items()}
        model.history.append(row)
        bar.set_postfix(
            loss=f"{row['train_expression']:.3f}", val=f"{row['val_expression']:.3f}", pcc=f"{row['val_pcc']:.3f}"
        )
        criterion = scores["expression"] + recipe.total_weight * scores["total"]
        if not math.isfinite(criterion):
            raise FloatingPointError(
                f"the validation loss is {criterion} after epoch {epoch}; training stopped. Lower the learning rate (lr=) "
                "or look for shapes with extreme counts in the validation sections"
            )
        if criterion < best_loss - 1e-4 or not best_epoch:
            changed = {k: averaged[k].clone() for k in _changing(model)}
            best, best_loss, best_epoch = averaged | changed, criterion, epoch
        elif epoch - best_epoch >= recipe.patience:
            break
    return (averaged, passes) if valid is None else (best, best_epoch)


def _step(model, train, batch, recipe, rng, device, optimiser, trained, where) -> dict[str, float]:
    """Take one step on one batch and return its losses."""
    model.train()
    model.encoder.eval()  # batch norm keeps its statistics, tuned or not
    features = _training_features(model, train, batch, recipe, rng, device)
    # Each member learns by itself: their mean then gains from their differences.
    loss, parts = 0.0, []
    for member in range(len(model.members)):
        found = _losses(model, train, batch, _sums(model, batch, features, member), recipe.loss)
        loss = loss + found["expression"] + recipe.total_weight * found["total"]
        parts.append(found)
    if not torch.isfinite(loss):
        sections = sorted({train.sections[train.crops[i].section].name for i in batch.crops})
        raise FloatingPointError(
            f"the loss is {float(loss.detach())} in {where} (sections {', '.join(sections)}); training stopped. "
            "Lower the learning rate (lr=) or look for shapes with extreme counts there"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    return {k: float(sum(p[k].detach() for p in parts)) / len(parts) for k in parts[0]}


def _training_features(model, material, batch, recipe, rng, device) -> list[Tensor | None]:
    if recipe.tune_encoder:
        pixels = torch.stack([material.pixels(material.crops[i], crop_halo(model)) for i in batch.crops]).to(device)
        how = int(torch.randint(8, (1,), generator=rng))
        raw = encode_crops(model, pixels, crop_halo(model), how, recipe.stain, rng)
    else:
        variant = torch.randint(len(material.features), (len(batch.crops),), generator=rng).tolist()
        raw = [
            torch.stack([material.features[v][level][i] for v, i in zip(variant, batch.crops)]).to(
                device, memory_format=torch.channels_last
            )
            for level in range(len(material.features[0]))
        ]
    features = standardised(model, raw)
    if recipe.dropout > 0:
        for level in model.levels:
            f = features[level]
            keep = torch.rand(f.shape[:2], generator=rng).to(f.device) >= recipe.dropout
            features[level] = f * (keep / (1 - recipe.dropout))[:, :, None, None]
    return features


@torch.no_grad()
def evaluate_material(model: PixNet, material: CropDataset, recipe: TrainingOptions, device: str) -> dict[str, float]:
    """Return the losses over all shapes of each section at once, averaged over sections and elements."""
    model.eval()
    # Losses are taken over all shapes of an element of a section together; (sums, covered, cp10k, depth, umi) of each batch.
    found: dict[tuple[int, str], list[tuple[Tensor, ...]]] = {}
    for index in range(len(material.sections)):
        own = [i for i, crop in enumerate(material.crops) if crop.section == index]
        for chosen in batches_of(material, own, 10**9, min(recipe.batch_crops, EVALUATED_CROPS)) if own else []:
            batch = collate(material, chosen, device)
            if recipe.tune_encoder:
                pixels = torch.stack([material.pixels(material.crops[i], crop_halo(model)) for i in chosen]).to(device)
                raw = encode_crops(model, pixels, crop_halo(model), 0, 0.0, torch.Generator())
            else:
                raw = [level[chosen].to(device, memory_format=torch.channels_last) for level in material.features[0]]
            for name, sums in _sums(model, batch, standardised(model, raw)).items():
                parts = (sums, batch.covered(name), batch.cp10k[name], batch.depth[name], batch.umi[name])
                found.setdefault((index, name), []).append(parts)
    losses = []
    for (index, name), batches in found.items():
        *parts, umi = (torch.cat(part) for part in zip(*batches))
        losses.append(_loss(model, material, index, name, *parts, umi, recipe.loss))
    return {key: float(torch.stack([loss[key] for loss in losses]).mean()) for key in losses[0]}


def _report(train: CropDataset, valid: CropDataset) -> None:
    for material, use, mend in ((train, "train on", "shapes="), (valid, "validate with", "validation=")):
        if not material.crops:
            raise ValueError(
                f"no shapes are left to {use}: every one lies outside its image, off the tissue (less than half its area) or "
                f"has no counts. Look at the mask with pixnet.pp.tissue_mask, or choose others with {mend}"
            )
        for key, n in material.left_out.items():
            logger.info(
                "%s: %d shapes lie outside the image or mostly off the tissue and %s nothing", key, n, use.split()[0]
            )
    logger.info("training on %s, validating with %s", _counted(train.n_shapes), _counted(valid.n_shapes))


def _counted(n: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in n.items())
