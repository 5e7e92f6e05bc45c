"""What the ablation compares the package's model with: U-Net decoders, another link, another quantity and other losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models import PixNet
from pixnet.models import _losses as losses
from pixnet.models._decoder import BLOCK_PX, ChannelNorm, StackDecoder, droppable_halo, enlarge, trim
from pixnet.models._heads import GeneHead, LogSumHead, MeasuredShapes, ProgramHead
from pixnet.models._losses import PCC_WEIGHT, cp10k_of
from pixnet.models._paper import SeparableAttentionFusion

WIDTHS = (16, 48, 64, 96, 128)
"""Channels of a U-Net's levels, finest first."""


class ConvBlock(nn.Sequential):
    """Depthwise 3x3, norm, activation, pointwise, norm, activation."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in),
            ChannelNorm(c_in),
            nn.LeakyReLU(0.01),
            nn.Conv2d(c_in, c_out, 1),
            ChannelNorm(c_out),
            nn.LeakyReLU(0.01),
        )


class Concatenation(nn.Module):
    """Fuse by concatenation, the plain U-Net's way."""

    def __init__(self, skip: int, up: int) -> None:
        super().__init__()
        self.block = ConvBlock(skip + up, up)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the fused map ``(N, up, H, W)``."""
        return self.block(torch.cat([skip, up], dim=1))


def attention(skip: int, up: int, stride: int) -> SeparableAttentionFusion:
    """Fuse by separable attention, with a norm that looks at one pixel."""
    block = SeparableAttentionFusion(skip, up, max(BLOCK_PX // stride, 1))
    block.norm = ChannelNorm(up)
    return block


class UNet(nn.Module):
    """A U-Net over a feature pyramid, ending at the output stride."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], stride: int, fusion: str) -> None:
        super().__init__()
        widths = [*WIDTHS, *WIDTHS[-1:] * len(channels)]
        self.stride, self.strides = stride, tuple(strides)
        self.used = [i for i, s in enumerate(strides) if s >= stride] or [len(strides) - 1]
        self.ratio = max(strides[self.used[0]] // stride, 1)
        self.deepest = ConvBlock(channels[self.used[-1]], widths[self.used[-1]])
        self.lift, self.fuse = nn.ModuleList(), nn.ModuleList()
        for i in reversed(self.used[:-1]):
            self.lift.append(ConvBlock(widths[i + 1], widths[i]))
            by_attention = fusion == "attention"
            self.fuse.append(
                attention(channels[i], widths[i], strides[i]) if by_attention else Concatenation(channels[i], widths[i])
            )
        self.width = widths[self.used[0]]
        self.last = ConvBlock(self.width, self.width)

    def forward(self, features: Mapping[int, Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        done = droppable_halo(crop * self.stride, len(self.used))
        x = self.deepest(trim(features[self.used[-1]], done // self.strides[self.used[-1]]))
        for depth, lift, fuse in zip(reversed(range(1, len(self.used))), self.lift, self.fuse):
            i, below = self.used[depth - 1], self.used[depth]
            dropped = droppable_halo(crop * self.stride, depth)
            x = enlarge(lift(x), self.strides[below] // self.strides[i])
            x = fuse(trim(features[i], dropped // self.strides[i]), trim(x, (dropped - done) // self.strides[i]))
            done = dropped
        return trim(self.last(enlarge(x, self.ratio)), crop - done // self.stride)


class StackAndUNet(nn.Module):
    """The default decoder with a U-Net beside it, whose map is added before the hidden layer."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], stride: int, fusion: str, width: int) -> None:
        super().__init__()
        self.direct = StackDecoder(channels, strides, width, stride)
        self.unet = UNet(channels, strides, stride, fusion)
        self.join = nn.Conv2d(self.unet.width, width, 1, bias=False)
        self.used, self.width = self.unet.used, width

    def forward(self, features: Mapping[int, Tensor], crop: int = 0) -> Tensor:
        """Return the map ``(N, width, H/stride, W/stride)``, without ``crop`` of its pixels at each edge."""
        return self.direct(features, crop) + self.join(self.unet(features, crop))


def with_unet(model: PixNet, fusion: str) -> PixNet:
    """Give a model's decoders a U-Net that fuses by ``"attention"`` or ``"concatenation"``."""
    for member in model.members:
        encoder, width = model.encoder, model.config.hidden
        member.decoder = StackAndUNet(encoder.channels, encoder.strides, model.stride, fusion, width)
    return model


class SoftplusHead(GeneHead):
    """Densities by softplus in place of the exponential."""

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the map of logits."""
        logits = logits.float()
        total = F.softplus(logits[:, -1:]) * 1e4
        return torch.cat([F.softplus(logits[:, :-1]) * 1e-3 * total, total], dim=1)

    def start(self, measured: MeasuredShapes) -> tuple[Tensor, float]:
        """Start from each gene's mean share of all transcripts."""
        target = super().start(measured)[0].exp() * 1e3
        return target + torch.log(-torch.expm1(-target)), 0.5413  # whose softplus is 1


class LogMeanHead(LogSumHead):
    """Gene channels whose mean over a shape is its log1p CP10k; a channel of ones tells the pixels of a shape."""

    def forward(self, logits: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the map of logits."""
        logits = logits.float()
        total = logits[:, -1:].clamp(-10, 4).exp() * 1e4
        return torch.cat([logits[:, :-1], torch.ones_like(total), total], dim=1)

    def log_expression(self, sums: Tensor, pixel_um2: float, genes: Tensor | None = None) -> Tensor:
        """Return the log1p CP10k of shapes from sums of the map over their pixels."""
        return sums[:, :-2] / sums[:, -2:-1].clamp(min=1e-6)


def with_head(model: PixNet, head: type[GeneHead]) -> PixNet:
    """Give a model another head."""
    model.head = head(model.genes)
    return model


def squared_error(predicted: Tensor, cp10k: Tensor, pcc: Tensor, **counts: Tensor | None) -> Tensor:
    """Return the mean squared error on log1p of CP10k alone."""
    return F.mse_loss(predicted, torch.log1p(cp10k))


def correlation(predicted: Tensor, cp10k: Tensor, pcc: Tensor, **counts: Tensor | None) -> Tensor:
    """Return the correlation's part alone."""
    return 1 - pcc


def correlation_of_first(n: int, predicted: Tensor, cp10k: Tensor, pcc: Tensor, **counts: Tensor | None) -> Tensor:
    """Return the mean correlation of the first ``n`` genes, to score them alone."""
    return losses.correlation(predicted[:, :n], torch.log1p(cp10k[:, :n])).nanmean()


def start_at_the_mean(head: ProgramHead, measured: MeasuredShapes) -> tuple[Tensor, float]:
    """Start all programs from the mean expression, each gene of each program shaken by a factor of about e**0.5."""
    share = torch.from_numpy(np.asarray(measured.shares.mean(axis=0), dtype=np.float32).ravel()).clamp(min=1e-8)
    rest = (1 - share.sum()).clamp(min=1e-8)
    logits = torch.cat([share, rest[None]]).log().expand_as(head.loading_logits)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(measured.seed))
    head.loading_logits.data.copy_(logits + 0.5 * noise)
    return torch.zeros(head.n_logits - 1), 0.0


def poisson_and_pcc(predicted: Tensor, cp10k: Tensor, pcc: Tensor, **counts: Tensor | None) -> Tensor:
    """Return the Poisson deviance of CP10k, per gene in units of its mean, plus ``0.5 (1 - PCC)``."""
    scale = cp10k.mean(dim=0).clamp(min=1e-3)
    rate = (cp10k_of(predicted) / scale).clamp(min=1e-6)
    return (rate - cp10k / scale * rate.log()).mean() + PCC_WEIGHT * (1 - pcc)
