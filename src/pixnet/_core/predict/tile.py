"""One tile of a map, put together from the windows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.resample import area_weights


@dataclass
class TileCost:
    """Seconds of reading, in the model and of writing, and tissue pixels of the map."""

    read: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    pixels: int = 0

    def add(self, other: TileCost) -> None:
        """Add the cost of another tile."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class NoveltyPatch(NamedTuple):
    """A part of the image of novelty: where it lies, in that image's own pixels, and the percentiles ``(y, x)``."""

    box: Box
    values: np.ndarray


class Tile:
    """A tile of a map: the windows behind it are added one by one, in any order.

    Parameters
    ----------
    grid
        The tiles of the map.
    mask
        Tissue, asked per map pixel.
    n_channels
        Number of channels of the map.
    i, j
        Row and column of the tile.

    Attributes
    ----------
    out, out_tissue
        The model output pixels behind the tile, and the tissue among them.
    values
        ``(channels, y, x)`` float32, NaN on background; None as long as no window was added.
    novelty
        Parts of the image of novelty, float32, NaN on background; empty for a model that does not know what is new to
        it.
    cost
        What the tile has taken so far.
    """

    def __init__(self, grid: MapGrid, mask: TissueMask, n_channels: int, i: int, j: int) -> None:
        self.grid, self.n_channels, self.i, self.j = grid, n_channels, i, j
        self.box = self.out = grid.box(i, j)
        self.tissue = self.out_tissue = mask.window(*self.box.bounds)
        self.values: np.ndarray | None = None
        self.novelty: list[NoveltyPatch] = []
        self.cost = TileCost()

    def windows(self) -> list[tuple[int, int, Box]]:
        """Return the windows with tissue of this tile, and their parts in it, in model output pixels."""
        if not self.tissue.any():
            return []
        found = self.grid.windows(self.out)
        return [(i, j, part) for i, j, part in found if self.out_tissue[part.within(self.out).slices].any()]

    def has_tissue(self, part: Box) -> bool:
        """Whether some model output pixels are tissue of this tile."""
        return bool(self.tissue.any() and self.out_tissue[part.within(self.out).slices].any())

    def add(self, part: Box, values: np.ndarray) -> None:
        """Add the values ``(channels, y, x)`` of some model output pixels; those of the background are left out."""
        if self.values is None:
            self.values = np.full((self.n_channels, self.box.height, self.box.width), np.nan, np.float32)
        here = part.within(self.box).slices
        tissue = self.tissue[here]
        if tissue.all():
            self.values[:, *here] = values
        else:
            # a product is quicker than a copy of chosen pixels
            np.multiply(values, np.where(tissue, np.float32(1), np.float32(np.nan)), out=self.values[:, *here])

    def add_novelty(self, box: Box, values: np.ndarray, side: int) -> None:
        """Add novelty ``(y, x)``, whose pixels are ``side`` model output pixels wide; pixels without tissue become NaN."""
        behind = box.scaled(side)
        tissue, own = np.zeros((behind.height, behind.width), bool), behind.clipped(self.out)
        if own.height > 0 and own.width > 0:
            tissue[own.within(behind).slices] = self.out_tissue[own.within(self.out).slices]
        known = tissue.reshape(box.height, side, box.width, side).any(axis=(1, 3))
        self.novelty.append(NoveltyPatch(box, np.where(known, values, np.float32(np.nan))))

    def finish(self) -> None:
        """Count the pixels, once all windows were added."""
        if self.values is not None:
            self.cost.pixels = int(self.tissue.sum())


class ReducedTile(Tile):
    """A tile of a map that is coarser than the model's output: area means of the tissue.

    Parameters
    ----------
    out_mask
        Tissue, asked per model output pixel.
    """

    def __init__(self, grid: MapGrid, mask: TissueMask, out_mask: TissueMask, n_channels: int, i: int, j: int) -> None:
        super().__init__(grid, mask, n_channels, i, j)
        self.out = grid.out_box(self.box)
        self.out_tissue = out_mask.window(*self.out.bounds)
        self.area = np.zeros((self.box.height, self.box.width), np.float32)

    def add(self, part: Box, values: np.ndarray) -> None:
        """Add the values ``(channels, y, x)`` of some model output pixels."""
        if self.values is None:
            self.values = np.zeros((self.n_channels, self.box.height, self.box.width), np.float32)
        touched = self.grid.map_box(part)
        y0, x0 = max(touched.y, self.box.y), max(touched.x, self.box.x)
        y1 = min(touched.y + touched.height, self.box.y + self.box.height)
        x1 = min(touched.x + touched.width, self.box.x + self.box.width)
        rows, columns = slice(y0 - self.box.y, y1 - self.box.y), slice(x0 - self.box.x, x1 - self.box.x)
        wy = self._weights(0, y0, y1, part.y, part.y + part.height)
        wx = self._weights(1, x0, x1, part.x, part.x + part.width)
        inside = self.out_tissue[part.within(self.out).slices]
        self.values[:, rows, columns] += wy @ np.where(inside, values, 0) @ wx.T
        self.area[rows, columns] += wy @ inside.astype(np.float32) @ wx.T

    def finish(self) -> None:
        """Divide by the areas, and remove what is not tissue."""
        if self.values is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                self.values /= self.area
            self.values[:, ~self.tissue] = np.nan
        super().finish()

    def _weights(self, axis: int, start: int, stop: int, first: int, last: int) -> np.ndarray:
        """Return the area of each output pixel in each map pixel, along an axis; the last ones may reach over the slide."""
        extent = self.grid.model_grid.shape[axis] / self.grid.model_grid.stride
        return area_weights(start, stop, first, last, self.grid.ratio, extent).toarray().astype(np.float32)
