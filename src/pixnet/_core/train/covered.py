"""Features of the pixels that shapes cover: the rest of a crop is not looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnet._core.train.batches import Batch
from pixnet._core.train.features import standardised
from pixnet.models._decoder import StackDecoder
from pixnet.models._pixnet import PixNet

Features = Mapping[int, Tensor]
"""Standardised features by level: of covered pixels ``(pixels, C)``, or of whole crops ``(crops, C, h, w)``."""


def covered_features(
    model: PixNet, batch: Batch, raw: Sequence[Tensor], keep: Mapping[int, Tensor] | None = None
) -> Features:
    """Return the features that decoders need: those of covered pixels where a decoder sees one pixel at a time.

    Parameters
    ----------
    model
        The model.
    batch
        The crops and their covered pixels.
    raw
        Maps of the encoder, for each level in use, ``(crops, C, h, w)``.
    keep
        Factor of each channel in each crop, ``(crops, C)``, by level; None: 1.
    """
    decoder = model.members[0].decoder
    if not isinstance(decoder, StackDecoder):
        features = standardised(model, raw)
        return features if keep is None else {level: f * keep[level][:, :, None, None] for level, f in features.items()}
    rows = {}
    for level, feature in zip(model.levels, raw):
        found = at_pixels(feature, batch, decoder.enlargements(level))
        found = (found - getattr(model, f"feature_mean_{level}")) / getattr(model, f"feature_sd_{level}")
        rows[level] = found if keep is None else found * keep[level][batch.crop_of_pixel]
    return rows


def at_pixels(feature: Tensor, batch: Batch, factors: tuple[int, ...]) -> Tensor:
    """Return a map enlarged by some factors, one after the other, at the covered pixels alone, ``(pixels, C)`` float32."""
    n, channels, height, width = feature.shape
    across = width
    for factor in factors:
        across *= factor
    rows_at, rows_weight = (t.to(feature.device)[batch.pixel // across] for t in interpolation(height, factors))
    columns_at, columns_weight = (t.to(feature.device)[batch.pixel % across] for t in interpolation(width, factors))
    first = batch.crop_of_pixel * (height * width)
    index = first[:, None, None] + rows_at[:, :, None] * width + columns_at[:, None, :]
    weight = rows_weight[:, :, None] * columns_weight[:, None, :]
    table = feature.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    if index.shape[1:] == (1, 1):
        return table[index[:, 0, 0]].float()
    table = table.float()
    return F.embedding_bag(index.flatten(1), table, per_sample_weights=weight.flatten(1), mode="sum")


@lru_cache(maxsize=64)
def interpolation(size: int, factors: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return which positions of an axis, and with which weights, make up each position once it is enlarged.

    Bilinear interpolation, one factor after the other, as decoders enlarge maps.
    """
    matrix = torch.eye(size)[None]  # one channel for each position
    for factor in factors:
        if factor > 1:
            matrix = F.interpolate(matrix, scale_factor=factor, mode="linear", align_corners=False)
    matrix = matrix[0].T
    n = int((matrix > 0).sum(dim=1).max())
    weights, positions = matrix.topk(n, dim=1)
    return positions, weights
