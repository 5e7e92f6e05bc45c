"""Open files as SpatialData, and write what other programs open."""

from __future__ import annotations

from pixnet.io._from_anndata import from_anndata
from pixnet.io._hest import hest
from pixnet.io._legacy_st import legacy_st
from pixnet.io._read_geojson import read_geojson
from pixnet.io._read_ome_tiff import read_ome_tiff
from pixnet.io._slide import slide
from pixnet.io._write_geojson import write_geojson
from pixnet.io._write_ome_tiff import write_ome_tiff

__all__ = [
    "from_anndata",
    "hest",
    "legacy_st",
    "read_geojson",
    "read_ome_tiff",
    "slide",
    "write_geojson",
    "write_ome_tiff",
]
