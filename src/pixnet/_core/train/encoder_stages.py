"""The stages of an encoder, run on windows of a slide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixnet._core.predict.map_grid import Box
from pixnet._core.predict.placed import PlacedModel
from pixnet._core.predict.tile import TileCost
from pixnet._core.slide.reader import SlideReader
from pixnet._core.train.augment import Version, turn, turn_back
from pixnet.models._encoders import Encoder


@dataclass(frozen=True)
class Stage:
    """A part of an encoder that runs in windows.

    Attributes
    ----------
    index
        Which of the encoder's stages it is; None: the encoder is run whole.
    halo
        Model pixels that a window sees beyond each edge.
    window
        Side of the largest window (model pixels).
    starts_from
        Level that it starts from; None: the image.
    gives, kept
        Levels that it gives, and those of them that are kept.
    """

    index: int | None
    halo: int
    window: int
    starts_from: int | None
    gives: tuple[int, ...]
    kept: tuple[int, ...]


def stages_of(encoder: Encoder, levels: Sequence[int], window: int, halo: int) -> list[Stage]:
    """Return the stages of an encoder that states its reach, else the encoder as a single one, with a halo."""
    reach = getattr(encoder, "reach", None)
    if reach is None:
        return [Stage(None, halo, window, None, tuple(range(len(encoder.strides))), tuple(levels))]
    stages, start, first = [], 0, next(iter(reach))
    for index, (stride, pixels) in enumerate(reach.items()):
        last = list(encoder.strides).index(stride)
        kept = tuple(level for level in range(start, last + 1) if level in levels or level == last)
        # Deeper maps are smaller: larger windows take the same memory, and have less halo.
        side, seen = window * stride // first, -(-pixels // stride) * stride
        stages.append(Stage(index, seen, side, start - 1 if index else None, tuple(range(start, last + 1)), kept))
        start = last + 1
    return stages


class StageRunner:
    """Runs stages of an encoder on windows of a slide. It pickles.

    Parameters
    ----------
    reader
        Reads the slide in model pixels.
    encoder
        The encoder on its device.
    strides
        Of the encoder's levels.
    """

    def __init__(self, reader: SlideReader, encoder: PlacedModel, strides: Sequence[int]) -> None:
        self.reader, self.encoder, self.strides = reader, encoder, tuple(strides)

    def pixels(self, window: Box) -> np.ndarray:
        """Return the pixels of a window, uint8 ``(3, y, x)``."""
        pixels = self.reader.read(*window.bounds)
        self.reader.check()
        return pixels

    def run(self, stage: Stage, version: Version, window: Box, seen: np.ndarray) -> dict[int, np.ndarray]:
        """Return the features of a window, by level: float16 ``(y, x, C)``.

        ``seen`` are pixels or features ``(y, x, C)`` of the window with the halo of the stage.
        """
        found = {}
        with self.encoder.running(TileCost()) as model:
            if stage.starts_from is None:
                x = self.encoder.image(seen[None])
            else:
                x = torch.from_numpy(seen).to(self.encoder.device).permute(2, 0, 1)[None].float()
            if version.symmetry:
                x = turn(x, version.symmetry).contiguous(memory_format=torch.channels_last)
            maps = model(x) if stage.index is None else model.stage(stage.index, x)
            for level, feature in zip(stage.gives, maps):
                if level in stage.kept:
                    inner = window.within(window.grown(stage.halo)).divided(self.strides[level]).slices
                    feature = turn_back(feature[0], version.symmetry)[:, *inner].permute(1, 2, 0)
                    found[level] = feature.to("cpu", torch.float16).contiguous().numpy()
        return found


def read_and_run(
    runner: StageRunner, stage: Stage, version: Version, window: Box, below: np.ndarray | None
) -> tuple[bytes | None, dict[int, np.ndarray]]:
    """Run a stage where the slide is, on the features below or the pixels, and return a digest of these pixels."""
    seen, found = seen_by(runner, stage, version, window, below)
    return found, runner.run(stage, version, window, seen)


def seen_by(
    runner: StageRunner, stage: Stage, version: Version, window: Box, below: np.ndarray | None
) -> tuple[np.ndarray, bytes | None]:
    """Return what a stage sees of a window, and a digest of the pixels where it sees these."""
    if below is not None:
        return below, None
    around = window.grown(stage.halo)
    pixels = runner.pixels(around)
    return version.restained(pixels, around), digest(pixels)


def digest(pixels: np.ndarray) -> bytes:
    """Return what tells pixels from others."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
