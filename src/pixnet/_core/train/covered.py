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
from pixnet._core.train.features import crop_halo, encode_crops
from pixnet.models._decoder import StackDecoder
from pixnet.models._pixnet import PixNet

Features = Mapping[int, Tensor]
"""Standardised features by level: of covered pixels ``(pixels, C)``, or of whole crops ``(crops, C, h, w)``."""


def read_features(
    model: PixNet, dataset: CropDataset, batch: Batch, versions: Sequence[int] | None = None
) -> dict[int, Tensor]:
    """Read the features that decoders need from disk, by level, as they came from the encoder; on the CPU.

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
    """
    versions = [0] * len(batch.crops) if versions is None else versions
    decoder, found = model.members[0].decoder, {}
    if not isinstance(decoder, StackDecoder):
        crops = [dataset.crop_features(i, model.levels, version) for i, version in zip(batch.crops, versions)]
        return {level: torch.stack(features) for level, features in zip(model.levels, zip(*crops))}
    n, pixel = dataset.size // model.stride, batch.pixel.cpu()
    y, x = pixel // n, pixel % n
    edges = torch.searchsorted(batch.crop_of_pixel.cpu(), torch.arange(len(batch.crops) + 1)).tolist()
    for level in model.levels:
        found[level], factors = torch.empty(len(y), model.encoder.channels[level]), decoder.enlargements(level)
        for index, version, start, stop in zip(batch.crops, versions, edges, edges[1:]):
            table = dataset.maps(index, version).read(level, dataset.box(index))
            found[level][start:stop] = _on_disk_at_pixels(table, y[start:stop], x[start:stop], factors)
    for maps in {dataset.maps(index, version) for index, version in zip(batch.crops, versions)}:
        maps.forget()
    return found


def at_covered(model: PixNet, batch: Batch, raw: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return what decoders need of features of whole crops, ``(crops, C, h, w)`` for each level in use, by level."""
    decoder, found = model.members[0].decoder, {}
    if not isinstance(decoder, StackDecoder):
        return dict(zip(model.levels, raw))
    for level, feature in zip(model.levels, raw):
        factors, parts = decoder.enlargements(level), []
        across = feature.shape[-1] * prod(factors)
        for k, one in enumerate(feature):
            pixel = batch.pixel[batch.crop_of_pixel == k]
            parts.append(at_pixels(one.permute(1, 2, 0), pixel // across, pixel % across, factors))
        found[level] = torch.cat(parts)
    return found


def standardised(
    model: PixNet, batch: Batch, raw: Mapping[int, Tensor], keep: Mapping[int, Tensor] | None = None
) -> Features:
    """Return features of covered pixels or whole crops, standardised.

    ``keep`` has a factor for each channel in each crop, ``(crops, C)``, by level; None: 1.
    """
    out = {}
    for level, found in raw.items():
        mean, factor = getattr(model, f"feature_mean_{level}"), 1 / getattr(model, f"feature_sd_{level}")
        factor = factor[None] if keep is None else keep[level] * factor
        if found.ndim == 4:
            out[level] = (found.float() - mean[:, None, None]) * factor[..., None, None]
        else:
            factor = factor if len(factor) == 1 else factor[batch.crop_of_pixel]
            out[level] = torch.addcmul(-mean * factor, found, factor)
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
        raw = read_features(model, dataset, batch)
        return standardised(model, batch, {level: f.to(batch.pixel.device) for level, f in raw.items()})
    halo = crop_halo(model)
    images = dataset.images(batch.crops, halo).to(batch.pixel.device)
    return standardised(model, batch, at_covered(model, batch, encode_crops(model, images, halo)))
