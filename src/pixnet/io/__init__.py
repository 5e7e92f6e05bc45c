"""Open files as SpatialData."""

from __future__ import annotations

from pixnet.io._legacy_st import legacy_st
from pixnet.io._slide import slide

__all__ = ["legacy_st", "slide"]
