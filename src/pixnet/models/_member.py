"""A decoder with its head: a model has one or several on one encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._config import ModelConfig
from pixnet.models._decoder import PixelMixer, StackDecoder
from pixnet.models._paper import PaperDecoder


class Member(nn.Module):
    """One decoder and its head, which has a channel for each gene and the total's last.

    ``channels`` and ``strides`` are those of the encoder's maps, finest first.
    """

    def __init__(self, config: ModelConfig, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.decoder: StackDecoder | PaperDecoder
        self.mixer: nn.Module = nn.Identity()
        if config.widths is not None:  # those of the published decoder
            self.decoder = PaperDecoder(channels, strides, config.widths, config.stride)
        else:
            self.mixer = PixelMixer(config.hidden)
            self.decoder = StackDecoder(channels, strides, config.hidden, config.stride)
        self.head = new_head(self.decoder.width, len(config.genes))

    def forward(self, features: Mapping[int, Tensor], channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Return logits ``(N, channels, h, w)``."""
        return self.logits(self.decoder(features, crop), channels)

    def logits(self, decoded: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the logits of a decoded map ``(N, width, h, w)``, each pixel by itself."""
        x = self.mixer(decoded)
        weight, bias = self.head.weight, self.head.bias
        assert bias is not None
        if channels is not None:
            weight, bias = weight[channels], bias[channels]
        # In float32 also under autocast: bfloat16 would round a logit of -6 to steps of 0.03, 3 % of the density.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), weight, bias)

    def set_channels(self, old: Sequence[str], new: Sequence[str]) -> None:
        """Replace the head: channels that it had keep their weights, new ones start from the average gene."""
        before, position = self.head, {channel: i for i, channel in enumerate(old)}
        assert before.bias is not None
        self.head = new_head(before.in_channels, len(new) - 1)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, float(before.bias.data[:-1].mean()))
        for i, channel in enumerate(new):
            if channel in position:
                self.head.weight.data[i] = before.weight.data[position[channel]]
                self.head.bias.data[i] = before.bias.data[position[channel]]

    def set_baseline(self, genes: Tensor, total: float) -> None:
        """Start from these logits, ``(genes,)`` and the total's."""
        assert self.head.bias is not None
        self.head.bias.data[:-1].copy_(genes)
        self.head.bias.data[-1] = total


def new_head(width: int, n_genes: int) -> nn.Conv2d:
    """Return a head that starts from almost the same map everywhere."""
    head = nn.Conv2d(width, n_genes + 1, 1)
    nn.init.normal_(head.weight, std=0.01)
    return head
