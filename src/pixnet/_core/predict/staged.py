"""Tiles of a map from the stages of an encoder: each stage runs once on all that the next ones need.

A unit of a slide is a square of several windows, anchored at the slide's origin. Each stage runs on all that the next
one sees of the unit, in windows that see as far beyond their edges as the stage reaches: little for the first stage,
and more for the deeper ones, whose windows are larger. So a unit has the values of one pass over the whole slide. What
two units both need, on either side of the edge between them, has windows of its own: whichever comes first computes
them for both.
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

from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.tile import Tile, TileCost
from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader

STRIP = 2048
"""Pixels of the map, about, that the decoder's last layers run on at once on each thread of a CPU: few enough for its caches."""

KEPT = 768e6
"""Bytes of features that a lazy map keeps for its next tiles."""

SHARED = 384e6
"""Bytes of features between units that are kept for the next ones."""

Unit = tuple[int, int]


def margins(reach: Mapping[int, int]) -> list[int]:
    """Return, for each stage, how far from a place its maps still count there, in whole pixels of the deepest map."""
    deepest = max(reach)
    found = [deepest]  # the deepest map is interpolated between pixels
    for pixels in reversed(list(reach.values())[1:]):
        found.append(found[-1] + -(-pixels // deepest) * deepest)
    return found[::-1]


@dataclass(frozen=True)
class Window:
    """A box of model pixels that a stage computes at once, and whether another unit needs it too."""

    box: Box
    shared: bool = False


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
        self.deepest, self.margins = max(self.reach), margins(self.reach)
        self._start()

    def _start(self) -> None:
        self._kept: OrderedDict[Unit, UnitFeatures | None] = OrderedDict()
        self._shared: OrderedDict[tuple[int, Box], dict[int, Tensor]] = OrderedDict()
        self._lock, self._lock_shared = threading.Lock(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_kept", "_shared", "_lock", "_lock_shared"}
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

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
        self.reader.check()  # some may be there already
        kept = _bounding_box(tissue, out).scaled(self.stride).aligned(self.deepest).grown(self.deepest)
        maps: dict[int, Tensor] = {}
        below: tuple[Tensor, Box] | None = None
        for k in range(len(self.reach)):
            below = self._stage(k, unit, kept, below, maps, cost, ahead)
        return UnitFeatures(kept, maps)

    def windows(self, k: int, unit: Unit, kept: Box) -> list[Window]:
        """Return the windows of a stage for a unit of which the decoder needs a box.

        Windows that no tissue is in reach of, also of other units, are left out: nothing that counts depends on them.
        """
        first, stride = next(iter(self.reach)), list(self.reach)[k]
        # Deeper maps are smaller: their windows are larger, for the same memory and less halo.
        largest = self.grid.window if k == 0 else 5 * self.grid.window * stride // (4 * first)
        largest = -(-max(largest, 8 * self._halo(k)) // self.deepest) * self.deepest
        whole, margin = self._gives(k, unit, kept), self.margins[k]
        blocks = [Window(whole)]
        if self._shares(k):
            blocks = [
                Window(Box(y, x, height, width), shared_y or shared_x)
                for y, height, shared_y in self._segments(unit[0], margin, self.grid.model_grid.shape[0])
                for x, width, shared_x in self._segments(unit[1], margin, self.grid.model_grid.shape[1])
            ]
        slide = Box(0, 0, *self.grid.model_grid.out_shape)

        def near(box: Box) -> bool:
            seen = box.grown(margin + self.deepest).divided(self.stride).clipped(slide)
            return seen.height > 0 and seen.width > 0 and self.mask.near(*seen.bounds)

        cut = (Window(box, block.shared) for block in blocks for box in _windows(block.box, largest, self.deepest))
        return [window for window in cut if near(window.box)]

    def _shares(self, k: int) -> bool:
        """Whether a stage computes once what two units need: the first, whose margin is widest and halo narrowest."""
        return k == 0 < len(self.reach) - 1 and self.grid.unit > 2 * self.margins[0]

    def _gives(self, k: int, unit: Unit, kept: Box) -> Box:
        """Return the box that a stage gives for a unit: all that the next one sees of it."""
        if self._shares(k):
            side = self.grid.unit
            return Box(unit[0] * side, unit[1] * side, side, side).grown(self.margins[k])
        return kept.grown(self.margins[k] - self.deepest)

    def _segments(self, i: int, margin: int, extent: int) -> list[tuple[int, int, bool]]:
        """Cut a unit and its margin, along an axis, into what two units need and what is its own: start, size, shared."""
        start, stop = i * self.grid.unit, (i + 1) * self.grid.unit
        inner = (start + margin, self.grid.unit - 2 * margin, False)
        return [(start - margin, 2 * margin, start > 0), inner, (stop - margin, 2 * margin, stop < extent)]

    def _halo(self, k: int) -> int:
        stride, pixels = list(self.reach.items())[k]
        return -(-pixels // stride) * stride

    def _stage(
        self,
        k: int,
        unit: Unit,
        kept: Box,
        below: tuple[Tensor, Box] | None,
        maps: dict[int, Tensor],
        cost: TileCost,
        ahead: Any,
    ) -> tuple[Tensor, Box]:
        """Run a stage in windows; return its last map and the box of it, and put what the decoder needs into ``maps``.

        The first stage sees the image, the others the last map ``below``.
        """
        gives, halo, stride = self._gives(k, unit, kept), self._halo(k), list(self.reach)[k]
        last = k == len(self.reach) - 1
        found: dict[int, Tensor] = {}

        def paste(window: Window, own: Mapping[int, Tensor]) -> None:
            """``own`` are maps of the window, by level; the last is that which the next stage sees."""
            for level, feature in own.items():
                if level in maps_wanted:
                    _paste(maps, level, kept, feature, window.box, strides[level])
                if not last and strides[level] == stride:
                    _paste(found, level, gives, feature, window.box, stride)

        def run(group: Sequence[Window], seen: Callable[[], Tensor]) -> None:
            with self.model.running(cost) as model:
                own = model.encoder.stage(k, seen())
                top = strides.index(stride)
                levels = range(top + 1 - len(own), top + 1)
                for n, window in enumerate(group):
                    one = {
                        level: _cut(f[n], window.box.grown(halo), window.box, strides[level])
                        for level, f in zip(levels, own)
                        if level in maps_wanted or level == top
                    }
                    paste(window, one)
                    if window.shared:
                        self._share(k, window.box, one)

        model: Any = self.model.model.ready(torch.device(self.model.device))
        strides, maps_wanted = list(model.encoder.strides), set(model.levels)
        missing = []
        for window in self.windows(k, unit, kept):
            there = self._shared.get((k, window.box)) if window.shared else None
            if there is None:
                missing.append(window)
            else:
                with self.model.running(cost):
                    paste(window, there)
        if below is None:
            for group, pixels in ahead(partial(self._read, halo, cost), _rows(missing)):

                def part(which: slice, group: list[Window] = group, pixels: np.ndarray = pixels) -> None:
                    run(group[which], lambda: self.model.image(pixels[which]))

                self.model.in_batches(part, len(group), pixels.shape[-1])
        else:
            feature, box = below
            step = list(self.reach)[k - 1]
            for window in missing:

                def one(_: slice, window: Window = window) -> None:
                    run([window], lambda: _cut(feature, box, window.box.grown(halo), step))

                self.model.in_batches(one, 1, window.box.height + 2 * halo)
        return next(iter(found.values()), torch.empty(0)), gives

    def _share(self, k: int, box: Box, maps: Mapping[int, Tensor]) -> None:
        """Keep what a stage gave between units for the next one."""
        with self._lock_shared:
            # dense copies, the channels of a pixel side by side
            kept = {level: f.permute(1, 2, 0).contiguous().permute(2, 0, 1) for level, f in maps.items()}
            self._shared[k, box] = kept
            while sum(f.nbytes for one in self._shared.values() for f in one.values()) > SHARED:
                self._shared.popitem(last=False)

    def _read(self, halo: int, cost: TileCost, windows: list[Window]) -> tuple[list[Window], np.ndarray]:
        """Read windows of a row with their halo, uint8 ``(n, 3, y, x)``."""
        start = time.perf_counter()
        boxes = [window.box.grown(halo) for window in windows]
        y, x = boxes[0].y, boxes[0].x
        row = self.reader.read(y, x, boxes[0].height, boxes[-1].x + boxes[-1].width - x)
        pixels = np.stack([row[:, :, box.x - x : box.x - x + box.width] for box in boxes])
        self.reader.check()
        cost.add(TileCost(read=time.perf_counter() - start))
        return windows, pixels

    def _decode(self, features: UnitFeatures | None, part: Box, tile: Tile) -> None:
        """Add the values of a part of a tile, in model output pixels."""
        if features is None:
            return
        deepest, side = self.deepest, self.model.novelty_side
        for piece in _windows(part, self.grid.out_window, 1):
            tissue = tile.out_tissue[piece.within(tile.out).slices]
            if not tissue.any():
                continue
            piece = _bounding_box(tissue, piece)
            seen = piece.scaled(self.stride).aligned(deepest).grown(deepest)
            with self.model.running(tile.cost) as model:
                strides = model.encoder.strides
                raw = {level: _cut(f, features.box, seen, strides[level]) for level, f in features.maps.items()}
                cut = model.standardise(raw)
                decoded = [member.decoder(cut, deepest // self.stride) for member in model.members]
                inner = seen.grown(-deepest)
                if side is not None:
                    own = {level: _cut(f, seen, inner, strides[level]) for level, f in raw.items()}
                    novelty = self.model.values(model.novelty(own))[0]
                    tile.add_novelty(inner.divided(side * self.stride), novelty, side)
            origin = inner.divided(self.stride)
            for strip in self._strips(piece, tile.out_tissue[piece.within(tile.out).slices]):
                rows, columns = strip.within(origin).slices
                with self.model.running(tile.cost) as model:
                    out = model.read_out([d[..., rows, columns] for d in decoded], self.model.channels_there)
                    values = self.model.values(out)[0]
                tile.add(strip, values)

    def _strips(self, piece: Box, tissue: np.ndarray) -> Iterator[Box]:
        """Return rows of a piece, a few at a time, without the glass on both sides."""
        step = piece.height if self.model.on_gpu else max(STRIP * torch.get_num_threads() // piece.width, 1)
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
    """Cut a box into about equal windows of at most ``largest`` pixels a side, in steps."""

    def side(n: int) -> int:
        return min(-(-n // (-(-n // largest) * step)) * step, largest)

    height, width = side(box.height), side(box.width)
    for y in range(box.y, box.y + box.height, height):
        for x in range(box.x, box.x + box.width, width):
            yield Box(y, x, height, width).clipped(box)


def _rows(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Group windows of one size that lie side by side: their pixels are read at once."""
    group: list[Window] = []
    for window in windows:
        box = window.box
        if group:
            before = group[-1].box
            beside = (before.y, before.x + before.width) == (box.y, box.x)
            if not beside or (before.height, before.width) != (box.height, box.width):
                yield group
                group = []
        group.append(window)
    if group:
        yield group


def _cut(feature: Tensor, of: Box, wanted: Box, stride: int) -> Tensor:
    """Return the part of a feature map of one box that lies in another."""
    rows, columns = wanted.within(of).divided(stride).slices
    return feature[..., rows, columns]


def _paste(maps: dict[int, Tensor], level: int, box: Box, feature: Tensor, window: Box, stride: int) -> None:
    """Put the part of a window's feature ``(C, y, x)`` that lies in a box into the map of that box."""
    if level not in maps:
        empty = torch.zeros(1, len(feature), box.height // stride, box.width // stride, dtype=feature.dtype)
        maps[level] = empty.to(feature.device, memory_format=torch.channels_last)
    part = window.clipped(box)
    if part.height > 0 and part.width > 0:
        _cut(maps[level][0], box, part, stride).copy_(_cut(feature, window, part, stride))
