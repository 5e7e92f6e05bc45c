"""Features of the pixels that shapes cover: the rest of a crop is not looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixnet._core.train.batches import Batch
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import crop_halo, encode_crops, standardised
from pixnet.models._decoder import StackDecoder
from pixnet.models._pixnet import PixNet

Features = Mapping[int, Tensor]
"""Standardised features by level: of covered pixels ``(pixels, C)``, or of whole crops ``(crops, C, h, w)``."""


def stored_features(
    model: PixNet,
    dataset: CropDataset,
    batch: Batch,
    versions: Sequence[int] | None = None,
    keep: Mapping[int, Tensor] | None = None,
) -> Features:
    """Return the features that decoders need, from disk; see `covered_features`.

    Parameters
    ----------
    model
        The model.
    dataset
        Crops whose features were computed.
    batch
        The crops of a batch and their covered pixels.
    versions
        Version of each crop; None: the slide as it is.
    keep
        Factor of each channel in each crop, ``(crops, C)``, by level; None: 1.
    """
    versions = [0] * len(batch.crops) if versions is None else versions
    device, decoder = batch.pixel.device, model.members[0].decoder
    if not isinstance(decoder, StackDecoder):
        crops = [dataset.crop_features(i, model.levels, version) for i, version in zip(batch.crops, versions)]
        raw = [torch.stack(level).to(device) for level in zip(*crops)]
        return covered_features(model, batch, raw, keep)
    n = dataset.size // model.stride
    y, x = (batch.pixel // n).cpu(), (batch.pixel % n).cpu()
    edges = torch.searchsorted(batch.crop_of_pixel.cpu(), torch.arange(len(batch.crops) + 1)).tolist()
    rows = {}
    for level in model.levels:
        found = torch.empty(len(y), model.encoder.channels[level])
        factors = decoder.enlargements(level)
        for index, version, start, stop in zip(batch.crops, versions, edges, edges[1:]):
            table = dataset.maps(index, version).read(level, dataset.box(index))
            found[start:stop] = _on_disk_at_pixels(table, y[start:stop], x[start:stop], factors)
        rows[level] = found.to(device, non_blocking=True)
    for index, version in zip(batch.crops, versions):
        dataset.maps(index, version).forget()
    return _standardised_rows(model, batch, rows, keep)


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
        factors, parts = decoder.enlargements(level), []
        across = feature.shape[-1] * prod(factors)
        for k, one in enumerate(feature):
            pixel = batch.pixel[batch.crop_of_pixel == k]
            parts.append(at_pixels(one.permute(1, 2, 0), pixel // across, pixel % across, factors))
        rows[level] = torch.cat(parts)
    return _standardised_rows(model, batch, rows, keep)


def _standardised_rows(
    model: PixNet, batch: Batch, rows: Mapping[int, Tensor], keep: Mapping[int, Tensor] | None
) -> Features:
    out = {}
    for level, found in rows.items():
        mean, sd = getattr(model, f"feature_mean_{level}"), getattr(model, f"feature_sd_{level}")
        if keep is None:
            out[level] = (found - mean) / sd
        else:
            out[level] = (found - mean) * (keep[level] / sd)[batch.crop_of_pixel]
    return out


def _on_disk_at_pixels(table: np.ndarray, y: Tensor, x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Do as `at_pixels`; of a map that is not enlarged, the pixels alone are read."""
    if prod(factors) == 1:
        return torch.from_numpy(table[y.numpy(), x.numpy()].astype(np.float32))
    return at_pixels(torch.from_numpy(table.astype(np.float32)), y, x, factors)


def at_pixels(table: Tensor, y: Tensor, x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Return a map ``(h, w, C)`` enlarged by some factors, one after the other, at some pixels alone, ``(n, C)`` float32."""
    height, width, channels = table.shape
    if prod(factors) == 1:
        return table[y, x].float()
    rows_at, rows_weight = (t.to(table.device)[y] for t in interpolation(height, factors))
    columns_at, columns_weight = (t.to(table.device)[x] for t in interpolation(width, factors))
    index = rows_at[:, :, None] * width + columns_at[:, None, :]
    weight = rows_weight[:, :, None] * columns_weight[:, None, :]
    flat = table.reshape(height * width, channels).float()
    return F.embedding_bag(index.flatten(1), flat, per_sample_weights=weight.flatten(1), mode="sum")


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


def batch_features(model: PixNet, dataset: CropDataset, batch: Batch, tuned: bool) -> Features:
    """Return the features of a batch as its slides are: from disk, or anew where the encoder is tuned."""
    if not tuned:
        return stored_features(model, dataset, batch)
    halo = crop_halo(model)
    images = dataset.images(batch.crops, halo).to(batch.pixel.device)
    return covered_features(model, batch, encode_crops(model, images, halo))
