"""A decoder with its last layer: a model has one or several on one encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._config import ModelConfig
from pixnet.models._decoder import PixelMixer, StackDecoder, linear
from pixnet.models._paper import PaperDecoder


class Member(nn.Module):
    """One decoder and its last layer, which gives the logits that a head reads.

    ``channels`` and ``strides`` are those of the encoder's maps, finest first.
    """

    def __init__(self, config: ModelConfig, channels: Sequence[int], strides: Sequence[int], n_logits: int) -> None:
        super().__init__()
        self.decoder: StackDecoder | PaperDecoder
        self.mixer: nn.Module = nn.Identity()
        if config.widths is not None:  # those of the published decoder
            self.decoder = PaperDecoder(channels, strides, config.widths, config.stride)
        else:
            self.mixer = PixelMixer(config.hidden)
            self.decoder = StackDecoder(channels, strides, config.hidden, config.stride)
        self.last = last_layer(self.decoder.width, n_logits)

    def logits(self, decoded: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Return the logits of a decoded map ``(N, width, h, w)``, each pixel by itself."""
        x = self.mixer(decoded)
        weight, bias = self.last.weight, self.last.bias
        assert bias is not None
        if wanted is not None:
            weight, bias = weight[wanted], bias[wanted]
        # In float32 also under autocast: bfloat16 would round a logit of -6 to steps of 0.03, 3 % of the density.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), weight, bias)

    def at(self, features: Mapping[int, Tensor], crop_of_pixel: Tensor, pixel: Tensor) -> Tensor:
        """Return logits ``(pixels, n_logits)`` of some pixels, of their features where the decoder sees one at a time."""
        if isinstance(self.decoder, StackDecoder) and isinstance(self.mixer, PixelMixer):
            rows = self.mixer.at(self.decoder.at(features))
        else:
            decoded = self.decoder(features).flatten(2).transpose(1, 2)[crop_of_pixel, pixel]
            rows = self.mixer(decoded.T[None, :, None])[0, :, 0].T
        with torch.autocast(rows.device.type, enabled=False):
            return linear(self.last, rows.float())

    def take_over(self, positions: Sequence[int | None]) -> None:
        """Replace the last layer by one with a logit for each position in the old one; None: an average logit."""
        before = self.last
        assert before.bias is not None
        self.last = last_layer(before.in_channels, len(positions))
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, float(before.bias.data[:-1].mean()))
        for i, position in enumerate(positions):
            if position is not None:
                self.last.weight.data[i] = before.weight.data[position]
                self.last.bias.data[i] = before.bias.data[position]

    def set_baseline(self, biases: Tensor, total: float) -> None:
        """Start from these logits, ``(n_logits - 1,)`` and the total's."""
        assert self.last.bias is not None
        self.last.bias.data[:-1].copy_(biases)
        self.last.bias.data[-1] = total

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        """Add to the logits but the total's, ``(n_logits - 1,)``."""
        assert self.last.bias is not None
        self.last.bias[:-1] += by.to(self.last.bias)


def last_layer(width: int, n_logits: int) -> nn.Conv2d:
    """Return a layer that starts from almost the same map everywhere."""
    layer = nn.Conv2d(width, n_logits, 1)
    nn.init.normal_(layer.weight, std=0.01)
    return layer
