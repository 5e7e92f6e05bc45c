"""The decoder: from a pyramid of features to one map at the output stride."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODERS = ("none", "safb", "plain", "paper")

ATTENTION_PX = 64
"""Attention runs inside segments of this many image pixels, anchored at the slide's origin: never across a tile's edge."""


DEFAULT_WIDTHS = (16, 48, 64, 96, 128)
"""Of a U-Net's levels, finest first; deeper levels are as wide as the last."""


def fitted_widths(widths: int | Sequence[int] | None, levels: int, owner: str) -> list[int]:
    """Return a width for each of a U-Net's levels; ``owner`` has them."""
    if widths is None:
        return [*DEFAULT_WIDTHS, *DEFAULT_WIDTHS[-1:] * levels][:levels]
    widths = [int(widths)] * levels if isinstance(widths, int) else [int(w) for w in widths]
    if len(widths) != levels:
        raise ValueError(f"widths has {len(widths)} entries; {owner} has {levels} levels")
    return widths


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of ``(N, C, H, W)``: a pixel's value depends on that pixel alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Sequential):
    """Depthwise 3x3, norm, activation, pointwise, norm, activation (the CB of MCADS and PixNet)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in),
            ChannelNorm(c_in),
            nn.LeakyReLU(0.01),
            nn.Conv2d(c_in, c_out, 1),
            ChannelNorm(c_out),
            nn.LeakyReLU(0.01),
        )


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
    norm
        What normalises the fused map.

    References
    ----------
    PixNet (arXiv 2503.01347), official figure 2: ``D = U + A``; the block of MCADS-Decoder.
    """

    def __init__(self, skip: int, up: int, segment: int, norm: Callable[[int], nn.Module] = ChannelNorm) -> None:
        super().__init__()
        self.segment = segment
        self.mid = nn.Sequential(
            nn.Conv2d(skip, skip, 3, padding=1, groups=skip), nn.SiLU(), nn.Conv2d(skip, up, 1), ChannelNorm(up)
        )
        self.direct = nn.Sequential(nn.Conv2d(skip, skip, 3, padding=1, groups=skip), nn.Conv2d(skip, up, 1))
        self.norm = norm(up)
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


class PlainFusion(nn.Module):
    """Fuse by concatenation, the plain U-Net's way: what the attention block is compared with."""

    def __init__(self, skip: int, up: int) -> None:
        super().__init__()
        self.block = ConvBlock(skip + up, up)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the fused map ``(N, up, H, W)``."""
        return self.block(torch.cat([skip, up], dim=1))


class UNetDecoder(nn.Module):
    """U-Net decoder over a feature pyramid, ending at the output stride.

    Parameters
    ----------
    channels, strides
        Of the encoder's maps, finest first.
    widths
        Channels of the decoded map at each of the encoder's levels, finest first.
    stride
        Output stride; finer than the finest map, the last steps only upsample.
    fusion
        ``"safb"`` or ``"plain"``.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], widths: Sequence[int], stride: int, fusion: str = "safb"
    ) -> None:
        super().__init__()
        self.stride, self.strides = stride, tuple(strides)
        self.used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.ratio = max(strides[self.used[0]] // stride, 1)
        self.deepest = ConvBlock(channels[self.used[-1]], widths[self.used[-1]])
        self.lift, self.fuse = nn.ModuleList(), nn.ModuleList()
        for i in reversed(self.used[:-1]):
            self.lift.append(ConvBlock(widths[i + 1], widths[i]))
            if fusion == "safb":
                self.fuse.append(SeparableAttentionFusion(channels[i], widths[i], max(ATTENTION_PX // strides[i], 1)))
            else:
                self.fuse.append(PlainFusion(channels[i], widths[i]))
        self.last = ConvBlock(widths[self.used[0]], widths[self.used[0]])
        self.width = widths[self.used[0]]

    def forward(self, features: Sequence[Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge.

        The coarser a level, the further it reaches into what is kept: each level leaves out what the next no longer
        needs, so that a wide halo costs little beyond the encoder.
        """
        done = _spare(crop * self.stride, len(self.used))
        x = self.deepest(_trim(features[self.used[-1]], done // self.strides[self.used[-1]]))
        for depth, lift, fuse in zip(reversed(range(1, len(self.used))), self.lift, self.fuse):
            i, below = self.used[depth - 1], self.used[depth]
            spare = _spare(crop * self.stride, depth)
            x = _enlarge(lift(x), self.strides[below] // self.strides[i])
            x = fuse(_trim(features[i], spare // self.strides[i]), _trim(x, (spare - done) // self.strides[i]))
            done = spare
        return _trim(self.last(_enlarge(x, self.ratio)), crop - done // self.stride)


def _spare(halo: int, levels: int) -> int:
    """Return how much of a halo, in image pixels, a level can leave out that has ``levels`` - 1 finer ones to feed."""
    return max(halo - levels * ATTENTION_PX, 0) // ATTENTION_PX * ATTENTION_PX


def _enlarge(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False) if times > 1 else x


def _trim(x: Tensor, n: int) -> Tensor:
    return x[..., n:-n, n:-n] if n else x


class DirectDecoder(nn.Module):
    """No U-Net: every map brought to the output stride and stacked (a hypercolumn), then one linear layer on each pixel.

    The layer is applied to each map at its own size, and sums are enlarged level by level, which is the same for less work.

    Parameters
    ----------
    channels, strides, stride
        As for `UNetDecoder`.
    width
        Channels of the output.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.strides, self.width = stride, tuple(strides), width
        self.used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.project = nn.ModuleList(nn.Conv2d(channels[i], width, 1, bias=n == 0) for n, i in enumerate(self.used))

    def forward(self, features: Sequence[Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        spare = _spare(crop * self.stride, 1)
        total, below = None, None
        for i, project in zip(reversed(self.used), reversed(self.project)):
            x = project(_trim(features[i], spare // self.strides[i]))
            total = x if total is None else x + _enlarge(total, below // self.strides[i])
            below = self.strides[i]
        return _trim(_enlarge(total, below // self.stride), crop - spare // self.stride)


class FusedDecoder(nn.Module):
    """A U-Net with every map of the encoder also led straight to the output.

    The U-Net adds what is around a pixel to what the encoder says of it; the direct paths let a few hundred shapes teach
    the rest, which a narrow U-Net alone learns slowly.

    Parameters
    ----------
    channels, strides, widths, stride, fusion
        As for `UNetDecoder`.
    width
        Channels of the output.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        widths: Sequence[int],
        stride: int,
        fusion: str,
        width: int,
    ) -> None:
        super().__init__()
        self.direct = DirectDecoder(channels, strides, width, stride)
        self.unet = UNetDecoder(channels, strides, widths, stride, fusion)
        self.join = nn.Conv2d(self.unet.width, width, 1, bias=False)
        self.used, self.width = self.unet.used, width

    def forward(self, features: Sequence[Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        return self.direct(features, crop) + self.join(self.unet(features, crop))


class PixelMixer(nn.Sequential):
    """What follows on each pixel by itself: norm and activation, then a hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__(ChannelNorm(width), nn.GELU(), nn.Conv2d(width, width, 1), nn.GELU())
