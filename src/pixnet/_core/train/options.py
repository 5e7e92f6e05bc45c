"""The settings of training: the only place that declares their names, types, defaults and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from pixnet._checked import checked

Loss = Literal["mse+pcc", "nb+pcc"]
GeneWeights = Literal["signal", "equal"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Nonnegative = Annotated[float, Field(ge=0)]


@checked
class TrainingOptions:
    """Settings of `pixnet.tl.train`; the defaults are those that the benchmarks chose.

    Parameters
    ----------
    max_epochs
        Largest number of passes over the shapes.
    patience
        Passes without progress on validation after which training stops.
    lr
        Learning rate of AdamW; it rises over a tenth of the steps and then falls along a cosine.
    weight_decay
        Weight decay of AdamW.
    loss
        ``"mse+pcc"``: mean squared error on log1p of CP10k plus ``0.5 (1 - PCC)``, PCC per gene over the shapes of a
        batch (PixNet). ``"nb+pcc"``: half the negative binomial deviance of the raw counts in place of the error, with
        each gene's dispersion taken from the training shapes, so that shapes of few transcripts weigh less.
    gene_weights
        ``"signal"``: genes weigh in the loss of expression by the share of their variance that is not counting noise.
        ``"equal"``: all genes weigh the same. None: ``"signal"`` for a model of programs, which is trained on thousands
        of genes, else ``"equal"``.
    total_weight
        Weight of the loss of totals, the squared error of the log depth.
    batch_shapes
        Least number of shapes in a batch, over which Pearson's correlation is taken.
    batch_crops
        Largest number of crops in a batch.
    variants
        Flipped, turned and restained versions of each crop whose features are kept.
    stain
        Strength with which versions are restained.
    dropout
        Share of the feature channels that are dropped in training.
    ema
        Decay per step of the running average of the weights, which is what is validated and kept; 0: no average.
    adapt_norms
        Give the batch norms of an encoder that was never trained on tissue the statistics of the training tissue
        (AdaBN). None: where the model enlarges images (``zoom``), since it gained there and lost a little elsewhere.
    tune_encoder
        Train the encoder too; features are then computed anew at every step.
    refit
        Once validation has told the number of passes, train again from the start on training and validation sections
        together, with a rate that falls to zero over these passes. A model of programs makes as many passes as make the
        sum of the rate what it was up to the best pass (13 for pass 8 of 30).

    Raises
    ------
    TypeError
        If there is no such setting.
    ValueError
        If a value is of the wrong type or out of range; its name is given.

    Examples
    --------
    >>> import pixnet as px
    >>> options = px.tl.TrainingOptions(lr=1e-3, refit=False)
    >>> options.lr, options.max_epochs
    (0.001, 30)
    """

    max_epochs: Count = 30
    patience: Count = 8
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Nonnegative = 1e-2
    loss: Loss = "mse+pcc"
    gene_weights: GeneWeights | None = None
    total_weight: Nonnegative = 0.2
    batch_shapes: Count = 48
    batch_crops: Count = 32
    variants: Count = 2
    stain: Nonnegative = 0.15
    dropout: Share = 0.4
    ema: Share = 0.98
    adapt_norms: bool | None = None
    tune_encoder: bool = False
    refit: bool = True


def resolve_options(
    own: Mapping[str, Any], options: TrainingOptions | Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[TrainingOptions, dict[str, Any]]:
    """Return the options in force and, of them, those that come from the model.

    Single settings that are given come first, then ``options``, then the model's ``own``, then the defaults. Settings
    of the model's own that this version does not know are ignored, since a later version may have written them.
    """
    if isinstance(options, TrainingOptions):
        return replace(options, **given), {}
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options is {options!r}; TrainingOptions, a mapping or None is needed")
    known = {field.name for field in fields(TrainingOptions)}
    asked = {**(options or {}), **given}
    from_model = {name: value for name, value in own.items() if name in known and name not in asked}
    return TrainingOptions(**{**from_model, **asked}), from_model


def as_dict(options: TrainingOptions) -> dict[str, Any]:
    """Return the options as plain values."""
    return asdict(options)
