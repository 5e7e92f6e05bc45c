"""One run of training: passes over crops, and the averaged weights that validated best."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pixnet._core.malloc import memory_kept
from pixnet._core.parallel import in_threads
from pixnet._core.train.batches import TRAINED_PX, Batch, SectionBatchSampler, collate
from pixnet._core.train.covered import Features, at_covered, read_features, standardised
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import crop_halo, encode_crops
from pixnet._core.train.objective import Objective, shape_sums
from pixnet._settings import settings
from pixnet.models._pixnet import PixNet

State = dict[str, Tensor]
Row = dict[str, float]

LOADINGS_RATE = 5.0
"""Learning rate of loadings over that of the rest. More fits a thousand spots of one slide better, and another patient worse."""

READERS = 2
"""Threads that read features ahead of a GPU."""

LEAST_PROGRESS = 1e-4
"""A pass validates better than those before by at least this much."""


def learning_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: it rises over a tenth of the steps, then falls along a cosine."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))))


def changing(model: PixNet) -> State:
    """Return the live tensors that training changes: a frozen encoder, often most of a model, is left out."""
    tuned = any(p.requires_grad for p in model.encoder.parameters())
    return {k: v for k, v in model.state_dict().items() if tuned or not k.startswith("encoder.")}


def snapshot(model: PixNet) -> State:
    """Return the whole state; tensors that training changes are copied, the others are shared."""
    return model.state_dict() | {k: v.detach().clone() for k, v in changing(model).items()}


def passes_as_far(epochs: int, most: int) -> int:
    """Return the number of passes, with a rate that falls to zero, that learn as much as the first of a longer run.

    Learning is measured by the sum of the rate: ``epochs`` of ``most`` are cut off while the rate is high, and as many
    with a rate that falls to zero would be about half of it.
    """

    def learned(passes: int, of: int) -> float:
        return sum(learning_rate(step, 100 * of) for step in range(100 * passes))

    return min(range(epochs, most + 1), key=lambda n: abs(learned(n, n) - learned(epochs, most)))


class WeightAverage:
    """Running average of a model's weights; early steps count for more, so that it leaves the start behind."""

    def __init__(self, model: PixNet, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.state = snapshot(model)
        self._live = {k: v for k, v in changing(model).items() if v.is_floating_point()}

    def update(self) -> None:
        """Take the weights of a step in."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_([self.state[k] for k in self._live], list(self._live.values()), 1 - decay)

    def copy(self) -> State:
        """Return the averaged state as it is now."""
        return self.state | {k: self.state[k].clone() for k in changing(self.model)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        current = snapshot(self.model)
        self.model.load_state_dict(self.state)
        try:
            yield
        finally:
            self.model.load_state_dict(current)


class Drawn(NamedTuple):
    """A batch with what was drawn for it: version of each crop, and the factor of each channel in each crop, by level.

    ``raw`` are its features, once they were read.
    """

    batch: Batch
    versions: list[int]
    keep: dict[int, Tensor] | None
    raw: dict[int, Tensor]


class Trainer:
    """One run of training.

    Parameters
    ----------
    model
        The model, trained in place.
    train, valid
        Crops with features; without ``valid`` all passes are made, and the weights of the last are returned.
    objective
        The losses, and the settings of training.
    rng
        Source of randomness.
    device
        Torch device.
    epochs
        Number of passes; None: the most that the options allow.
    on_epoch
        Called after each pass with its row: ``epoch``, ``lr``, ``train_*`` and, where it was validated, ``val_*``.

    Attributes
    ----------
    keep
        Called after each pass with `state`, from which `restore` goes on.
    """

    def __init__(
        self,
        model: PixNet,
        train: CropDataset,
        valid: CropDataset | None,
        objective: Objective,
        *,
        rng: torch.Generator,
        device: str,
        epochs: int | None = None,
        on_epoch: Callable[[Row], None] | None = None,
    ) -> None:
        self.model, self.train, self.valid, self.objective = model, train, valid, objective
        self.options = options = objective.options
        self.rng, self.device, self.on_epoch = rng, device, on_epoch
        self.keep: Callable[[dict[str, Any]], None] | None = None
        self.epochs = options.max_epochs if epochs is None else epochs
        self.sampler = SectionBatchSampler(train, options.batch_shapes, options.batch_crops, rng)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # Loadings are logits: decay would pull all genes to one share, and at the rate of the rest they would hardly
        # move.
        loadings = [p for p in model.head.parameters() if p.requires_grad]
        others = [p for p in self.trained if not any(p is other for other in loadings)]
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": loadings, "weight_decay": 0.0, "lr": options.lr * LOADINGS_RATE},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
        steps = len(self.sampler) * self.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: learning_rate(step, steps))
        self.average = WeightAverage(model, options.ema)
        self.epoch, self.least, self.chosen, self.best = 0, math.inf, 0, self.average.state

    @property
    def done(self) -> bool:
        """Whether all passes were made, or validation stopped improving."""
        waited = self.epoch - self.chosen if self.valid is not None and self.chosen else 0
        return self.epoch >= self.epochs or waited >= self.options.patience

    @memory_kept()
    def run(self) -> tuple[State, int]:
        """Train; return the averaged weights of the pass that validated best, or of the last, and that pass's number.

        Raises
        ------
        FloatingPointError
            If a loss is NaN or infinite; the pass and the batch are named.
        """
        label = "training on all" if self.valid is None else "training"
        shown_on = {"file": sys.stderr, "disable": not settings.progress}
        with tqdm(total=self.epochs, initial=self.epoch, desc=label, unit="epoch", **shown_on) as bar:
            while not self.done:
                row = self._epoch(self.epoch + 1)
                self._judge(row)
                shown = {"loss": f"{row['train_expression']:.3f}"}
                if self.valid is not None:
                    shown |= {"val": f"{row['val_expression']:.3f}", "pcc": f"{row['val_pcc']:.3f}"}
                    shown["best"] = str(self.chosen)
                bar.set_postfix(shown)
                bar.update()
                if self.on_epoch is not None:
                    self.on_epoch(row)
                if self.keep is not None:
                    self.keep(self.state())
        return self.best, self.chosen

    def state(self) -> dict[str, Any]:
        """Return all that the next passes depend on."""
        names = list(changing(self.model))
        return {
            "epoch": self.epoch,
            "least": self.least,
            "chosen": self.chosen,
            "model": changing(self.model),
            "average": {name: self.average.state[name] for name in names},
            "steps": self.average.steps,
            "best": {name: self.best[name] for name in names},
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.get_state(),
            "torch_rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self.least, self.chosen = state["epoch"], state["least"], state["chosen"]
        for name, tensor in changing(self.model).items():
            tensor.copy_(state["model"][name])
            self.average.state[name].copy_(state["average"][name])
        self.average.steps = state["steps"]
        if self.valid is not None:
            self.best = self.average.state | {k: v.to(self.device) for k, v in state["best"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])

    def _judge(self, row: Row) -> None:
        """Count a pass, and take its weights if it validated best."""
        epoch = int(row["epoch"])
        if self.valid is None:
            self.epoch = self.chosen = epoch
            return
        criterion = row["val_expression"] + self.options.total_weight * row["val_total"]
        if not math.isfinite(criterion):
            raise FloatingPointError(
                f"the validation loss is {criterion} after epoch {epoch}; training stopped. Lower the learning rate "
                "(lr=) or look for shapes with extreme counts in the validation sections"
            )
        self.epoch = epoch
        if criterion < self.least - LEAST_PROGRESS or not self.chosen:
            self.best, self.least, self.chosen = self.average.copy(), criterion, epoch

    def _epoch(self, epoch: int) -> Row:
        """Make one pass and return its row."""
        losses = []
        for number, drawn in enumerate(self._drawn(), start=1):
            losses.append(self._step(drawn, f"epoch {epoch}, batch {number}"))
            self.schedule.step()
            self.average.update()
        row: Row = {"epoch": epoch, "lr": self.optimiser.param_groups[0]["lr"]}
        row |= {f"train_{key}": float(np.mean([loss[key] for loss in losses])) for key in losses[0]}
        if self.valid is not None:
            with self.average.applied():
                scores = self.objective.evaluate(self.model, self.valid, self.device)
            row |= {f"val_{key}": value for key, value in scores.items()}
        return row

    def _drawn(self) -> Iterator[Drawn]:
        """Yield the batches of a pass; for a GPU they are read ahead. What is random is drawn in their order either way."""
        drawn = (self._draw(indices) for indices in self.sampler)
        if torch.device(self.device).type != "cuda" or self.options.tune_encoder:
            yield from map(self._read, drawn)
            return
        with closing(in_threads(self._read, drawn, READERS)) as read:
            yield from read

    def _draw(self, indices: list[int]) -> Drawn:
        """Draw pixels, a version of each crop, and channels to drop."""
        model, options, rng = self.model, self.options, self.rng
        batch = collate(self.train, indices, TRAINED_PX, rng)
        versions = torch.randint(len(self.train.versions), (len(indices),), generator=rng).tolist()
        if options.dropout == 0:
            return Drawn(batch, versions, None, {})
        shapes = {level: (len(indices), model.encoder.channels[level]) for level in model.levels}
        kept = {level: torch.rand(shape, generator=rng) >= options.dropout for level, shape in shapes.items()}
        return Drawn(batch, versions, {level: k / (1 - options.dropout) for level, k in kept.items()}, {})

    def _read(self, drawn: Drawn) -> Drawn:
        """Read the features of a batch, unless the encoder is tuned."""
        if self.options.tune_encoder:
            return drawn
        raw = read_features(self.model, self.train, drawn.batch, drawn.versions)
        if torch.device(self.device).type == "cuda":
            raw = {level: f.pin_memory() for level, f in raw.items()}
        return drawn._replace(raw=raw)

    def _step(self, drawn: Drawn, where: str) -> dict[str, float]:
        """Take one step on one batch and return its losses."""
        model = self.model
        model.train()
        model.encoder.eval()  # batch norm keeps its statistics, tuned or not
        batch = drawn.batch.to(self.device)
        features = self._features(batch, drawn)
        # Each member learns by itself: their mean then gains from their differences.
        members = [
            self.objective.losses(model, self.train, batch.section, shape_sums(model, batch, features, member))
            for member in range(len(model.members))
        ]
        loss = torch.stack([self.objective.total(found) for found in members]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} in {where} (section {self.train.sections[batch.section].name}); training "
                "stopped. Lower the learning rate (lr=) or look for shapes with extreme counts there"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        return {key: float(sum(found[key].detach() for found in members)) / len(members) for key in members[0]}

    def _features(self, batch: Batch, drawn: Drawn) -> Features:
        """Return the features of a batch with channels dropped; where the encoder is tuned, of a version drawn now."""
        keep = None if drawn.keep is None else {level: k.to(self.device) for level, k in drawn.keep.items()}
        if self.options.tune_encoder:
            model, rng, halo = self.model, self.rng, crop_halo(self.model)
            images = self.train.images(batch.crops, halo).to(self.device)
            raw = encode_crops(model, images, halo, int(torch.randint(8, (1,), generator=rng)), self.options.stain, rng)
            return standardised(model, batch, at_covered(model, batch, raw), keep)
        there = {level: f.to(self.device, non_blocking=True) for level, f in drawn.raw.items()}
        return standardised(self.model, batch, there, keep)
