"""Features of training tissue and of held-out tissue, from which a model knows what is new to it."""

from __future__ import annotations

import numpy as np
import torch

from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import crop_halo, encode_crops
from pixnet._logging import logger
from pixnet.models._novelty import LEAST, Novelty
from pixnet.models._pixnet import PixNet

PLACES = 20_000
"""Places at most whose features are looked at, of training and of held-out tissue each."""

VALUES = 5e7
"""Numbers at most that these features are."""


@torch.no_grad()
def fit_novelty(model: PixNet, training: CropDataset, held_out: CropDataset, device: str, seed: int) -> None:
    """Fit a model's novelty, with its encoder as it is now."""
    rng = np.random.default_rng(seed)
    known, unseen = (covered_features(model, dataset, device, rng) for dataset in (training, held_out))
    model.novelty.fit(known, unseen, seed)
    if not model.novelty.known:
        logger.info(
            "the model does not know what tissue is new to it: training and held-out shapes have %d and %d places, and %d of "
            "each are needed", len(known), len(unseen), LEAST,
        )  # fmt: skip


def covered_features(model: PixNet, dataset: CropDataset, device: str, rng: np.random.Generator) -> np.ndarray:
    """Return pooled features ``(n, C)`` of places that shapes cover, from crops drawn until there are enough."""
    model.eval()
    novelty: Novelty = model.novelty
    tuned = any(p.requires_grad for p in model.encoder.parameters())
    wanted = min(PLACES, int(VALUES / len(novelty.mean)))
    width, side = dataset.size // model.stride, novelty.stride // model.stride
    found: list[np.ndarray] = []
    n = 0
    for i in rng.permutation(len(dataset)).tolist():
        if tuned:
            halo = crop_halo(model)
            raw = encode_crops(model, dataset.images([i], halo).to(device), halo)
        else:
            raw = [f[None].to(device) for f in dataset.crop_features(i, model.levels)]
            dataset.maps(i).forget()
        pooled = novelty.pooled(dict(zip(model.levels, raw))).cpu().numpy()[0]
        y, x = np.divmod(dataset[i].pixels, width)
        covered = np.zeros(pooled.shape[:2], bool)
        covered[y // side, x // side] = True
        found.append(pooled[covered])
        n += len(found[-1])
        if n >= wanted:
            break
    return np.concatenate(found)[:wanted]
