"""The work: train, predict, aggregate, evaluate."""

from __future__ import annotations

from pixnet._core.train.options import TrainingOptions
from pixnet.tl._aggregate import aggregate
from pixnet.tl._cross_validate import cross_validate
from pixnet.tl._evaluate import evaluate
from pixnet.tl._gene_channels import gene_channels
from pixnet.tl._predict import predict
from pixnet.tl._train import train

__all__ = ["TrainingOptions", "aggregate", "cross_validate", "evaluate", "gene_channels", "predict", "train"]
