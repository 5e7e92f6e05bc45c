"""Features of crops: computed once for a slide in several versions, or anew at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pixnet._core.malloc import memory_kept
from pixnet._core.predict.device import resolve_precision
from pixnet._core.predict.map_grid import Box
from pixnet._core.train.augment import Version, jitter, turn, turn_back
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.feature_store import Wanted, slide_features
from pixnet.models._pixnet import PixNet

CROP_HALO = 192
"""Model pixels seen around a crop in training, at most. Prediction looks further, to make its windows fit at their seams."""

ADAPTED_CROPS = 512
"""Crops at most, drawn from those of all sections, that `adapt_norms` looks at."""


def crop_halo(model: PixNet) -> int:
    """Return the number of model pixels to see around a crop."""
    return min(model.halo, CROP_HALO // model.config.zoom)


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


@memory_kept()
@torch.no_grad()
def adapt_norms(model: PixNet, dataset: CropDataset, rng: torch.Generator, device: str) -> None:
    """Give the encoder's batch norms the statistics of the training tissue, in place; an encoder without any stays as it is.

    Encoders come with the statistics of the images that they were trained on: others than those of stained tissue, and
    of tissue seen enlarged. No measurement is looked at. (AdaBN: Li et al., arXiv 1603.04779.)
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


def with_features(
    datasets: Sequence[CropDataset], model: PixNet, versions: Sequence[int], stain: float, device: str
) -> list[CropDataset]:
    """Return data sets with the features of their crops on disk, each in a number of versions; the first is the slide as is.

    Raises
    ------
    OSError
        If the disk does not hold them.
    """
    model.eval()
    wanted, out = [], []
    for dataset, n in zip(datasets, versions):
        numbered = Version.numbered(n, stain)
        out.append(replace(dataset, versions=numbered))
        for index, section in enumerate(dataset.sections):
            boxes = [dataset.box(i) for i, crop in enumerate(dataset.crops) if crop.section == index]
            wanted.append(Wanted(section.reader, boxes, numbered))
    window, block = model.window, getattr(model.encoder, "block", None)
    # Blocks that an encoder sees by themselves need no halo where windows are made of whole ones.
    halo = 0 if block and window % block == 0 else crop_halo(model)
    found = iter(slide_features(wanted, model.encoder, model.levels, window=window, halo=halo, device=device))
    return [replace(dataset, features=[next(found) for _ in dataset.sections]) for dataset in out]


def set_feature_statistics(model: PixNet, dataset: CropDataset) -> None:
    """Give the model mean and standard deviation of each feature over the crops."""
    for level in model.levels:
        n, total, squares = 0, np.zeros(1), np.zeros(1)
        for i, crop in enumerate(dataset.crops):
            slide = Box(0, 0, *dataset.sections[crop.section].grid.shape)
            flat = dataset.maps(i).read(level, dataset.box(i).clipped(slide)).astype(np.float32)
            flat = flat.reshape(-1, flat.shape[-1])
            n, total = n + len(flat), total + flat.sum(axis=0, dtype=np.float64)
            squares = squares + np.einsum("nc,nc->c", flat, flat, dtype=np.float64)
            dataset.maps(i).forget()
        mean = total / n
        sd = np.sqrt(np.maximum(squares / n - mean**2, 0)).clip(1e-3)
        getattr(model, f"feature_mean_{level}").copy_(torch.from_numpy(mean))
        getattr(model, f"feature_sd_{level}").copy_(torch.from_numpy(sd))


def autocast(device: torch.device) -> torch.autocast:
    """Run encoder and decoder in the arithmetic that prediction takes by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(None, device) == "bfloat16")
