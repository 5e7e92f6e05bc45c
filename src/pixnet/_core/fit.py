"""The training loop: crops of slides with sparse measurements in, a fitted model out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from pixnet._core.augment import jitter
from pixnet._core.crops import Crop, Section, crop_size, place_crops, weigh
from pixnet._core.packed import resolve_precision
from pixnet._logging import logger
from pixnet.models._losses import shape_loss
from pixnet.models._pixnet import PixNet


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those that the benchmarks chose.

    Attributes
    ----------
    max_epochs, patience
        Passes over the shapes at most, and without progress on validation before stopping.
    lr, weight_decay
        Of AdamW; the rate rises for a tenth of the steps and then falls along a cosine.
    loss, total_weight
        See `pixnet.models._losses.shape_loss`; weight of the total's term.
    batch_shapes, batch_crops
        Shapes that a batch has at least (Pearson's correlation is taken over them), and crops at most.
    variants, stain
        Flipped, turned and restained versions of each crop whose features are kept, and the strength of restaining.
    dropout
        Share of feature channels that are dropped in training.
    ema
        Decay per step of the running average of the weights, which is what is validated and kept.
    tune_encoder
        Train the encoder too; features are then computed anew at every step.
    refit
        Once validation has told how many passes to make, train again from the start on training and validation together.
    """

    max_epochs: int = 12
    patience: int = 5
    lr: float = 1e-3
    weight_decay: float = 1e-2
    loss: str = "mse+pcc"
    total_weight: float = 0.2
    batch_shapes: int = 96
    batch_crops: int = 32
    variants: int = 2
    stain: float = 0.15
    dropout: float = 0.1
    ema: float = 0.98
    tune_encoder: bool = False
    refit: bool = True


@dataclass
class _Measured:
    """What was measured in the shapes of one element of one section that can be trained on."""

    cp10k: Tensor
    depth: Tensor


class Material:
    """Crops of some sections with everything that training needs of them.

    Parameters
    ----------
    sections
        The sections.
    size
        Size of the crops in model pixels.
    """

    def __init__(self, sections: Sequence[Section], size: int) -> None:
        self.sections = list(sections)
        self.size = size
        self.crops: list[Crop] = []
        self.measured: list[dict[str, _Measured]] = []
        self.left_out: dict[str, int] = {}
        for index, section in enumerate(self.sections):
            crops = place_crops(section, index, size)
            for crop in crops:
                weigh(crop, section, size)
            self.crops += [crop for crop in crops if crop.rows]
            self.measured.append(self._measure(section, crops))
        self.features: list[list[Tensor]] = []

    def _measure(self, section: Section, crops: Sequence[Crop]) -> dict[str, _Measured]:
        """Normalise depth per tissue area by its mean over the section's shapes of that element."""
        out = {}
        for targets in section.targets:
            area = np.zeros(len(targets.depth))
            for crop in crops:
                if targets.name in crop.rows:
                    area[crop.rows[targets.name]] = np.asarray(crop.weights[targets.name].sum(axis=1)).ravel()
            used = area > 0
            if (~used).any():
                self.left_out[f"{section.name}/{targets.name}"] = int((~used).sum())
            depth = np.zeros_like(area)
            if used.any():
                depth[used] = targets.depth[used] / area[used]
                depth *= 1e4 / depth[used].mean()
            out[targets.name] = _Measured(torch.from_numpy(targets.cp10k), torch.from_numpy(depth.astype(np.float32)))
        return out

    @classmethod
    def joined(cls, a: Material, b: Material) -> Material:
        """Return the crops of both, with their features."""
        out = cls.__new__(cls)
        out.sections, out.size = [*a.sections, *b.sections], a.size
        out.measured = [*a.measured, *b.measured]
        out.crops = [*a.crops, *(replace(c, section=c.section + len(a.sections)) for c in b.crops)]
        out.left_out = a.left_out | b.left_out
        out.features = [[torch.cat(level) for level in zip(*variants)] for variants in zip(a.features, b.features)]
        return out

    @property
    def n_shapes(self) -> dict[str, int]:
        """Number of shapes that can be used, by element."""
        out: dict[str, int] = {}
        for crop in self.crops:
            for name, rows in crop.rows.items():
                out[name] = out.get(name, 0) + len(rows)
        return out

    def pixels(self, crop: Crop, halo: int) -> Tensor:
        """Return a crop's pixels with a halo, ``(3, h, w)`` uint8."""
        n = self.size + 2 * halo
        reader = self.sections[crop.section].reader
        return torch.from_numpy(reader.read(crop.origin[0] - halo, crop.origin[1] - halo, n, n))

    def mean_share(self) -> Tensor:
        """Return each gene's mean share of all transcripts over the shapes of the first element."""
        rows = []
        for crop in self.crops:
            name = next(iter(crop.rows))
            rows.append(self.measured[crop.section][name].cp10k[crop.rows[name]])
        return torch.cat(rows).mean(dim=0) / 1e4


# features --------------------------------------------------------------------------------------------------------


def turn(x: Tensor, how: int) -> Tensor:
    """Apply one of the eight symmetries of the square to ``(..., H, W)``."""
    if how >= 4:
        x = x.flip(-1)
    return torch.rot90(x, how % 4, (-2, -1))


def turn_back(x: Tensor, how: int) -> Tensor:
    """Undo `turn`."""
    x = torch.rot90(x, -(how % 4), (-2, -1))
    return x.flip(-1) if how >= 4 else x


def _encode(model: PixNet, pixels: Tensor, halo: int, how: int, stain: float, rng: torch.Generator) -> list[Tensor]:
    """Return raw features of the levels in use, of the crops without halo, seen turned and restained, turned back."""
    image = pixels.float() / 255
    if stain > 0:
        image = jitter(image, stain, rng)
    image = turn(image, how).contiguous(memory_format=torch.channels_last)
    with _autocast(image.device):
        raw = model.encoder(image)
    features = []
    for level in model.levels:
        stride, feature = model.encoder.strides[level], turn_back(raw[level], how)
        inner = slice(halo // stride, feature.shape[-1] - halo // stride)
        features.append(feature[..., inner, inner].contiguous(memory_format=torch.channels_last))
    return features


@torch.no_grad()
def cache_features(
    model: PixNet, material: Material, variants: int, stain: float, rng: torch.Generator, device: str, label: str
) -> None:
    """Compute the features of all crops in each variant; the first is the crop as it is."""
    model.eval()
    store: list[list[Tensor]] = []
    hows = [0, *torch.randperm(7, generator=rng).add(1).tolist()]
    bar = tqdm(total=variants * len(material.crops), desc=label, unit="crop", file=sys.stderr, disable=not _progress())
    with bar:
        for v in range(variants):
            kept: list[list[Tensor]] = []
            for start in range(0, len(material.crops), 4):
                pixels = torch.stack([material.pixels(c, model.halo) for c in material.crops[start : start + 4]])
                found = _encode(model, pixels.to(device), model.halo, hows[v % 8], stain if v else 0.0, rng)
                kept.append([f.to("cpu", torch.float16) for f in found])
                bar.update(len(pixels))
            store.append([torch.cat(level).contiguous(memory_format=torch.channels_last) for level in zip(*kept)])
    material.features = store


def set_feature_statistics(model: PixNet, material: Material) -> None:
    """Give the model mean and standard deviation of each feature over the pixels that the shapes cover."""
    for i, level in zip(model.levels, material.features[0]):
        flat = level.float().transpose(0, 1).flatten(1)
        getattr(model, f"feature_mean_{i}").copy_(flat.mean(dim=1))
        getattr(model, f"feature_sd_{i}").copy_(flat.std(dim=1).clamp(min=1e-3))


def _standardised(model: PixNet, features: list[Tensor]) -> list[Tensor | None]:
    """Return features of the levels in use, standardised and in their places among all levels."""
    placed: list[Tensor | None] = [None] * len(model.encoder.strides)
    for level, feature in zip(model.levels, features):
        placed[level] = feature.float()
    return model.standardise(placed)


# batches ---------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """Some crops: which, the pixels their shapes cover, and for each element the weights and the measurement."""

    crops: list[int]
    crop_of_pixel: Tensor
    pixel: Tensor
    weights: dict[str, Tensor]
    cp10k: dict[str, Tensor]
    depth: dict[str, Tensor]


def _batches(material: Material, order: Sequence[int], shapes: int, most: int) -> list[list[int]]:
    """Cut an order of crops into batches that have enough shapes of each element, or as many crops as allowed.

    A batch is of one section: correlations over its shapes then are those within a section, as evaluation takes them,
    and no network gains by telling sections of different depth apart. Sections follow one another in turn.
    """
    found: list[list[list[int]]] = []
    for section in range(len(material.sections)):
        own = [i for i in order if material.crops[i].section == section]
        if own:
            found.append(_batches_of_one(material, own, shapes, most))
    rounds = max((len(batches) for batches in found), default=0)
    return [batches[r] for r in range(rounds) for batches in found if r < len(batches)]


def _batches_of_one(material: Material, order: Sequence[int], shapes: int, most: int) -> list[list[int]]:
    out: list[list[int]] = [[]]
    count: dict[str, int] = {}
    for i in order:
        out[-1].append(i)
        for name, rows in material.crops[i].rows.items():
            count[name] = count.get(name, 0) + len(rows)
        if min(count.values()) >= shapes or len(out[-1]) >= most:
            out.append([])
            count = {}
    if not out[-1]:
        out.pop()
    elif len(out) > 1 and min(count.values()) < shapes // 3:
        remnant = out.pop()  # too small for a correlation
        out[-1] += remnant
    return out


def _collate(material: Material, chosen: list[int], device: str) -> _Batch:
    crops = [material.crops[i] for i in chosen]
    sizes = [len(c.pixels) for c in crops]
    names = sorted({name for c in crops for name in c.rows})
    weights, cp10k, depth = {}, {}, {}
    for name in names:
        blocks, targets, depths = [], [], []
        for crop in crops:
            if name in crop.rows:
                blocks.append(crop.weights[name])
                measured = material.measured[crop.section][name]
                targets.append(measured.cp10k[crop.rows[name]])
                depths.append(measured.depth[crop.rows[name]])
            else:
                blocks.append(sparse.csr_array((0, len(crop.pixels))))
        matrix = sparse.coo_array(sparse.block_diag(blocks, format="coo"))
        indices = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        values = torch.from_numpy(matrix.data.astype(np.float32))
        weights[name] = (
            torch.sparse_coo_tensor(indices, values, matrix.shape, check_invariants=False).coalesce().to(device)
        )
        cp10k[name], depth[name] = torch.cat(targets).to(device), torch.cat(depths).to(device)
    crop_of_pixel = torch.from_numpy(np.repeat(np.arange(len(crops)), sizes))
    pixel = torch.from_numpy(np.concatenate([c.pixels for c in crops]))
    return _Batch(chosen, crop_of_pixel.to(device), pixel.to(device), weights, cp10k, depth)


def _sums(model: PixNet, batch: _Batch, features: list[Tensor | None], member: int | None = None) -> dict[str, Tensor]:
    """Return for each element the sums of the densities over its shapes, ``(shapes, genes + 1)``.

    The heads run only on the pixels that shapes cover: the rest of the map is not looked at.
    """
    members = model.members if member is None else [model.members[member]]
    densities = []
    for m in members:
        with _autocast(batch.pixel.device):
            x = m.decoder(features).flatten(2)
        x = x.transpose(1, 2)[batch.crop_of_pixel, batch.pixel].float()
        logits = torch.nn.functional.linear(x, m.head.weight[:, :, 0, 0], m.head.bias)
        densities.append(model.density(logits))
    density = densities[0] if len(densities) == 1 else torch.stack(densities).mean(dim=0)
    return {name: torch.sparse.mm(w, density) for name, w in batch.weights.items()}


def _losses(batch: _Batch, sums: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the losses, averaged over the elements."""
    found = []
    for name, s in sums.items():
        covered = torch.sparse.sum(batch.weights[name], dim=1).to_dense()
        found.append(shape_loss(s, covered, batch.cp10k[name], batch.depth[name], kind))
    return {key: torch.stack([f[key] for f in found]).mean() for key in found[0]}


# the loop --------------------------------------------------------------------------------------------------------


def fit(
    model: PixNet,
    training: Sequence[Section],
    validation: Sequence[Section],
    recipe: Recipe,
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
        Whether the decoder is new: feature statistics and baseline are then set from the training sections.

    Raises
    ------
    ValueError
        If nothing is left to train on or to validate with.
    FloatingPointError
        If the loss becomes NaN; the batch is named.
    """
    size = crop_size([*training, *validation])
    train, valid = Material(training, size), Material(validation, size)
    _report(train, valid)
    rng = torch.Generator().manual_seed(seed)
    model.to(device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(recipe.tune_encoder)
    variants = 1 if recipe.tune_encoder else recipe.variants
    cache_features(model, train, variants, recipe.stain, rng, device, "features")
    cache_features(model, valid, variants if recipe.refit else 1, recipe.stain, rng, device, "features (validation)")
    start = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def begin(material: Material) -> None:
        model.load_state_dict(start)
        if fresh:
            set_feature_statistics(model, material)
            model.set_baseline(material.mean_share())

    begin(train)
    state, epochs = _optimise(model, train, valid, recipe, rng, device)
    if recipe.refit:
        logger.info("training again on all sections, %d passes", epochs)
        both = Material.joined(train, valid)
        train.features = valid.features = []
        begin(both)
        state, _ = _optimise(model, both, None, recipe, rng, device, epochs)
    model.load_state_dict(state)
    model.encoder.requires_grad_(True)
    return model.eval().to("cpu", memory_format=torch.contiguous_format)


def _optimise(
    model: PixNet,
    train: Material,
    valid: Material | None,
    recipe: Recipe,
    rng: torch.Generator,
    device: str,
    epochs: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Train; return the averaged weights of the pass that validated best, or of the last, and that pass's number."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    per_epoch = len(_batches(train, range(len(train.crops)), recipe.batch_shapes, recipe.batch_crops))
    steps = per_epoch * recipe.max_epochs
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(t / max(steps, 1), 1))))
    )
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    best, best_loss, best_epoch, step = averaged, math.inf, 0, 0
    label = "training" if valid is not None else "training on all"
    passes = recipe.max_epochs if epochs is None else epochs
    bar = tqdm(range(1, passes + 1), desc=label, unit="epoch", file=sys.stderr, disable=not _progress())
    for epoch in bar:
        losses = []
        order = torch.randperm(len(train.crops), generator=rng).tolist()
        for number, chosen in enumerate(_batches(train, order, recipe.batch_shapes, recipe.batch_crops)):
            batch = _collate(train, chosen, device)
            losses.append(
                _step(
                    model, train, batch, recipe, rng, device, optimiser, trained, f"epoch {epoch}, batch {number + 1}"
                )
            )
            schedule.step()
            step += 1
            decay = min(recipe.ema, step / (step + 9))
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    averaged[key].lerp_(value, 1 - decay)
        row = {"epoch": epoch, "lr": optimiser.param_groups[0]["lr"]}
        row |= {f"train_{k}": float(np.mean([loss[k] for loss in losses])) for k in losses[0]}
        if valid is None:
            bar.set_postfix(loss=f"{row['train_expression']:.3f}")
            continue
        current = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(averaged)
        scores = evaluate_material(model, valid, recipe, device)
        model.load_state_dict(current)
        row |= {f"val_{k}": v for k, v in scores.items()}
        model.history.append(row)
        bar.set_postfix(
            loss=f"{row['train_expression']:.3f}", val=f"{row['val_expression']:.3f}", pcc=f"{row['val_pcc']:.3f}"
        )
        criterion = scores["expression"] + recipe.total_weight * scores["total"]
        if criterion < best_loss - 1e-4 or not best_epoch:
            best, best_loss, best_epoch = {k: v.clone() for k, v in averaged.items()}, criterion, epoch
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
        found = _losses(batch, _sums(model, batch, features, member), recipe.loss)
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
        pixels = torch.stack([material.pixels(material.crops[i], model.halo) for i in batch.crops]).to(device)
        how = int(torch.randint(8, (1,), generator=rng))
        raw = _encode(model, pixels, model.halo, how, recipe.stain, rng)
    else:
        variant = torch.randint(len(material.features), (len(batch.crops),), generator=rng).tolist()
        raw = [
            torch.stack([material.features[v][level][i] for v, i in zip(variant, batch.crops)]).to(
                device, memory_format=torch.channels_last
            )
            for level in range(len(material.features[0]))
        ]
    features = _standardised(model, raw)
    if recipe.dropout > 0:
        for level in model.levels:
            f = features[level]
            keep = torch.rand(f.shape[:2], generator=rng).to(f.device) >= recipe.dropout
            features[level] = f * (keep / (1 - recipe.dropout))[:, :, None, None]
    return features


@torch.no_grad()
def evaluate_material(model: PixNet, material: Material, recipe: Recipe, device: str) -> dict[str, float]:
    """Return the losses over all shapes of each section at once, averaged over sections and elements."""
    model.eval()
    found: dict[tuple[int, str], list[tuple[Tensor, ...]]] = {}
    for index in range(len(material.sections)):
        own = [i for i, crop in enumerate(material.crops) if crop.section == index]
        for chosen in _batches(material, own, 10**9, recipe.batch_crops) if own else []:
            batch = _collate(material, chosen, device)
            if recipe.tune_encoder:
                pixels = torch.stack([material.pixels(material.crops[i], model.halo) for i in chosen]).to(device)
                raw = _encode(model, pixels, model.halo, 0, 0.0, torch.Generator())
            else:
                raw = [level[chosen].to(device, memory_format=torch.channels_last) for level in material.features[0]]
            for name, sums in _sums(model, batch, _standardised(model, raw)).items():
                covered = torch.sparse.sum(batch.weights[name], dim=1).to_dense()
                found.setdefault((index, name), []).append((sums, covered, batch.cp10k[name], batch.depth[name]))
    losses = [shape_loss(*(torch.cat(part) for part in zip(*parts)), recipe.loss) for parts in found.values()]
    return {key: float(torch.stack([loss[key] for loss in losses]).mean()) for key in losses[0]}


def _report(train: Material, valid: Material) -> None:
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


def _progress() -> bool:
    from pixnet._settings import settings

    return settings.progress


def _autocast(device: torch.device) -> torch.autocast:
    """Run encoder and decoder in the arithmetic that prediction takes by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(None, device) == "bfloat16")
