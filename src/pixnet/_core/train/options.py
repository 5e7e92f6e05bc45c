"""How to train: every number of it in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pixnet.models._losses import LOSSES


@dataclass(frozen=True)
class TrainingOptions:
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
        Decay per step of the running average of the weights, which is what is validated and kept; 0: no average.
    adapt_norms
        Give the batch norms of an encoder that no training has met yet the statistics of the training tissue (AdaBN). None: where
        the model enlarges images (``zoom``). It gained there and lost a little elsewhere.
    tune_encoder
        Train the encoder too; features are then computed anew at every step.
    refit
        Once validation has told how many passes to make, train again from the start on training and validation together, with
        a rate that falls to zero over these passes.

    Raises
    ------
    ValueError
        If a number is out of range or there is no such loss.
    """

    max_epochs: int = 30
    patience: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-2
    loss: str = "mse+pcc"
    total_weight: float = 0.2
    batch_shapes: int = 48
    batch_crops: int = 32
    variants: int = 2
    stain: float = 0.15
    dropout: float = 0.4
    ema: float = 0.98
    adapt_norms: bool | None = None
    tune_encoder: bool = False
    refit: bool = True

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; valid: {', '.join(map(repr, LOSSES))}")
        for name in ("max_epochs", "patience", "batch_shapes", "batch_crops", "variants"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; a positive whole number is needed")
        for name, top in (("lr", None), ("weight_decay", None), ("total_weight", None), ("stain", None), ("dropout", 1), ("ema", 1)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, str) or not value >= 0 or (top is not None and value >= top):
                raise ValueError(
                    f"{name} is {value!r}; a number from 0{'' if top is None else f' to below {top}'} is needed"
                )
        if self.lr == 0:
            raise ValueError("lr is 0: nothing would be learned")

    @classmethod
    def of(cls, defaults: dict[str, Any], given: dict[str, Any]) -> TrainingOptions:
        """Return a recipe of what is given, else of a model's own defaults, else of the package's.

        Parameters
        ----------
        defaults
            ``config["recipe"]`` of a model; settings that this version does not know are ignored.
        given
            Settings that override them; None stands for not given.
        """
        known = {f.name for f in fields(cls)}
        own = {k: v for k, v in defaults.items() if k in known}
        return cls(**(own | {k: v for k, v in given.items() if v is not None}))
