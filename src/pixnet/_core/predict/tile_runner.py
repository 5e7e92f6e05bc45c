"""Run a model over a slide, tile by tile: one runner for lazy, stored, resumed and distributed maps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch

from pixnet._core.parallel import in_threads, run, runs_here
from pixnet._core.predict.device import PRECISIONS
from pixnet._core.predict.malloc import memory_kept
from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.predict.portable_model import PortableModel
from pixnet._core.predict.tile import ReducedTile, Tile, TileCost
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader
from pixnet._logging import logger

READERS, WRITERS = 2, 1
"""Threads that read ahead of the model and write behind it."""

_FORWARD = threading.Lock()
"""One forward pass at a time in a process: it uses all of torch's threads, and its memory is what counts."""

TilePlace = tuple[int, int]


@dataclass
class WindowBatch:
    """Windows of a tile that the model sees at once."""

    tile: Tile
    windows: Sequence[tuple[int, int, Box]]
    last: bool
    pixels: np.ndarray | None = None
    seconds: float = 0.0


class TileRunner:
    """Predicts tiles of a slide's map. It pickles, so that a cluster's workers can hold one each.

    Parameters
    ----------
    reader
        Reads the slide in model pixels.
    mask
        Tissue, asked per model output pixel.
    model
        The model.
    grid
        The tiles of the map.
    channels
        Indices of the model's channels that the map holds, the total last; None: all of them.
    n_channels
        Number of channels of the map.
    device, precision
        Device and arithmetic of the model.
    batch
        Windows of a tile that run at once. It is halved, with a line in the log, where the device's memory is too small.
    """

    def __init__(
        self,
        reader: SlideReader,
        mask: TissueMask,
        model: PortableModel,
        grid: MapGrid,
        *,
        channels: Sequence[int] | None,
        n_channels: int,
        device: str = "cpu",
        precision: str = "float32",
        batch: int = 1,
    ) -> None:
        self.reader, self.model, self.grid = reader, model, grid
        self.out_mask, self.mask = mask, mask if grid.ratio == 1 else mask.coarser(grid.ratio)
        self.channels, self.n_channels = None if channels is None else list(channels), n_channels
        self.device, self.precision, self.batch = device, precision, batch

    def tiles(self) -> list[TilePlace]:
        """Return the tiles ``(row, column)`` that may hold tissue, row by row, at the cost of a glance at the mask."""
        rows, columns = self.grid.tiles
        return [place for place in np.ndindex(rows, columns) if self._may_have_tissue(*place)]

    def tile(self, i: int, j: int) -> Tile:
        """Predict one tile."""
        return next(self.predict([(i, j)]))

    def predict(
        self, tiles: Iterable[TilePlace], ahead: Callable[..., Iterable[WindowBatch]] = map
    ) -> Generator[Tile, None, None]:
        """Predict tiles in order; the model runs in the caller's thread.

        Parameters
        ----------
        tiles
            Row and column of each.
        ahead
            Calls a function on items and gives the results in order: ``map``, or one that reads ahead on threads.
        """
        for batch in ahead(self._read, self._batches(tiles)):
            tile = batch.tile
            if batch.pixels is not None:
                values = self._forward(batch.pixels, tile.cost)
                tile.cost.add(TileCost(read=batch.seconds, windows=len(batch.windows)))
                for (i, j, part), value in zip(batch.windows, values):
                    side = self.grid.out_window
                    rows, columns = part.within(Box(i * side, j * side, side, side)).slices
                    tile.add(part, value[:, rows, columns])
            if batch.last:
                tile.finish()
                yield tile

    def _may_have_tissue(self, i: int, j: int) -> bool:
        return self.mask.near(*self.grid.box(i, j).bounds)

    def _batches(self, tiles: Iterable[TilePlace]) -> Iterator[WindowBatch]:
        """Return the windows to run, at least one batch a tile."""
        for place in tiles:
            if self.grid.ratio == 1:
                tile = Tile(self.grid, self.mask, self.n_channels, *place)
            else:
                tile = ReducedTile(self.grid, self.mask, self.out_mask, self.n_channels, *place)
            windows = tile.windows()
            for start in range(0, max(len(windows), 1), self.batch):
                part = windows[start : start + self.batch]
                yield WindowBatch(tile, part, last=start + self.batch >= len(windows))

    def _read(self, batch: WindowBatch) -> WindowBatch:
        """Read the pixels of a batch, uint8 ``(n, 3, y, x)`` with the halo."""
        if batch.windows:
            start, window, halo = time.perf_counter(), self.grid.window, self.grid.halo
            size = window + 2 * halo
            batch.pixels = np.empty((len(batch.windows), 3, size, size), np.uint8)
            for k, (i, j, _) in enumerate(batch.windows):
                batch.pixels[k] = self.reader.read(i * window - halo, j * window - halo, size, size)
            self.reader.check()
            batch.seconds = time.perf_counter() - start
        return batch

    def _forward(self, pixels: np.ndarray, cost: TileCost) -> np.ndarray:
        """Run the model: uint8 ``(n, 3, y, x)`` to float32 ``(n, channels, y, x)`` without the halo.

        A batch runs in halves where the GPU's memory does not hold it: windows do not know of each other.
        """
        try:
            return self._forward_at_once(pixels, cost)
        except torch.OutOfMemoryError as error:
            if len(pixels) == 1:
                raise RuntimeError(
                    f"the memory of device {self.device!r} does not hold one window of the model "
                    f"({pixels.shape[-1]} x {pixels.shape[-1]} px): free some of it, or predict with device='cpu'"
                ) from error
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if self.batch > len(pixels) // 2:
            self.batch = len(pixels) // 2
            logger.info("the memory of device %r is too small; windows run at once: %d", self.device, self.batch)
        return np.concatenate([self._forward(part, cost) for part in np.array_split(pixels, 2)])

    def _forward_at_once(self, pixels: np.ndarray, cost: TileCost) -> np.ndarray:
        device = torch.device(self.device)
        model = self.model.ready(device)
        image = torch.from_numpy(pixels)
        gpu = device.type == "cuda"
        if gpu:
            image = image.pin_memory()
        lowered = PRECISIONS[self.precision]
        with _FORWARD, torch.inference_mode():
            start = time.perf_counter()
            image = image.to(device, non_blocking=gpu).to(memory_format=torch.channels_last).float().div_(255)
            channels = None if self.channels is None else torch.tensor(self.channels, device=device)
            with torch.autocast(device.type, dtype=lowered, enabled=lowered is not None):
                out = model(image, channels, self.grid.halo // self.grid.model_grid.stride)
            out = out.float()
            if gpu:
                pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
                out = pinned.copy_(out, non_blocking=True)
                torch.cuda.synchronize(device)
            else:
                out = out.cpu()
            cost.forward += time.perf_counter() - start
        return out.numpy()


def lazy_map(runner: TileRunner, token: str) -> da.Array:
    """Return the map as a dask array, one task a tile; the runner is one key of the graph, shared by all.

    Parameters
    ----------
    runner
        The runner.
    token
        Identifies the map; equal tokens mean equal maps.
    """
    grid = runner.grid
    rows, columns = grid.tiles
    heights = tuple(grid.box(i, 0).height for i in range(rows))
    widths = tuple(grid.box(0, j).width for j in range(columns))
    return da.map_blocks(
        _lazy_tile,
        dask.delayed(runner, name=f"pixnet-runner-{token}", traverse=False),
        chunks=((runner.n_channels,), heights, widths),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), np.float32),
        name=f"pixnet-map-{token}",
    )


def _lazy_tile(runner: TileRunner, block_id: tuple[int, int, int]) -> np.ndarray:
    tile = runner.tile(*block_id[1:])
    if tile.values is None:
        return np.full((runner.n_channels, *tile.tissue.shape), np.nan, np.float32)
    return tile.values


def store_tiles(
    runner: TileRunner, target: Any, tiles: Sequence[TilePlace]
) -> Generator[tuple[TilePlace, TileCost], None, None]:
    """Predict tiles and write them to an array ``(channels, y, x)``; yield each one's place and cost once it is there.

    The model runs in the caller's thread, between threads that read ahead and write behind, or whole tiles run where
    `pixnet._core.parallel.run` runs tasks.
    """
    if not runs_here():
        yield from run(_store_tile, [runner, target], tiles)
        return
    ahead = partial(in_threads, threads=READERS)
    with (
        memory_kept(),
        closing(runner.predict(tiles, ahead)) as predicted,
        closing(in_threads(partial(_write, target), predicted, WRITERS)) as written,
    ):
        yield from written


def _store_tile(runner: TileRunner, target: Any, i: int, j: int) -> TileCost:
    return _write(target, runner.tile(i, j))[1]


def _write(target: Any, tile: Tile) -> tuple[TilePlace, TileCost]:
    if tile.values is not None:
        start = time.perf_counter()
        target[:, *tile.box.slices] = tile.values
        tile.values = None
        tile.cost.write = time.perf_counter() - start
    return (tile.i, tile.j), tile.cost
