"""Features of slides, computed once: found again by whoever asks for the same in this process."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dask.base import tokenize
from torch import nn
from tqdm.auto import tqdm

from pixnet._core.malloc import memory_kept
from pixnet._core.parallel import runs_here
from pixnet._core.predict.device import resolve_precision
from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.portable_model import PortableModel, model_hash
from pixnet._core.predict.tile import TileCost
from pixnet._core.scratch import scratch_root
from pixnet._core.slide.reader import SlideReader
from pixnet._core.train.augment import Version
from pixnet._core.train.encoder_stages import Stage, StageRunner, stages_of
from pixnet._core.train.slide_features import SlideFeatures
from pixnet._logging import logger
from pixnet._settings import settings
from pixnet.models._encoders import Encoder

SPARE = 256e6
"""Bytes of the disk that are left free."""

WORTH_TIMING = 30.0
"""Megapixels of windows from which on the time is estimated."""

_FEATURES: OrderedDict[Any, SlideFeatures] = OrderedDict()
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Wanted:
    """Parts of a slide whose features are wanted, in some versions. Boxes are in model pixels."""

    reader: SlideReader
    boxes: Sequence[Box]
    versions: Sequence[Version]


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
        found: list[SlideFeatures] = []
        cells: dict[tuple[Any, Version], np.ndarray] = {}
        for one in wanted:
            key = (tokenize(one.reader.array), one.reader.grid, one.reader.name, of_encoder)
            if key not in _FEATURES:
                _FEATURES[key] = SlideFeatures(one.reader.grid.shape, stages, encoder.strides, encoder.channels)
            _FEATURES.move_to_end(key)
            features = _FEATURES[key]
            found.append(features)
            for version in one.versions:
                own = features.cells_of(one.boxes)
                cells[key, version] = own | cells.get((key, version), own)
        readers = {id(features): one.reader for features, one in zip(found, wanted)}
        for (key, _), of in cells.items():
            _check_unchanged(_FEATURES[key], readers[id(_FEATURES[key])], of)
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


def _check_unchanged(features: SlideFeatures, reader: SlideReader, wanted: np.ndarray) -> None:
    """Drop features whose files are gone, or whose slide was changed."""
    if not features.intact():
        logger.warning("another process removed features of image %r; they are computed again", reader.name)
        features.remove()
    elif features.changed(reader, wanted):
        logger.info("image %r changed since its features were computed; they are computed again", reader.name)
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
    _make_room(nbytes, in_use)
    placed = PlacedModel(PortableModel(encoder), device, precision, None, 1)
    seconds = _seconds(jobs, placed)
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
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise _full(error.errno, nbytes) from error
        raise


def _cost(stage: Stage, window: Box) -> float:
    """Return megapixels that a stage runs on for a window; deeper stages cost about a quarter of the first for each."""
    around = window.grown(stage.halo)
    return around.height * around.width / 1e6 * (1.0 if stage.starts_from is None else 0.25)


def _seconds(jobs: Sequence[tuple[SlideFeatures, Version, list[list[Box]]]], placed: PlacedModel) -> float | None:
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


def _full(code: int | None, nbytes: int) -> OSError:
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
