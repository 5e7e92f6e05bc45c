"""Tiles of a map from windows that run whole, through encoder and decoder, with a halo on each side."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.tile import Tile, TileCost
from pixnet._core.slide.reader import SlideReader


@dataclass
class WindowBatch:
    """Windows of a tile that the model sees at once."""

    tile: Tile
    windows: Sequence[tuple[int, int, Box]]
    last: bool
    pixels: np.ndarray | None = None


class WholeWindows:
    """Fills tiles from windows of ``grid.window`` pixels that see ``grid.halo`` beyond their edges."""

    def __init__(self, reader: SlideReader, model: PlacedModel, grid: MapGrid) -> None:
        self.reader, self.model, self.grid = reader, model, grid

    def fill(self, tiles: Iterable[Tile], ahead: Any) -> Generator[Tile, None, None]:
        """Yield tiles with their values; ``ahead(function, items)`` reads."""
        grid = self.grid
        for batch in ahead(self._read, self._batches(tiles)):
            tile = batch.tile
            if batch.pixels is not None:
                values, novelty = self._forward(batch.pixels, tile.cost)
                side, coarse = grid.out_window, self.model.novelty_side
                for n, (i, j, part) in enumerate(batch.windows):
                    window = Box(i * side, j * side, side, side)
                    rows, columns = part.within(window).slices
                    tile.add(part, values[n][:, rows, columns])
                    if coarse is not None:
                        tile.add_novelty(window.divided(coarse), novelty[n], coarse)
            if batch.last:
                yield tile

    def _batches(self, tiles: Iterable[Tile]) -> Iterator[WindowBatch]:
        """Return the windows to run, at least one batch a tile."""
        for tile in tiles:
            windows = tile.windows()
            step = self.model.batch
            for start in range(0, max(len(windows), 1), step):
                yield WindowBatch(tile, windows[start : start + step], last=start + step >= len(windows))

    def _read(self, batch: WindowBatch) -> WindowBatch:
        """Read the pixels of a batch, uint8 ``(n, 3, y, x)`` with the halo."""
        if batch.windows:
            start, window, halo = time.perf_counter(), self.grid.window, self.grid.halo
            size = window + 2 * halo
            batch.pixels = np.empty((len(batch.windows), 3, size, size), np.uint8)
            for k, (i, j, _) in enumerate(batch.windows):
                batch.pixels[k] = self.reader.read(i * window - halo, j * window - halo, size, size)
            self.reader.check()
            batch.tile.cost.add(TileCost(read=time.perf_counter() - start))
        return batch

    def _forward(self, pixels: np.ndarray, cost: TileCost) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Run the model: uint8 ``(n, 3, y, x)`` to the map ``(channels, y, x)`` and novelty ``(y, x)``, without the halo."""
        found: list[np.ndarray] = []
        novelty: list[np.ndarray] = []
        crop, coarse = self.grid.halo // self.grid.model_grid.stride, self.model.novelty_side

        def run(part: slice) -> None:
            with self.model.running(cost) as model:
                channels, image = self.model.channels_there, self.model.image(pixels[part])
                if coarse is None:
                    found.extend(self.model.values(model(image, channels, crop)))
                    return
                raw = model.encoder(image)
                found.extend(self.model.values(model.decode(model.standardise(raw), channels, crop)))
                inner = slice(crop // coarse, -(crop // coarse) or None)
                novelty.extend(self.model.values(model.novelty({i: raw[i] for i in model.levels})[:, inner, inner]))

        self.model.in_batches(run, len(pixels), pixels.shape[-1])
        return found, novelty
