"""A decoder with its head: what a model has one or several of, on one encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._decoder import DirectDecoder, FusedDecoder, PixelMixer
from pixnet.models._paper import PaperDecoder


class Member(nn.Module):
    """One decoder and its head.

    Parameters
    ----------
    channels, strides
        Of the encoder's maps, finest first.
    widths
        Channels of the decoder's levels, finest first; None without a U-Net.
    hidden
        Channels of the decoded map and of the layer after it; the published decoder has its own.
    stride
        Output stride.
    decoder
        One of `pixnet.models._decoder.DECODERS`.
    n_genes
        Number of genes; the head has a channel for each, and the total's last.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        widths: list[int] | None,
        hidden: int,
        stride: int,
        decoder: str,
        n_genes: int,
    ) -> None:
        super().__init__()
        self.decoder: nn.Module
        self.mixer: nn.Module = nn.Identity()
        if decoder == "paper":
            self.decoder = PaperDecoder(channels, strides, widths, stride)
        else:
            self.mixer = PixelMixer(hidden)
            if decoder == "none":
                self.decoder = DirectDecoder(channels, strides, hidden, stride)
            else:
                self.decoder = FusedDecoder(channels, strides, widths, stride, decoder, hidden)
        self.head = nn.Conv2d(self.decoder.width, n_genes + 1, 1)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, features: Sequence[Tensor], channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Return logits ``(N, channels, h, w)``."""
        return self.logits(self.decoder(features, crop), channels)

    def logits(self, decoded: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the logits of a decoded map ``(N, width, h, w)``, each pixel by itself."""
        x = self.mixer(decoded)
        head = self.head
        weight, bias = (head.weight, head.bias) if channels is None else (head.weight[channels], head.bias[channels])
        # In float32 also under autocast: bfloat16 would round a logit of -6 to steps of 0.03, 3 % of the density.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), weight, bias)
