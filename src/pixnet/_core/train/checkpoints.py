"""Where a run of training was after its last pass, on disk, so that one that was interrupted can go on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pixnet._core.predict.portable_model import model_hash
from pixnet._core.slide.stain import sample
from pixnet._core.train.crops import Section
from pixnet._core.train.options import TrainingOptions
from pixnet._logging import logger
from pixnet._settings import settings
from pixnet.models._pixnet import PixNet


class Checkpoints:
    """The checkpoint of one run, told from others by all that decides what it gives.

    Parameters
    ----------
    job
        Tells the run from others (see `job_hash`).
    """

    def __init__(self, job: str) -> None:
        self.path = Path(settings.scratch_dir) / "pixnet-training" / f"{job[:32]}.pt"
        self._failed = False

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last; None if there is nothing that can be read."""
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("the checkpoint %s cannot be read (%s)", self.path, error)
            return None

    def save(self, content: dict[str, Any]) -> None:
        """Replace what was saved; a disk that is full does not end the training."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._failed:
                logger.warning(
                    "the state of training cannot be kept in settings.scratch_dir, %r (%s): if the run is interrupted, it has "
                    "to start again",
                    str(settings.scratch_dir),
                    error,
                )
            self._failed = True

    def remove(self) -> None:
        """Delete the checkpoint, and its folder when it was the last one."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.path.parent.rmdir()


def job_hash(
    model: PixNet,
    training: Sequence[Section],
    validation: Sequence[Section],
    options: TrainingOptions,
    seed: int,
    device: str,
) -> str:
    """Return a hash of all that decides what training gives: the model, the settings, what was measured, and the slides.

    Of each slide a few windows are read.
    """
    found = hashlib.sha256(repr((model_hash(model), options, seed, device, len(training))).encode())
    for section in [*training, *validation]:
        found.update(repr((section.name, section.grid)).encode())
        for targets in section.targets:
            found.update(repr((targets.name, targets.panel, targets.within_panel)).encode())
            for values in (targets.shapes.bounds, targets.umi, targets.counts.data, targets.counts.indices):
                found.update(values.tobytes())
        for pixels, _ in sample(section.reader, section.mask):
            found.update(pixels.tobytes())
    return found.hexdigest()
