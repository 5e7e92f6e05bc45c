"""Tiles of a map from the stages of an encoder: each stage runs once on all that the next ones need.

A unit of a slide is a square of several windows, anchored at the slide's origin. Each stage runs on all that the next one
sees of the unit, in windows that see as far beyond their edges as the stage reaches: little for the first stage, and more
for the deeper ones, whose windows are larger. So a unit has the values of one pass over the whole slide.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixnet._core.predict.malloc import trim_memory
from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.tile import Tile, TileCost
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader

STRIP = 4096
"""Pixels of the map, about, that the decoder's last layers run on at once on a CPU: few enough for its caches."""

KEPT = 768e6
"""Bytes of features that a lazy map keeps for its next tiles."""

Unit = tuple[int, int]


@dataclass(frozen=True)
class UnitPlan:
    """The part of a slide that each stage sees for a box of wanted pixels, all in model pixels.

    Attributes
    ----------
    sees
        Box that each stage sees, first stage first.
    kept
        Box whose features the decoder needs: the wanted one, in whole pixels of the deepest map, and one more at each edge.
    """

    sees: tuple[Box, ...]
    kept: Box

    @classmethod
    def around(cls, wanted: Box, reach: Mapping[int, int]) -> UnitPlan:
        """Return the plan for a box, with the encoder's reach by stride."""
        deepest = max(reach)
        kept = box = wanted.aligned(deepest).grown(deepest)
        sees = []
        for stride, pixels in reversed(list(reach.items())):
            box = box.grown(-(-pixels // stride) * stride)
            sees.append(box)
        return cls(tuple(reversed(sees)), kept)


@dataclass
class UnitFeatures:
    """Features of a unit, by level of the encoder, over a box of model pixels."""

    box: Box
    maps: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(f.nbytes for f in self.maps.values())


class StagedUnits:
    """Fills tiles from the features of units.

    Parameters
    ----------
    reader
        Reads the slide in model pixels.
    mask
        Tissue, asked per model output pixel.
    model
        The model; its encoder states its reach, and its decoder sees one pixel at a time.
    grid
        The tiles of the map.
    """

    def __init__(self, reader: SlideReader, mask: TissueMask, model: PlacedModel, grid: MapGrid) -> None:
        self.reader, self.mask, self.model, self.grid = reader, mask, model, grid
        self.stride, self.reach = grid.model_grid.stride, dict(grid.reach or {})
        self._kept: OrderedDict[Unit, UnitFeatures | None] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_kept", "_lock"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kept, self._lock = OrderedDict(), threading.Lock()

    def fill(
        self, tiles: Iterable[Tile], ahead: Any, held: Mapping[Unit, UnitFeatures | None] | None = None
    ) -> Generator[Tile, None, None]:
        """Yield tiles with their values; ``ahead(function, items)`` reads; ``held`` are features that are there already."""
        here = dict(held or {})
        for tile in tiles:
            units = [unit for unit, part in self.grid.units(tile.out) if tile.has_tissue(part)]
            here = {unit: features for unit, features in here.items() if unit in units}
            for unit, part in self.grid.units(tile.out):
                if unit in units:
                    if unit not in here:
                        here[unit] = self.features(unit, tile.cost, ahead)
                    self._decode(here[unit], part, tile)
            yield tile

    def kept_features(self, unit: Unit) -> UnitFeatures | None:
        """Return the features of a unit, from memory if they were asked for before."""
        with self._lock:
            if unit in self._kept:
                self.reader.check()  # features of a slide that is gone or was replaced are worth nothing
            else:
                self._kept[unit] = self.features(unit, TileCost())
            self._kept.move_to_end(unit)
            while len(self._kept) > 1 and sum(f.nbytes for f in self._kept.values() if f is not None) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[unit]

    def features(self, unit: Unit, cost: TileCost, ahead: Any = map) -> UnitFeatures | None:
        """Return the features behind the tissue of a unit; None if there is none."""
        out = self.grid.unit_box(*unit)
        tissue = self.mask.window(*out.bounds)
        if not tissue.any():
            return None
        plan = UnitPlan.around(_bounding_box(tissue, out).scaled(self.stride), self.reach)
        maps: dict[int, Tensor] = {}
        below: Tensor | None = None
        for k, stride in enumerate(self.reach):
            below = self._stage(k, stride, below, plan, partial(self._near, tissue, out), maps, cost, ahead)
            trim_memory()
        return UnitFeatures(plan.kept, maps)

    def _near(self, tissue: np.ndarray, out: Box, margin: int, window: Box) -> bool:
        """Whether there is tissue within some model pixels of a window; ``tissue`` is that of the unit."""
        rows, columns = window.grown(margin).divided(self.stride).clipped(out).within(out).slices
        return bool(tissue[rows.start : max(rows.stop, 0), columns.start : max(columns.stop, 0)].any())

    def _stage(
        self,
        k: int,
        stride: int,
        below: Tensor | None,
        plan: UnitPlan,
        near: Any,
        maps: dict[int, Tensor],
        cost: TileCost,
        ahead: Any,
    ) -> Tensor:
        """Run a stage in windows; return its last map, and put those that the decoder needs into ``maps``.

        The first stage sees the image, the others the last map ``below``. Windows that no tissue is in reach of are left out:
        nothing that counts depends on them.
        """
        first, deepest = next(iter(self.reach)), max(self.reach)
        sees, gives = (*plan.sees, plan.kept)[k : k + 2]
        halo = -(-self.reach[stride] // stride) * stride
        # Deeper maps are smaller: their windows are larger, for the same memory and less halo.
        largest = self.grid.window if k == 0 else 5 * self.grid.window * stride // (4 * first)
        largest = -(-max(largest, 8 * halo) // deepest) * deepest
        margin = plan.kept.y - gives.y + 2 * deepest
        windows = [window for window in _windows(gives, largest, deepest) if near(margin, window)]
        found: dict[int, Tensor] = {}

        def run(group: Sequence[Box], seen: Callable[[], Tensor]) -> None:
            with self.model.running(cost) as model:
                own = model.encoder.stage(k, seen())
                strides, last = model.encoder.strides, model.encoder.strides.index(stride)
                for level, feature in enumerate(own, last + 1 - len(own)):
                    for window, one in zip(group, feature):
                        if level in model.levels:
                            _paste(maps, level, plan.kept, one, window, halo, strides[level])
                        if level == last:
                            _paste(found, level, gives, one, window, halo, stride)

        if below is None:
            groups = [windows[i : i + self.model.batch] for i in range(0, len(windows), self.model.batch)]
            for group, pixels in ahead(partial(self._read, halo, cost), groups):

                def part(which: slice, group: list[Box] = group, pixels: np.ndarray = pixels) -> None:
                    run(group[which], lambda: self.model.image(pixels[which]))

                self.model.in_batches(part, len(group), pixels.shape[-1])
        else:
            step = list(self.reach)[k - 1]
            for window in (window.clipped(gives) for window in windows):

                def one(_: slice, window: Box = window, below: Tensor = below) -> None:
                    run([window], lambda: _cut(below, sees, window.grown(halo), step))

                self.model.in_batches(one, 1, window.height + 2 * halo)
        return next(iter(found.values()))

    def _read(self, halo: int, cost: TileCost, windows: list[Box]) -> tuple[list[Box], np.ndarray]:
        """Read windows with their halo, uint8 ``(n, 3, y, x)``."""
        start = time.perf_counter()
        pixels = np.stack([self.reader.read(*window.grown(halo).bounds) for window in windows])
        self.reader.check()
        cost.add(TileCost(read=time.perf_counter() - start))
        return windows, pixels

    def _decode(self, features: UnitFeatures | None, part: Box, tile: Tile) -> None:
        """Add the values of a part of a tile, in model output pixels."""
        if features is None:
            return
        deepest = max(self.reach)
        for piece in _windows(part, self.grid.out_window, 1):
            piece = piece.clipped(part)
            tissue = tile.out_tissue[piece.within(tile.out).slices]
            if not tissue.any():
                continue
            piece = _bounding_box(tissue, piece)
            seen = piece.scaled(self.stride).aligned(deepest).grown(deepest)
            with self.model.running(tile.cost) as model:
                strides = model.encoder.strides
                cut = {level: _cut(f, features.box, seen, strides[level]) for level, f in features.maps.items()}
                cut = model.standardise(cut)
                decoded = [member.decoder(cut, deepest // self.stride) for member in model.members]
            origin = seen.grown(-deepest).divided(self.stride)
            for strip in self._strips(piece, tile.out_tissue[piece.within(tile.out).slices]):
                rows, columns = strip.within(origin).slices
                with self.model.running(tile.cost) as model:
                    out = model.read_out([d[..., rows, columns] for d in decoded], self.model.channels_there)
                    values = self.model.values(out)[0]
                tile.add(strip, values)

    def _strips(self, piece: Box, tissue: np.ndarray) -> Iterator[Box]:
        """Return rows of a piece, a few at a time, without the glass on both sides."""
        step = piece.height if self.model.on_gpu else max(STRIP // piece.width, 1)
        for y in range(0, piece.height, step):
            strip = Box(piece.y + y, piece.x, min(step, piece.height - y), piece.width)
            here = tissue[y : y + strip.height]
            if here.any():
                yield _bounding_box(here, strip)


def _bounding_box(tissue: np.ndarray, box: Box) -> Box:
    """Return the smallest box around the tissue of a box."""
    rows, columns = np.flatnonzero(tissue.any(axis=1)), np.flatnonzero(tissue.any(axis=0))
    y, x = int(rows[0]), int(columns[0])
    return Box(box.y + y, box.x + x, int(rows[-1]) + 1 - y, int(columns[-1]) + 1 - x)


def _windows(box: Box, largest: int, step: int) -> Iterator[Box]:
    """Cut a box into equal windows of at most ``largest`` pixels a side, in steps; the last ones may reach over its edge."""

    def side(n: int) -> int:
        return min(-(-n // (-(-n // largest) * step)) * step, largest)

    height, width = side(box.height), side(box.width)
    for y in range(box.y, box.y + box.height, height):
        for x in range(box.x, box.x + box.width, width):
            yield Box(y, x, height, width)


def _cut(feature: Tensor, of: Box, wanted: Box, stride: int) -> Tensor:
    """Return the part of a feature map of one box that lies in another."""
    rows, columns = wanted.within(of).divided(stride).slices
    return feature[..., rows, columns]


def _paste(maps: dict[int, Tensor], level: int, box: Box, feature: Tensor, window: Box, halo: int, stride: int) -> None:
    """Put the part of a window's feature ``(C, y, x)``, seen with a halo, that lies in a box into the map of that box."""
    if level not in maps:
        empty = torch.zeros(1, len(feature), box.height // stride, box.width // stride, dtype=feature.dtype)
        maps[level] = empty.to(feature.device, memory_format=torch.channels_last)
    part = window.clipped(box)
    if part.height > 0 and part.width > 0:
        _cut(maps[level][0], box, part, stride).copy_(_cut(feature, window.grown(halo), part, stride))
