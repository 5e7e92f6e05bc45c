"""Tiles of a map from the stages of an encoder: each stage runs once on all that the next ones need.

A unit of a slide is a square of several windows, anchored at the slide's origin. What the first stage has to see of it is
cut into windows, which see a little beyond their edges; the deeper stages run on all of the first one's output at once.
Each stage sees as far as it reaches, so a unit has the values of one pass over the whole slide.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping
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
        for stride, pixels in reversed(reach.items()):
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
        self.stride = grid.model_grid.stride
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
            if unit not in self._kept:
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
        wanted = _bounding_box(tissue, out).scaled(self.stride)
        plan = UnitPlan.around(wanted, self.grid.reach or {})
        strides = list(self.grid.reach or {})
        maps: dict[int, Tensor] = {}
        x = self._first_stage(plan, tissue, out, maps, cost, ahead)
        for k, sees in enumerate(plan.sees[1:], 1):
            into = plan.sees[k + 1] if k + 1 < len(plan.sees) else plan.kept
            with self.model.running(cost) as model:
                own = self._guarded(partial(model.encoder.stage, k, x), sees)
                level = model.encoder.strides.index(strides[k]) + 1 - len(own)
                for n, f in enumerate(own, level):
                    if n in model.levels:
                        maps[n] = _cut(f, sees, plan.kept, model.encoder.strides[n]).clone()
                x = _cut(own[-1], sees, into, strides[k])
                del own
        return UnitFeatures(plan.kept, maps)

    def _first_stage(
        self, plan: UnitPlan, tissue: np.ndarray, out: Box, maps: dict[int, Tensor], cost: TileCost, ahead: Any
    ) -> Tensor:
        """Run the first stage in windows; return its last map, and put those that the decoder needs into ``maps``.

        Windows that no tissue is in reach of are left out: nothing that is kept depends on them.
        """
        reach = self.grid.reach or {}
        stride = next(iter(reach))
        below, halo = plan.sees[1] if len(plan.sees) > 1 else plan.kept, -(-reach[stride] // stride) * stride
        margin = (plan.kept.y - below.y + 2 * max(reach)) // self.stride

        def wanted(window: Box) -> bool:
            near = window.divided(self.stride).grown(margin).within(out)
            rows, columns = (slice(max(s.start, 0), max(s.stop, 0)) for s in near.slices)
            return bool(tissue[rows, columns].any())

        largest = max(self.grid.window, -(-8 * halo // max(reach)) * max(reach))  # else the halos cost more than they keep
        windows = [w for w in _windows(below, largest, max(reach)) if wanted(w)]
        groups = [windows[i : i + self.model.batch] for i in range(0, len(windows), self.model.batch)]
        found: dict[int, Tensor] = {}
        for group, pixels in ahead(partial(self._read, halo, cost), groups):

            def run(part: slice, group: list[Box] = group, pixels: np.ndarray = pixels) -> None:
                with self.model.running(cost) as model:
                    own = model.encoder.stage(0, self.model.image(pixels[part]))
                    last = model.encoder.strides.index(stride)
                    for level, f in enumerate(own, last + 1 - len(own)):
                        for target, box, used in ((maps, plan.kept, level in model.levels), (found, below, level == last)):
                            if used:
                                for window, one in zip(group[part], f):
                                    _paste(target, level, box, one, window.grown(halo), window, model.encoder.strides[level])

            self.model.in_batches(run, len(group), pixels.shape[-1])
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
        deepest = max(self.grid.reach or {})
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

    def _guarded(self, stage: Any, box: Box) -> Any:
        """Run a stage; say what to do where the device's memory does not hold it."""
        try:
            return stage()
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the memory of device {self.model.device!r} does not hold one window of the model "
                f"({box.height} x {box.width} px): free some of it, or predict with device='cpu'"
            ) from error


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


def _paste(
    maps: dict[int, Tensor], level: int, box: Box, feature: Tensor, seen: Box, window: Box, stride: int
) -> None:
    """Put the part of a window's feature ``(C, y, x)`` that lies in a box into the map of that box."""
    if level not in maps:
        empty = torch.zeros(1, len(feature), box.height // stride, box.width // stride, dtype=feature.dtype)
        maps[level] = empty.to(feature.device, memory_format=torch.channels_last)
    part = window.clipped(box)
    if part.height > 0 and part.width > 0:
        _cut(maps[level][0], box, part, stride).copy_(_cut(feature, seen, part, stride))
