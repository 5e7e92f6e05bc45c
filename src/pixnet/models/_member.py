"""A decoder with its head: what a model has one or several of, on one encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._decoder import HypercolumnDecoder, UNetDecoder
from pixnet.models._paper import PaperDecoder


class Member(nn.Module):
    """One decoder and its head.

    Parameters
    ----------
    channels, strides
        Of the encoder's maps, finest first.
    widths
        Channels of the decoder's levels, finest first.
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
        widths: list[int],
        stride: int,
        decoder: str,
        n_genes: int,
    ) -> None:
        super().__init__()
        if decoder == "paper":
            self.decoder: nn.Module = PaperDecoder(channels, strides, widths, stride)
        elif decoder == "none":
            self.decoder = HypercolumnDecoder(channels, strides, widths[0], stride)
        else:
            self.decoder = UNetDecoder(channels, strides, widths, stride, decoder)
        self.head = nn.Conv2d(self.decoder.width, n_genes + 1, 1)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, features: Sequence[Tensor], channels: Tensor | None = None, crop: int = 0) -> Tensor:
        """Return logits ``(N, channels, h, w)``."""
        x = self.decoder(features, crop)
        head = self.head
        weight, bias = (head.weight, head.bias) if channels is None else (head.weight[channels], head.bias[channels])
        # In float32 also under autocast: bfloat16 would round a logit of -6 to steps of 0.03, 3 % of the density.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), weight, bias)
