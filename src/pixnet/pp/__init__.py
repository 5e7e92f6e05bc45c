"""Preparation: pixel size, tissue, stain, grids, genes."""

from __future__ import annotations

from pixnet.pp._check_spots import check_spots
from pixnet.pp._infer_mpp import infer_mpp
from pixnet.pp._make_grid import make_grid
from pixnet.pp._normalize_stain import normalize_stain
from pixnet.pp._segment_cells import segment_cells
from pixnet.pp._select_genes import select_genes
from pixnet.pp._set_mpp import set_mpp
from pixnet.pp._tissue_mask import tissue_mask

__all__ = [
    "check_spots",
    "infer_mpp",
    "make_grid",
    "normalize_stain",
    "segment_cells",
    "select_genes",
    "set_mpp",
    "tissue_mask",
]
