"""Versions of a slide in training: turned, and with another stain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixnet._core.predict.map_grid import Box

# Optical density of haematoxylin, eosin and a residual (DAB's place) in R, G, B: Ruifrok & Johnston 2001.
_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED /= np.linalg.norm(_HED, axis=1, keepdims=True)
_TO_HED = np.linalg.inv(_HED)

SYMMETRIES = (0, 5, 2, 7, 1, 6, 3, 4)
"""Symmetries of the square that the versions of a slide show in turn; the first is the slide as it is."""

STAIN_PITCH = 512
"""Model pixels after which a slide's stain varies independently."""


@dataclass(frozen=True)
class Version:
    """How a slide is seen.

    Attributes
    ----------
    number
        0 is the slide as it is; others are turned and restained, each in its own way.
    stain
        Strength with which it is restained.
    """

    number: int
    stain: float

    @classmethod
    def numbered(cls, n: int, stain: float) -> list[Version]:
        """Return the first versions; they do not depend on a seed, so that any training finds their features."""
        return [cls(number, stain if number else 0.0) for number in range(n)]

    @property
    def symmetry(self) -> int:
        """The symmetry under which the slide is seen."""
        return SYMMETRIES[self.number % len(SYMMETRIES)]

    def restained(self, pixels: np.ndarray, at: Box) -> np.ndarray:
        """Return pixels ``(3, y, x)`` uint8 of a part of a slide (model pixels) as this version shows them."""
        if self.stain == 0:
            return pixels
        noise = torch.from_numpy(_smooth_noise(self.number, at))
        image = torch.from_numpy(pixels)[None].float().div_(255)
        image = _restain(image, 1 + self.stain * noise[None, :3], 0.1 * self.stain * noise[None, 3:])
        return image[0].mul_(255).round_().to(torch.uint8).numpy()


def turn(x: Tensor, symmetry: int) -> Tensor:
    """Apply one of the eight symmetries of the square to ``(..., H, W)``."""
    if symmetry >= 4:
        x = x.flip(-1)
    return torch.rot90(x, symmetry % 4, (-2, -1))


def turn_back(x: Tensor, symmetry: int) -> Tensor:
    """Undo `turn`."""
    x = torch.rot90(x, -(symmetry % 4), (-2, -1))
    return x.flip(-1) if symmetry >= 4 else x


def jitter(image: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    """Vary the stain of each image: amounts of haematoxylin and eosin and their background, in HED space.

    Images are RGB in 0 to 1, ``(N, 3, H, W)``. ``strength`` is the standard deviation of the factors; shifts have a
    tenth.
    """
    n = image.shape[0]
    factor = 1 + strength * torch.randn(n, 3, generator=generator).clamp(-2, 2)
    shift = 0.1 * strength * torch.randn(n, 3, generator=generator).clamp(-2, 2)
    return _restain(image, factor.to(image)[:, :, None, None], shift.to(image)[:, :, None, None])


def _restain(image: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """Multiply and shift haematoxylin, eosin and residual of images ``(N, 3, H, W)``."""
    to_hed = torch.as_tensor(_TO_HED, dtype=image.dtype, device=image.device)
    to_rgb = torch.as_tensor(_HED, dtype=image.dtype, device=image.device)
    density = -torch.log10(image.clamp(min=1 / 255))
    stains = torch.einsum("nchw,cd->ndhw", density, to_hed) * factor + shift
    return torch.pow(10, -torch.einsum("nchw,cd->ndhw", stains, to_rgb)).clamp_(0, 1)


def _smooth_noise(seed: int, at: Box) -> np.ndarray:
    """Return six random fields ``(6, y, x)`` over a part of a slide: smooth, of unit variance, the same in every window."""
    rows, columns = (_hat_weights(start, n) for start, n in ((at.y, at.height), (at.x, at.width)))
    nodes = np.empty((6, len(rows[1]), len(columns[1])), np.float32)
    for i, j in np.ndindex(nodes.shape[1:]):
        # coordinates may be negative, seeds may not
        node = np.random.default_rng([seed, int(rows[1][i]) + 2**20, int(columns[1][j]) + 2**20])
        nodes[:, i, j] = node.standard_normal(6)
    return np.clip(rows[0] @ nodes @ columns[0].T, -2, 2)


def _hat_weights(start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights ``(n, nodes)`` of the two nodes beside each pixel of an axis, of unit length, and the nodes' indices."""
    position = (start + np.arange(n) + 0.5) / STAIN_PITCH
    first = np.floor(position).astype(int)
    nodes = np.arange(first[0], first[-1] + 2)
    weights = np.maximum(1 - np.abs(position[:, None] - nodes), 0)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32), nodes
