"""The decoder of PixNet as published, as far as the paper tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._decoder import ATTENTION_PX, SeparableAttentionFusion, _spare, _trim

FILTERS = (64, 128, 256, 512, 512, 512)
"""Channels of the published decoder, finest level first."""

COARSEST = 32
"""Stride of the deepest level: 8 x 8 positions of the 256 px image of the decoder that PixNet builds on (MCADS)."""

SHALLOW = 3
"""Levels that are fused with the encoder's maps by attention; the deeper ones are unfolded from depth to space."""

RECIPE: dict[str, Any] = {
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
"""Its settings of training: passes, rate, decay and loss as published; patience and the plain rest are ours."""


def n_levels(stride: int) -> int:
    """Return how many levels lie between the output stride and the deepest."""
    return (COARSEST // stride).bit_length()


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


class PaperDecoder(nn.Module):
    """U-Net decoder with depth-to-space blocks at the deep levels and attention fusion at the three shallow ones.

    Levels double their stride from the output's to 32. The deepest starts from the encoder's last map and is unfolded, without
    skips, to the third; there, and at the two finer levels, an encoder map is fused in. Each encoder map is brought to its
    level's channels by a 1x1 convolution and to its size by interpolation.

    Parameters
    ----------
    channels, strides
        Of the encoder's maps, finest first; the deepest level takes the last, the shallow ones those that follow from the one
        nearest to the output stride.
    widths
        Channels of the levels, finest first: as many as `n_levels` says.
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
            SeparableAttentionFusion(width, width, max(ATTENTION_PX // self.level_strides[i], 1), nn.BatchNorm2d)
            for i, width in enumerate(widths[:shallow])
        )

    def forward(self, features: Sequence[Tensor], crop: int = 0) -> Tensor:
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
        out, done = self.level_strides[0], 0
        for level in reversed(range(len(self.fuse))):
            stride = self.level_strides[level]
            if level < len(self.lift):
                x = self.lift[len(self.lift) - 1 - level](x)
            # As in the other decoders, a level leaves out what of the halo the finer ones no longer need.
            spare = _spare(crop * out, level + 1)
            skip = at(self.skip[level](features[self.sources[level]]), level)
            x = self.fuse[level](_trim(skip, spare // stride), _trim(x, (spare - done) // stride))
            done = spare
        return _trim(x, crop - done // out)
