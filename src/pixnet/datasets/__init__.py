"""Data to try things on: public sections, and a tissue whose truth is known everywhere."""

from __future__ import annotations

from pixnet.datasets._her2st import her2st
from pixnet.datasets._kidney import kidney
from pixnet.datasets._synthetic_tissue import synthetic_tissue

__all__ = ["her2st", "kidney", "synthetic_tissue"]
