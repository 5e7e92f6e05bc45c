"""Features of one slide by one encoder, in several versions: what is there, and how the rest is computed."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from pixnet._core.parallel import in_threads, run, runs_here
from pixnet._core.predict.map_grid import Box
from pixnet._core.scratch import scratch_root
from pixnet._core.slide.reader import SlideReader
from pixnet._core.train.augment import Version
from pixnet._core.train.encoder_stages import Stage, StageRunner, digest, read_and_run, seen_by
from pixnet._core.train.feature_maps import FeatureMaps

CELL = 64
"""Model pixels of a cell, by which is counted what is there."""

READERS = 2
"""Threads that read ahead of the encoder."""


class SlideFeatures:
    """Features of one slide by one encoder, in the versions that were asked for.

    Parameters
    ----------
    shape
        Size of the slide in model pixels.
    stages
        Stages of the encoder.
    strides, channels
        Of the encoder's levels.
    """

    def __init__(
        self, shape: tuple[int, int], stages: Sequence[Stage], strides: Sequence[int], channels: Sequence[int]
    ) -> None:
        # Beyond what the last stage starts from sees of the slide there is nothing but glass, the same everywhere.
        margin = sum(stage.halo for stage in stages[:-1])
        self.box = Box(0, 0, *shape).aligned(CELL).grown(-(-margin // CELL) * CELL)
        self.cells = (self.box.height // CELL, self.box.width // CELL)
        self.stages, self.strides, self.channels = stages, strides, channels
        self.maps: dict[Version, FeatureMaps] = {}
        self._done: dict[Version, np.ndarray] = {}
        self._digests: dict[Box, bytes] = {}

    # what is there ---------------------------------------------------------------------------------------------------

    def missing(self, version: Version, wanted: np.ndarray) -> list[list[Box]]:
        """Return the windows to run for some cells, for each stage."""
        done = self._done.get(version, np.zeros((len(self.stages), *self.cells), bool))
        found: list[list[Box]] = []
        for stage, there in reversed(list(zip(self.stages, done))):
            windows = [window for block in self._blocks(stage) for window in self._part(stage, wanted & ~there, block)]
            wanted = wanted | self.cells_of(window.grown(stage.halo) for window in windows)
            found.insert(0, windows)
        return found

    def cells_of(self, boxes: Iterable[Box]) -> np.ndarray:
        """Return the cells that some boxes touch."""
        found = np.zeros(self.cells, bool)
        for box in boxes:
            part = box.clipped(self.box)
            if part.height > 0 and part.width > 0:
                found[part.within(self.box).divided(CELL).slices] = True
        return found

    def nbytes(self, windows: Sequence[Sequence[Box]]) -> int:
        """Return the bytes that the features of windows take, for each stage."""
        total = 0
        for stage, own in zip(self.stages, windows):
            per_px = sum(2 * self.channels[level] / self.strides[level] ** 2 for level in stage.kept)
            total += int(per_px * sum(w.height * w.width for w in own))
        return total

    def holds(self) -> int:
        """Return the bytes that are there."""
        return sum(
            self.nbytes([[Box(0, 0, CELL, CELL)] * int(there.sum()) for there in done]) for done in self._done.values()
        )

    def changed(self, reader: SlideReader, wanted: np.ndarray) -> bool:
        """Whether the slide is no longer what the features of some cells were computed from; it is read again."""
        reader.check()
        return any(
            digest(reader.read(*window.bounds)) != known
            for window, known in self._digests.items()
            if (self.cells_of([window]) & wanted).any()
        )

    def intact(self) -> bool:
        """Whether the files are still there."""
        return all(maps.intact() for maps in self.maps.values())

    def remove(self) -> None:
        """Delete all files."""
        for maps in self.maps.values():
            maps.remove()
        self.maps, self._done, self._digests = {}, {}, {}

    # computing -------------------------------------------------------------------------------------------------------

    def compute(self, runner: StageRunner, version: Version, windows: Sequence[Sequence[Box]]) -> Iterator[Box]:
        """Run stages in windows and keep what they give; yield each window once it is there."""
        maps = self._opened(version)
        for index, (stage, own) in enumerate(zip(self.stages, windows)):
            below = partial(self._below, maps, stage)
            with closing(_results(runner, stage, version, own, below)) as results:
                for window, seen, found in results:
                    if seen is not None and self._digests.setdefault(window.grown(stage.halo), seen) != seen:
                        raise RuntimeError(
                            f"image {runner.reader.name!r} changed while its features were computed; call again once it is "
                            "as it should be"
                        )
                    for level, values in found.items():
                        maps.write(level, window, values)
                    maps.forget()  # what the stage read
                    self._done[version][index] |= self.cells_of([window])
                    yield window

    def _opened(self, version: Version) -> FeatureMaps:
        if version not in self.maps:
            kept = [level for stage in self.stages for level in stage.kept]
            strides, channels = ({level: of[level] for level in kept} for of in (self.strides, self.channels))
            self.maps[version] = FeatureMaps(
                scratch_root() / f"features-{uuid.uuid4().hex}", self.box, strides, channels
            )
            self._done[version] = np.zeros((len(self.stages), *self.cells), bool)
        return self.maps[version]

    def _below(self, maps: FeatureMaps, stage: Stage, window: Box) -> np.ndarray | None:
        if stage.starts_from is None:
            return None
        return np.ascontiguousarray(maps.read(stage.starts_from, window.grown(stage.halo)))

    def _blocks(self, stage: Stage) -> Iterator[Box]:
        """Cut the slide into the blocks in which a stage runs: of equal size, or, where the encoder runs whole, from the origin."""

        def side(n: int) -> int:
            if stage.index is None:
                return stage.window
            return -(-n // CELL // -(-n // stage.window)) * CELL

        height, width = side(self.box.height), side(self.box.width)
        for y in range(self.box.y, self.box.y + self.box.height, height):
            for x in range(self.box.x, self.box.x + self.box.width, width):
                yield Box(y, x, height, width).clipped(self.box)

    def _part(self, stage: Stage, cells: np.ndarray, block: Box) -> Iterator[Box]:
        """Return the smallest box around some cells in a block, if any.

        What an encoder without a reach gives may depend on the window: it runs on whole blocks.
        """
        at = block.within(self.box).divided(CELL)
        rows, columns = (np.flatnonzero(cells[at.slices].any(axis=axis)) for axis in (1, 0))
        if len(rows) and stage.index is None:
            yield block
        elif len(rows):
            y, x = at.y + int(rows[0]), at.x + int(columns[0])
            part = Box(y, x, at.y + int(rows[-1]) + 1 - y, at.x + int(columns[-1]) + 1 - x).scaled(CELL)
            yield Box(part.y + self.box.y, part.x + self.box.x, part.height, part.width)


def _results(
    runner: StageRunner, stage: Stage, version: Version, windows: Sequence[Box], below: Any
) -> Generator[tuple[Box, bytes | None, dict[int, np.ndarray]], None, None]:
    """Run a stage on windows, here with the encoder in the caller's thread, or where `parallel.run` runs tasks."""
    if runs_here():

        def see(window: Box) -> tuple[Box, np.ndarray, bytes | None]:
            return window, *seen_by(runner, stage, version, window, below(window))

        with closing(in_threads(see, windows, READERS)) as read:
            for window, seen, known in read:
                yield window, known, runner.run(stage, version, window, seen)
        return
    items = ((stage, version, window, below(window)) for window in windows)
    with closing(run(read_and_run, [runner], items, ordered=True)) as results:
        for (_, _, window, _), (known, found) in results:
            yield window, known, found
