"""Open files as SpatialData."""

from __future__ import annotations

from pixnet.io._legacy_st import legacy_st

__all__ = ["legacy_st"]
