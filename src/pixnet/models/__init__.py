"""The torch models underneath: PixNet, its encoders and its checkpoints."""

from __future__ import annotations

from pixnet.models._encoders import encoders, register_encoder
from pixnet.models._load import load
from pixnet.models._pixnet import PixNet

__all__ = ["PixNet", "encoders", "load", "register_encoder"]
