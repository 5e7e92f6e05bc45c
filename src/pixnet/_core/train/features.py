"""Features of crops: computed once in several versions, or anew at every step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from pixnet._core.predict.device import resolve_precision
from pixnet._core.train.augment import jitter
from pixnet._core.train.dataset import CropDataset
from pixnet._settings import settings
from pixnet.models._pixnet import PixNet

CROP_HALO = 192
"""Model pixels seen around a crop in training, at most. Prediction looks further, to make its windows fit at their seams."""

ADAPTED_CROPS = 512
"""Crops at most, drawn from those of all sections, that `adapt_norms` looks at."""


def crop_halo(model: PixNet) -> int:
    """Return the number of model pixels to see around a crop."""
    return min(model.halo, CROP_HALO // model.config.zoom)


def turn(x: Tensor, symmetry: int) -> Tensor:
    """Apply one of the eight symmetries of the square to ``(..., H, W)``."""
    if symmetry >= 4:
        x = x.flip(-1)
    return torch.rot90(x, symmetry % 4, (-2, -1))


def turn_back(x: Tensor, symmetry: int) -> Tensor:
    """Undo `turn`."""
    x = torch.rot90(x, -(symmetry % 4), (-2, -1))
    return x.flip(-1) if symmetry >= 4 else x


def encode_crops(
    model: PixNet,
    images: Tensor,
    halo: int,
    symmetry: int = 0,
    stain: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[Tensor]:
    """Return raw features of the levels in use, of crops without their halo, seen turned and restained, turned back."""
    image = images.float() / 255
    if stain > 0:
        image = jitter(image, stain, rng)
    image = turn(image, symmetry).contiguous(memory_format=torch.channels_last)
    with autocast(image.device):
        raw = model.encoder(image)
    features = []
    for level in model.levels:
        stride, feature = model.encoder.strides[level], turn_back(raw[level], symmetry)
        inner = slice(halo // stride, feature.shape[-1] - halo // stride)
        features.append(feature[..., inner, inner].contiguous(memory_format=torch.channels_last))
    return features


@torch.no_grad()
def adapt_norms(model: PixNet, dataset: CropDataset, rng: torch.Generator, device: str) -> None:
    """Give the encoder's batch norms the statistics of the training tissue, in place; an encoder without any stays as it is.

    Encoders come with the statistics of the images that they were trained on: others than those of stained tissue, and of
    tissue seen enlarged. No measurement is looked at. (AdaBN: Li et al., arXiv 1603.04779.)
    """
    norms = [m for m in model.encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    model.eval()
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    chosen = torch.randperm(len(dataset), generator=rng)[:ADAPTED_CROPS].tolist()
    for start in range(0, len(chosen), 8):
        images = dataset.images(chosen[start : start + 8], 0)
        with autocast(torch.device(device)):
            model.encoder((images.to(device).float() / 255).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def with_features(
    dataset: CropDataset,
    model: PixNet,
    variants: int,
    stain: float,
    rng: torch.Generator,
    device: str,
    label: str = "features",
) -> CropDataset:
    """Return the data set with the features of its crops in each variant; the first is the crop as it is."""
    model.eval()
    halo = crop_halo(model)
    found: list[list[Tensor]] = []
    symmetries = [0, *torch.randperm(7, generator=rng).add(1).tolist()]
    bar = tqdm(total=variants * len(dataset), desc=label, unit="crop", file=sys.stderr, disable=not settings.progress)
    with bar:
        for variant in range(variants):
            parts: list[list[Tensor]] = []
            for start in range(0, len(dataset), 4):
                images = dataset.images(range(start, min(start + 4, len(dataset))), halo)
                strength = stain if variant else 0.0
                features = encode_crops(model, images.to(device), halo, symmetries[variant % 8], strength, rng)
                parts.append([f.to("cpu", torch.float16) for f in features])
                bar.update(len(images))
            found.append([torch.cat(level).contiguous(memory_format=torch.channels_last) for level in zip(*parts)])
    return replace(dataset, features=found)


def set_feature_statistics(model: PixNet, dataset: CropDataset) -> None:
    """Give the model mean and standard deviation of each feature over the crops."""
    for i, level in zip(model.levels, dataset.features[0]):
        flat = level.float().transpose(0, 1).flatten(1)
        getattr(model, f"feature_mean_{i}").copy_(flat.mean(dim=1))
        getattr(model, f"feature_sd_{i}").copy_(flat.std(dim=1).clamp(min=1e-3))


def standardised(model: PixNet, features: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return features of the levels in use, standardised, by level."""
    return model.standardise({level: feature.float() for level, feature in zip(model.levels, features)})


def autocast(device: torch.device) -> torch.autocast:
    """Run encoder and decoder in the arithmetic that prediction takes by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(None, device) == "bfloat16")
