"""The default decoder: stacked features, and a perceptron on each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_PX = 64
"""Decoders work on whole blocks of this many image pixels, anchored at the slide's origin: never across a tile's edge."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of ``(N, C, H, W)``: a pixel's value depends on that pixel alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def droppable_halo(halo: int, levels: int) -> int:
    """Return the part of a halo, in image pixels, that a level can drop, given ``levels`` - 1 finer ones after it."""
    return max(halo - levels * BLOCK_PX, 0) // BLOCK_PX * BLOCK_PX


def enlarge(x: Tensor, times: int) -> Tensor:
    """Enlarge a map by bilinear interpolation."""
    return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False) if times > 1 else x


def trim(x: Tensor, n: int) -> Tensor:
    """Drop ``n`` pixels at each edge of a map."""
    return x[..., n:-n, n:-n] if n else x


def linear(layer: nn.Module, rows: Tensor) -> Tensor:
    """Apply a 1x1 convolution to pixels in rows ``(pixels, C)``: as a linear layer it is much faster."""
    layer = cast(nn.Conv2d, layer)
    return F.linear(rows, layer.weight.flatten(1), layer.bias)


class StackDecoder(nn.Module):
    """All maps of the encoder brought to the output stride and stacked, then one linear layer on each pixel.

    The layer is applied to each map at its own size, and sums are enlarged level by level: the same for less work.
    ``channels`` and ``strides`` are those of the encoder's maps, finest first; ``width`` is the number of output
    channels.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.strides, self.width = stride, tuple(strides), width
        self.used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.project = nn.ModuleList(nn.Conv2d(channels[i], width, 1, bias=n == 0) for n, i in enumerate(self.used))

    def forward(self, features: Mapping[int, Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        halo = margin = crop * self.stride
        total, before = None, self.strides[self.used[-1]]
        for i, project in reversed(list(zip(self.used, self.project))):
            stride = self.strides[i]
            # A pixel more at each edge than is wanted, where it is enlarged: that interpolates between it and the next.
            dropped = max(halo // stride - (stride > self.stride), 0)
            own = project(trim(features[i], dropped))
            inner = halo - dropped * stride
            total = own if total is None else own + trim(enlarge(total, before // stride), (margin - inner) // stride)
            margin, before = inner, stride
        assert total is not None
        return trim(enlarge(total, before // self.stride), margin // self.stride)

    def enlargements(self, level: int) -> tuple[int, ...]:
        """Return the factors, one after the other, by which a level's map is enlarged to the output stride."""
        strides = [self.strides[i] for i in reversed(self.used) if i <= level] + [self.stride]
        return tuple(before // after for before, after in zip(strides, strides[1:]))

    def at(self, rows: Mapping[int, Tensor]) -> Tensor:
        """Return decoded pixels ``(pixels, width)`` of each level's features there, ``(pixels, C)``."""
        total: Tensor | None = None
        for i, project in zip(self.used, self.project):
            weight = cast(nn.Conv2d, project).weight.flatten(1)
            total = linear(project, rows[i]) if total is None else torch.addmm(total, rows[i], weight.T)
        assert total is not None
        return total


class PixelMixer(nn.Sequential):
    """A hidden layer on each pixel by itself, after norm and activation."""

    def __init__(self, width: int) -> None:
        super().__init__(ChannelNorm(width), nn.GELU(), nn.Conv2d(width, width, 1), nn.GELU())

    def at(self, rows: Tensor) -> Tensor:
        """Return the same of pixels in rows ``(pixels, width)``."""
        norm, before, layer, after = self
        return after(linear(layer, before(nn.LayerNorm.forward(cast(nn.LayerNorm, norm), rows))))
