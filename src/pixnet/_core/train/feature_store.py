"""Features of slides, computed once: found again by whoever asks for the same in this process."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from dask.base import tokenize
from torch import nn
from tqdm.auto import tqdm

from pixnet._core.parallel import in_threads, run, runs_here
from pixnet._core.predict.device import resolve_precision
from pixnet._core.predict.malloc import memory_kept
from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.portable_model import PortableModel, model_hash
from pixnet._core.predict.tile import TileCost
from pixnet._core.scratch import scratch_root
from pixnet._core.slide.reader import SlideReader
from pixnet._core.train.augment import Version
from pixnet._core.train.encoder_stages import Stage, StageRunner, digest, read_and_run, seen_by, stages_of
from pixnet._core.train.feature_maps import FeatureMaps
from pixnet._logging import logger
from pixnet._settings import settings
from pixnet.models._encoders import Encoder

CELL = 64
"""Model pixels of a cell, by which is counted what is there."""

SPARE = 256e6
"""Bytes of the disk that are left free."""

WORTH_TIMING = 30.0
"""Megapixels of windows from which on the time is estimated."""

READERS = 2
"""Threads that read ahead of the encoder."""

_FEATURES: OrderedDict[Any, SlideFeatures] = OrderedDict()
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Wanted:
    """Parts of a slide whose features are wanted, in some versions. Boxes are in model pixels."""

    reader: SlideReader
    boxes: Sequence[Box]
    versions: Sequence[Version]


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
        margin = max(sum(stage.halo for stage in stages[:-1]), 1)
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
            windows = [window for block in self._blocks(stage.window) for window in self._part(wanted & ~there, block)]
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
                    self._done[version][index] |= self.cells_of([window])
                    yield window
            maps.forget()

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

    def _blocks(self, largest: int) -> Iterator[Box]:
        """Cut the slide into equal blocks of at most ``largest`` pixels a side."""

        def side(n: int) -> int:
            cells = -(-n // CELL)
            return -(-cells // -(-n // max(largest, CELL))) * CELL

        height, width = side(self.box.height), side(self.box.width)
        for y in range(self.box.y, self.box.y + self.box.height, height):
            for x in range(self.box.x, self.box.x + self.box.width, width):
                yield Box(y, x, height, width).clipped(self.box)

    def _part(self, cells: np.ndarray, block: Box) -> Iterator[Box]:
        """Return the smallest box around some cells in a block, if any."""
        at = block.within(self.box).divided(CELL)
        rows, columns = (np.flatnonzero(cells[at.slices].any(axis=axis)) for axis in (1, 0))
        if len(rows):
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


# the features of this process ----------------------------------------------------------------------------------------


def slide_features(
    wanted: Sequence[Wanted],
    encoder: Encoder,
    levels: Sequence[int],
    *,
    window: int,
    halo: int,
    device: str,
) -> list[SlideFeatures]:
    """Return the features of slides; what is not there yet is computed.

    Parameters
    ----------
    wanted
        Slides, and what is wanted of them; the same slide may come several times.
    encoder
        The encoder.
    levels
        Its levels that are wanted.
    window, halo
        Side of the windows, and what one sees beyond its edges where the encoder runs whole (model pixels).
    device
        Torch device.

    Raises
    ------
    OSError
        If the disk does not hold them; nothing is computed then.
    """
    stages = stages_of(encoder, levels, window, halo)
    precision = resolve_precision(None, torch.device(device))
    of_encoder = (encoder_key(encoder), tuple(stages), precision, torch.device(device).type)
    with _LOCK, memory_kept():
        found, cells = [], {}
        for one in wanted:
            key = (tokenize(one.reader.array), one.reader.grid, one.reader.name, of_encoder)
            if key not in _FEATURES:
                _FEATURES[key] = SlideFeatures(one.reader.grid.shape, stages, encoder.strides, encoder.channels)
            _FEATURES.move_to_end(key)
            features = _FEATURES[key]
            found.append(features)
            for version in one.versions:
                before = cells.get((key, version), False)
                cells[key, version] = before | features.cells_of(one.boxes)
        readers = {id(features): one.reader for features, one in zip(found, wanted)}
        _check_unchanged(readers, {key: of for (key, _), of in cells.items()})
        jobs = [(_FEATURES[key], version, _FEATURES[key].missing(version, of)) for (key, version), of in cells.items()]
        jobs = [job for job in jobs if any(job[2])]
        if jobs:
            _compute(jobs, readers, encoder, device, precision, {id(features) for features in found})
        else:
            logger.info("the features of these slides are there already")
        return found


def encoder_key(encoder: nn.Module) -> Any:
    """Return what tells an encoder from others in this process: its weights, its classes and their plain attributes."""
    plain = (bool, int, float, str, tuple, list, type(None))
    parts = [
        (type(m), tuple(sorted((k, repr(v)) for k, v in vars(m).items() if k[0] != "_" and isinstance(v, plain))))
        for m in encoder.modules()
    ]
    return model_hash(encoder), tuple((of, tuple(p for p in rest if p[0] != "training")) for of, rest in parts)


def _check_unchanged(readers: Mapping[int, SlideReader], cells: Mapping[Any, np.ndarray]) -> None:
    """Drop features whose files are gone, or whose slide was changed."""
    for key, wanted in cells.items():
        features = _FEATURES[key]
        name = readers[id(features)].name
        if not features.intact():
            logger.warning("another process removed features of image %r; they are computed again", name)
            features.remove()
        elif features.changed(readers[id(features)], wanted):
            logger.info("image %r changed since its features were computed; they are computed again", name)
            features.remove()


def _compute(
    jobs: Sequence[tuple[SlideFeatures, Version, list[list[Box]]]],
    readers: Mapping[int, SlideReader],
    encoder: Encoder,
    device: str,
    precision: str,
    in_use: set[int],
) -> None:
    """Estimate, make room, and compute."""
    nbytes = sum(features.nbytes(windows) for features, _, windows in jobs)
    placed = PlacedModel(PortableModel(encoder), device, precision, None, 1)
    seconds = _seconds(jobs, placed, encoder)
    _make_room(nbytes, in_use)
    n = len({id(features) for features, *_ in jobs})
    logger.info(
        "features of %d %s: %s on disk in %s%s; later calls in this process find them again",
        n,
        "slide" if n == 1 else "slides",
        _size(nbytes),
        settings.scratch_dir,
        "" if seconds is None else f", about {max(seconds / 60, 0.1):.1f} min",
    )
    total = sum(_cost(stage, w) for features, _, of in jobs for stage, own in zip(features.stages, of) for w in own)
    try:
        with tqdm(
            total=round(total, 1), desc="features", unit="Mpx", file=sys.stderr, disable=not settings.progress
        ) as bar:
            for features, version, windows in jobs:
                runner = StageRunner(readers[id(features)], placed, encoder.strides)
                each = [_cost(stage, w) for stage, own in zip(features.stages, windows) for w in own]
                for cost, _ in zip(each, features.compute(runner, version, windows)):
                    bar.update(round(cost, 1))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(error.errno, nbytes) from error
        raise


def _cost(stage: Stage, window: Box) -> float:
    """Return megapixels that a stage runs on for a window; deeper stages cost about a quarter of the first for each."""
    around = window.grown(stage.halo)
    return around.height * around.width / 1e6 * (1.0 if stage.starts_from is None else 0.25)


def _seconds(
    jobs: Sequence[tuple[SlideFeatures, Version, list[list[Box]]]], placed: PlacedModel, encoder: Encoder
) -> float | None:
    """Estimate the seconds by a run of the whole encoder on a small image; None where it is not worth that."""
    total = sum(_cost(stage, w) for features, _, of in jobs for stage, own in zip(features.stages, of) for w in own)
    if total < WORTH_TIMING or not runs_here():
        return None
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 256, 256), dtype=np.uint8)
    least = np.inf
    for _ in range(2):
        with placed.running(TileCost()) as model:
            start = time.perf_counter()
            [f.cpu() for f in model(placed.image(pixels))]
            least = min(least, time.perf_counter() - start)
        if least > 2:
            break
    shares = 1.5 if len(next(iter(jobs))[0].stages) > 1 else 1.0  # what the stages cost together, as `_cost` counts
    return least / (256 * 256 / 1e6 * shares) * total


def _make_room(nbytes: int, in_use: set[int]) -> None:
    """Delete the features that were asked for longest ago until others fit, or refuse them."""
    free = shutil.disk_usage(scratch_root()).free - SPARE
    for key, features in list(_FEATURES.items()):
        if nbytes <= free:
            return
        if id(features) not in in_use:
            free += features.holds()
            features.remove()
            del _FEATURES[key]
    if nbytes > free:
        raise _full(errno.ENOSPC, nbytes)


def _full(code: int, nbytes: int) -> OSError:
    free = shutil.disk_usage(scratch_root()).free
    return OSError(
        code,
        f"features of the training slides take {_size(nbytes)}, and the disk of settings.scratch_dir, "
        f"{str(settings.scratch_dir)!r}, has {_size(free)} free: set it to a folder with more room "
        "(pixnet.settings.scratch_dir = ..., or PIXNET_SCRATCH_DIR), or train with variants=1, which takes half",
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{max(nbytes / 1e6, 0.1):.1f} MB"


def forget_features() -> None:
    """Delete all features of this process."""
    with _LOCK:
        for features in _FEATURES.values():
            features.remove()
        _FEATURES.clear()
