"""Variation of the stain in training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Optical density of haematoxylin, eosin and a residual (DAB's place) in R, G, B: Ruifrok & Johnston 2001.
_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED /= np.linalg.norm(_HED, axis=1, keepdims=True)
_TO_HED = np.linalg.inv(_HED)


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Vary the stain of each image: amounts of haematoxylin and eosin and their background, in HED space.

    Parameters
    ----------
    image
        RGB in 0 to 1, ``(N, 3, H, W)``.
    strength
        Standard deviation of the factors; the shifts have a tenth of it.
    generator
        Source of randomness.

    Returns
    -------
    Tensor
        RGB in 0 to 1.
    """
    n = image.shape[0]
    to_hed = torch.as_tensor(_TO_HED, dtype=image.dtype, device=image.device)
    to_rgb = torch.as_tensor(_HED, dtype=image.dtype, device=image.device)
    factor = 1 + strength * torch.randn(n, 3, generator=generator).clamp(-2, 2)
    shift = 0.1 * strength * torch.randn(n, 3, generator=generator).clamp(-2, 2)
    # One 3 x 3 matrix and a shift per image: RGB density -> HED -> scaled -> RGB density.
    matrix = to_hed @ torch.diag_embed(factor.to(image)) @ to_rgb
    density = -torch.log10(image.clamp(min=1 / 255))
    density = torch.einsum("nchw,ncd->ndhw", density, matrix) + (shift.to(image) @ to_rgb)[:, :, None, None]
    return torch.pow(10, -density).clamp(0, 1)


def slide_statistics(reader, mask, n_windows: int = 16, size: int = 256) -> dict[str, list[float]] | None:
    """Return mean and sd of the optical density of a slide's tissue in R, G and B; None where there is no tissue.

    Parameters
    ----------
    reader
        A `pixnet._core.tiling.SlideReader`.
    mask
        Tells which output pixels are tissue (`pixnet._core.masking`).
    n_windows, size
        Windows to read at most, and their size in model pixels.
    """
    stride = reader.grid.stride
    n = size // stride
    tops, lefts = np.arange(0, reader.grid.shape[0], size), np.arange(0, reader.grid.shape[1], size)
    share = np.array([[mask.window(t // stride, x // stride, n, n).mean() for x in lefts] for t in tops])
    if share.max(initial=0) == 0:
        return None
    candidates = np.argwhere(share > min(0.5, 0.9 * share.max()))
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(n_windows, len(candidates))).astype(int)]
    parts = []
    for i, j in chosen:
        tissue = mask.window(tops[i] // stride, lefts[j] // stride, n, n)
        pixels = reader.read(int(tops[i]), int(lefts[j]), size, size)[:, ::stride, ::stride][:, tissue]
        parts.append(-np.log10(np.maximum(pixels, 1).astype(np.float32) / 255))
    density = np.concatenate(parts, axis=1)
    return {"od_mean": density.mean(axis=1).round(4).tolist(), "od_sd": density.std(axis=1).round(4).tolist()}
