"""Run a model over a slide, tile by tile: one runner for lazy, stored, resumed and distributed maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask._task_spec import DataNode, List, Task, TaskRef
from dask.highlevelgraph import HighLevelGraph

from pixnet._core.malloc import memory_kept
from pixnet._core.parallel import in_threads, run, runs_here
from pixnet._core.predict.map_grid import MapGrid
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.portable_model import PortableModel
from pixnet._core.predict.staged import StagedUnits, Unit, UnitFeatures
from pixnet._core.predict.tile import NoveltyPatch, ReducedTile, Tile, TileCost
from pixnet._core.predict.whole import WholeWindows
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.pyramid import block_means
from pixnet._core.slide.reader import SlideReader

READERS, WRITERS = 2, 1
"""Threads that read ahead of the model and write behind it."""

TilePlace = tuple[int, int]


class Stored(NamedTuple):
    """A tile that was written: its place, what it took, and its novelty."""

    place: TilePlace
    cost: TileCost
    novelty: list[NoveltyPatch]


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
        Windows of a tile that run at once. It is halved, with a line in the log, where the device's memory is too
        small.
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
        self.reader, self.model, self.grid, self.n_channels = reader, model, grid, n_channels
        self.out_mask, self.mask = mask, mask if grid.ratio == 1 else mask.coarser(grid.ratio)
        self.placed = PlacedModel(model, device, precision, channels, batch)
        self.source: WholeWindows | StagedUnits
        if grid.reach is None:
            self.source = WholeWindows(reader, self.placed, grid)
        else:
            self.source = StagedUnits(reader, mask, self.placed, grid)

    def tiles(self) -> list[TilePlace]:
        """Return the tiles ``(row, column)`` that may hold tissue, at the cost of a glance at the mask.

        They come row by row, or unit by unit where the model runs in stages.
        """
        rows, columns = self.grid.tiles
        found = [place for place in np.ndindex(rows, columns) if self._may_have_tissue(*place)]
        return sorted(found, key=lambda place: (self.units(*place)[:1], place))

    def units(self, i: int, j: int) -> list[Unit]:
        """Return the units that a tile touches; none where the model runs whole."""
        if self.grid.reach is None:
            return []
        return [unit for unit, _ in self.grid.units(self.grid.out_box(self.grid.box(i, j)))]

    def tile(self, i: int, j: int, held: Mapping[Unit, UnitFeatures | None] | None = None) -> Tile:
        """Predict one tile; ``held`` are features of units that are there already."""
        return next(self.predict([(i, j)], held=held))

    def predict(
        self,
        tiles: Iterable[TilePlace],
        ahead: Callable[..., Iterable[Any]] = map,
        held: Mapping[Unit, UnitFeatures | None] | None = None,
    ) -> Generator[Tile, None, None]:
        """Predict tiles in order; the model runs in the caller's thread.

        Parameters
        ----------
        tiles
            Row and column of each.
        ahead
            Calls a function on items and gives the results in order: ``map``, or one that reads ahead on threads.
        held
            Features of units that are there already.
        """
        empty = (self._empty(*place) for place in tiles)
        if isinstance(self.source, StagedUnits):
            filled = self.source.fill(empty, ahead, held)
        else:
            filled = self.source.fill(empty, ahead)
        for tile in filled:
            tile.finish()
            yield tile

    def _may_have_tissue(self, i: int, j: int) -> bool:
        return self.mask.near(*self.grid.box(i, j).bounds)

    def _empty(self, i: int, j: int) -> Tile:
        if self.grid.ratio == 1:
            return Tile(self.grid, self.mask, self.n_channels, i, j)
        return ReducedTile(self.grid, self.mask, self.out_mask, self.n_channels, i, j)


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
    shared, name, features = f"pixnet-runner-{token}", f"pixnet-map-{token}", f"pixnet-features-{token}"
    graph: dict[Any, Any] = {shared: DataNode(shared, runner)}
    for i, j in np.ndindex(rows, columns):
        units = runner.units(i, j) if runner._may_have_tissue(i, j) else []
        for unit in units:
            if (features, *unit) not in graph:
                graph[features, *unit] = Task((features, *unit), _lazy_features, TaskRef(shared), unit)
        needed = List(*(TaskRef((features, *unit)) for unit in units))
        graph[name, 0, i, j] = Task((name, 0, i, j), _lazy_tile, TaskRef(shared), (i, j), units, needed)
    layers = HighLevelGraph.from_collections(name, graph)
    meta = np.empty((0, 0, 0), np.float32)
    return da.Array(layers, name, chunks=((runner.n_channels,), heights, widths), dtype=np.float32, meta=meta)


def _lazy_features(runner: TileRunner, unit: Unit) -> UnitFeatures | None:
    assert isinstance(runner.source, StagedUnits)
    return runner.source.kept_features(unit)


def _lazy_tile(
    runner: TileRunner, place: TilePlace, units: Sequence[Unit], features: Sequence[UnitFeatures | None]
) -> np.ndarray:
    tile = runner.tile(*place, dict(zip(units, features)))
    if tile.values is None:
        return np.full((runner.n_channels, *tile.tissue.shape), np.nan, np.float32)
    return tile.values


def store_tiles(
    runner: TileRunner, target: Any, tiles: Sequence[TilePlace], coarser: Sequence[tuple[Any, int]] = ()
) -> Generator[Stored, None, None]:
    """Predict tiles and write them to an array ``(channels, y, x)``; yield what is known of each once it is there.

    ``coarser`` are arrays of coarser levels that are written with them, each with its factor to the level before, which
    divides the tiles of that level. The model runs in the caller's thread, between threads that read ahead and write
    behind, or the tiles of a unit run where `pixnet._core.parallel.run` runs tasks.
    """
    if not runs_here():
        groups: dict[Any, list[TilePlace]] = {}
        for place in tiles:
            groups.setdefault(tuple(runner.units(*place)[:1]) or place, []).append(place)
        for _, done in run(_store_group, [runner, target, coarser], [(group,) for group in groups.values()]):
            yield from done
        return
    ahead = partial(in_threads, threads=READERS)
    with (
        memory_kept(),
        closing(runner.predict(tiles, ahead)) as predicted,
        closing(in_threads(partial(_write, target, coarser), predicted, WRITERS)) as written,
    ):
        yield from written


def _store_group(
    runner: TileRunner, target: Any, coarser: Sequence[tuple[Any, int]], tiles: Sequence[TilePlace]
) -> list[Stored]:
    return [_write(target, coarser, tile) for tile in runner.predict([(i, j) for i, j in tiles])]


def _write(target: Any, coarser: Sequence[tuple[Any, int]], tile: Tile) -> Stored:
    """Write a tile and its part of the coarser levels, which is made from its pixels while they are in memory."""
    if tile.values is not None:
        start = time.perf_counter()
        values, (y, x) = tile.values, (tile.box.y, tile.box.x)
        target[:, y : y + values.shape[1], x : x + values.shape[2]] = values
        for array, factor in coarser:
            fy, fx = (min(factor, n) for n in target.shape[1:])  # an axis shorter than a block becomes one pixel
            target, values, y, x = array, block_means(values, fy, fx), y // fy, x // fx
            if 0 in values.shape:
                break
            target[:, y : y + values.shape[1], x : x + values.shape[2]] = values
        tile.values = None
        tile.cost.write = time.perf_counter() - start
    return Stored((tile.i, tile.j), tile.cost, tile.novelty)
