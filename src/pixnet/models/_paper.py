"""The decoder of PixNet as published, as far as the paper tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._decoder import BLOCK_PX, ChannelNorm, droppable_halo, trim

SHALLOW = 3
"""Levels that are fused with the encoder's maps by attention; the deeper ones are unfolded from depth to space."""

PAPER_TRAINING: dict[str, Any] = {
    "max_epochs": 200,
    "patience": 20,
    "lr": 5e-4,
    "weight_decay": 1e-4,
    "loss": "mse+pcc",
    "stain": 0.0,
    "dropout": 0.0,
    "ema": 0.0,
    "adapt_norms": False,
}
"""Its training: passes, rate, decay and loss as published; patience and the plain rest are ours."""


class NormConvBlock(nn.Sequential):
    """Depthwise 3x3, batch norm, LeakyReLU, pointwise, batch norm, LeakyReLU (CB)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in),
            nn.BatchNorm2d(c_in),
            nn.LeakyReLU(0.01),
            nn.Conv2d(c_in, c_out, 1),
            nn.BatchNorm2d(c_out),
            nn.LeakyReLU(0.01),
        )


class DepthToSpaceUp(nn.Sequential):
    """Twice the size, unfolded from four times the channels: ``CB(ReLU(Conv(D2S(ReLU(Conv(F; 4C))))))`` (DSUB)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, 4 * c_in, 3, padding=1),
            nn.ReLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.ReLU(),
            NormConvBlock(c_out, c_out),
        )


class BilinearUp(nn.Module):
    """Twice the size by interpolation: ``CB(Up(CB(F)))``."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.before, self.after = NormConvBlock(c_in, c_in), NormConvBlock(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map ``(N, c_out, 2 H, 2 W)``."""
        x = F.interpolate(self.before(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.after(x)


class SeparableAttentionFusion(nn.Module):
    """Fuse an encoder map with the map decoded so far by separable convolutions and attention along image rows (SAFB).

    Attention runs along the rows, inside segments of ``segment`` positions anchored at the slide's origin, so that the
    result does not depend on how a slide is tiled.

    Parameters
    ----------
    skip
        Channels of the encoder's map.
    up
        Channels of the decoded map; the output has as many.
    segment
        Positions of a row that attend to each other.

    References
    ----------
    PixNet (arXiv 2503.01347), official figure 2: ``D = U + A``; the block of MCADS-Decoder.
    """

    def __init__(self, skip: int, up: int, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.mid = nn.Sequential(
            nn.Conv2d(skip, skip, 3, padding=1, groups=skip), nn.SiLU(), nn.Conv2d(skip, up, 1), ChannelNorm(up)
        )
        self.direct = nn.Sequential(nn.Conv2d(skip, skip, 3, padding=1, groups=skip), nn.Conv2d(skip, up, 1))
        self.norm = nn.BatchNorm2d(up)
        self.qkv = nn.Conv2d(2 * up, 3 * up, 1)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the fused map ``(N, up, H, W)``."""
        fused = self.norm(F.silu(self.direct(skip) + self.mid(skip)))
        query, key, value = self.qkv(torch.cat([fused, up], dim=1)).chunk(3, dim=1)
        return up + self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, c, h, w = query.shape
        length = min(self.segment, w)

        def rows(x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).reshape(n * h, w // length, length, c)

        # Written out: with segments this short, the fused kernel's backward pass is six times slower on a CPU.
        query, key, value = rows(query), rows(key), rows(value)
        weights = torch.softmax(query @ key.transpose(-1, -2) * c**-0.5, dim=-1)
        return (weights @ value).reshape(n, h, w, c).permute(0, 3, 1, 2)


class PaperDecoder(nn.Module):
    """U-Net decoder with depth-to-space blocks at the deep levels and attention fusion at the three shallow ones.

    Levels double their stride from the output's to 32. The deepest starts from the encoder's last map and is unfolded,
    without skips, to the third; there, and at the two finer levels, an encoder map is fused in. Each encoder map is
    brought to its level's channels by a 1x1 convolution and to its size by interpolation.

    Parameters
    ----------
    channels, strides
        Of the encoder's maps, finest first; the deepest level takes the last, the shallow ones those that follow from
        the one nearest to the output stride.
    widths
        Channels of the levels, finest first: one for each.
    stride
        Output stride.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], widths: Sequence[int], stride: int) -> None:
        super().__init__()
        self.strides, self.width = tuple(strides), widths[0]
        shallow = min(SHALLOW, len(widths) - 1)
        last = len(strides) - 1
        nearest = min(range(last + 1), key=lambda i: abs(strides[i] - stride))
        self.sources = [min(nearest + level, last) for level in range(shallow)]
        self.used = sorted({*self.sources, last})
        self.level_strides = [stride * 2**level for level in range(len(widths))]
        self.enter = nn.Conv2d(channels[last], widths[-1], 1)
        deeper = range(len(widths) - 1, shallow - 1, -1)
        self.deep = nn.Sequential(*(DepthToSpaceUp(widths[level], widths[level - 1]) for level in deeper))
        finer = range(shallow - 1, 0, -1)
        self.lift = nn.ModuleList(BilinearUp(widths[level], widths[level - 1]) for level in finer)
        self.skip = nn.ModuleList(nn.Conv2d(channels[s], widths[i], 1) for i, s in enumerate(self.sources))
        self.fuse = nn.ModuleList(
            SeparableAttentionFusion(width, width, max(BLOCK_PX // self.level_strides[i], 1))
            for i, width in enumerate(widths[:shallow])
        )

    def forward(self, features: Mapping[int, Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        last = features[self.used[-1]]
        height, width = (n * self.strides[self.used[-1]] for n in last.shape[-2:])

        def at(x: Tensor, level: int) -> Tensor:
            size = (height // self.level_strides[level], width // self.level_strides[level])
            if tuple(x.shape[-2:]) == size:
                return x
            if x.shape[-1] > size[1]:
                return F.adaptive_avg_pool2d(x, size)
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

        x = self.deep(at(self.enter(last), len(self.level_strides) - 1))
        out, dropped = self.level_strides[0], 0
        for level in reversed(range(len(self.fuse))):
            stride = self.level_strides[level]
            if level < len(self.lift):
                x = self.lift[len(self.lift) - 1 - level](x)
            # Each level drops the part of the halo that the finer ones no longer need.
            droppable = droppable_halo(crop * out, level + 1)
            skip = at(self.skip[level](features[self.sources[level]]), level)
            x = self.fuse[level](trim(skip, droppable // stride), trim(x, (droppable - dropped) // stride))
            dropped = droppable
        return trim(x, crop - dropped // out)
