"""A model on its device: how pixels get there, in what arithmetic it runs, how values come back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixnet._core.predict.device import PRECISIONS
from pixnet._core.predict.portable_model import PortableModel
from pixnet._core.predict.tile import TileCost
from pixnet._logging import logger

_FORWARD = threading.Lock()
"""One forward pass at a time in a process: it uses all of torch's threads, and its memory is what counts."""


class PlacedModel:
    """A model, its device and its arithmetic. It pickles.

    Parameters
    ----------
    model
        The model.
    device, precision
        Device and arithmetic.
    channels
        Indices of the channels to predict, the total's last; None: all of them.
    batch
        Windows that run at once; lowered, with a line in the log, where the device's memory is too small.
    """

    def __init__(
        self, model: PortableModel, device: str, precision: str, channels: Sequence[int] | None, batch: int
    ) -> None:
        self.model, self.device, self.precision, self.batch = model, device, precision, batch
        self.channels = None if channels is None else torch.tensor(list(channels))

    @property
    def novelty_side(self) -> int | None:
        """Model output pixels per pixel of novelty, along an axis; None for a model that does not know what is new to it."""
        model: Any = self.model.ready(torch.device(self.device))
        novelty = getattr(model, "novelty", None)
        return novelty.stride // model.stride if novelty is not None and novelty.known else None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    @property
    def channels_there(self) -> Tensor | None:
        """The channels, on the device."""
        return None if self.channels is None else self.channels.to(self.device)

    @contextlib.contextmanager
    def running(self, cost: TileCost) -> Iterator[Any]:
        """Run what is in the block on the model, alone in this process; its seconds are those of the model."""
        device, lowered = torch.device(self.device), PRECISIONS[self.precision]
        model = self.model.ready(device)
        autocast = torch.autocast(device.type, dtype=lowered, enabled=lowered is not None)
        with _FORWARD, torch.inference_mode(), autocast:
            start = time.perf_counter()
            yield model
            cost.forward += time.perf_counter() - start

    def image(self, pixels: np.ndarray) -> Tensor:
        """Return pixels, uint8 ``(n, 3, y, x)``, as an image in 0 to 1 on the device."""
        image = torch.from_numpy(pixels)
        if self.on_gpu:
            image = image.pin_memory()
        image = image.to(self.device, non_blocking=self.on_gpu)
        return image.to(memory_format=torch.channels_last).float().div_(255)

    def values(self, out: Tensor) -> np.ndarray:
        """Return values of the model as float32."""
        out = out.float()
        if not self.on_gpu:
            return out.cpu().numpy()
        pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        pinned.copy_(out, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return pinned.numpy()

    def in_batches(self, function: Callable[[slice], None], n: int, side: int) -> None:
        """Call ``function(part)`` for parts of ``n`` windows, halved where the device's memory does not hold one.

        Windows do not know of each other. ``side`` is theirs in pixels, for the error where it does not hold even one.
        """
        start = 0
        while start < n:
            size = min(self.batch, n - start)
            try:
                function(slice(start, start + size))
                start += size
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise RuntimeError(
                        f"the memory of device {self.device!r} does not hold one window of the model "
                        f"({side} x {side} px): free some of it, or predict with device='cpu'"
                    ) from error
                if self.on_gpu:
                    torch.cuda.empty_cache()
                self.batch = size // 2
                logger.info("the memory of device %r is too small; windows run at once: %d", self.device, self.batch)
