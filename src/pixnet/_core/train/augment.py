"""Variation of the stain in training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Optical density of haematoxylin, eosin and a residual (DAB's place) in R, G, B: Ruifrok & Johnston 2001.
_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED /= np.linalg.norm(_HED, axis=1, keepdims=True)
_TO_HED = np.linalg.inv(_HED)


def jitter(image: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    """Vary the stain of each image: amounts of haematoxylin and eosin and their background, in HED space.

    Images are RGB in 0 to 1, ``(N, 3, H, W)``. ``strength`` is the standard deviation of the factors; shifts have a tenth.
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
