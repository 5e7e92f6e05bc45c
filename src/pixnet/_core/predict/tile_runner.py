"""Run a model over a slide, tile by tile: one runner for lazy, stored, resumed and distributed maps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import torch
from dask.highlevelgraph import HighLevelGraph

from pixnet._core.parallel import in_callers_thread
from pixnet._core.predict.device import PRECISIONS
from pixnet._core.predict.map_grid import Box, MapGrid
from pixnet._core.predict.portable_model import PortableModel
from pixnet._core.slide.mask import SlideExtent, TissueMask
from pixnet._core.slide.reader import SlideReader

_FORWARD = threading.Lock()
"""One forward pass at a time in a process: it uses all of torch's threads, and its memory is what counts."""


# the runner --------------------------------------------------------------------------------------------------------


@dataclass
class TileCost:
    """What a tile cost: seconds reading, in the model and writing, windows run, and pixels predicted."""

    read: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    windows: int = 0
    pixels: int = 0

    def add(self, other: TileCost) -> None:
        """Add another tile's cost."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


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
    layout
        Where the tiles lie.
    channels
        Indices of the model's channels that the map holds, the total last; None: all of them.
    n_channels
        Number of channels of the map.
    dtype
        Of the map.
    device, precision
        Where and in which arithmetic to run.
    batch
        Windows of a tile that run at once.
    """

    def __init__(
        self,
        reader: SlideReader,
        mask: TissueMask | SlideExtent,
        model: PortableModel,
        layout: MapGrid,
        *,
        channels: Sequence[int] | None,
        n_channels: int,
        dtype: str = "float32",
        device: str = "cpu",
        precision: str = "float32",
        batch: int = 1,
    ) -> None:
        self.reader, self.mask, self.model, self.layout = reader, mask, model, layout
        self.channels, self.n_channels = None if channels is None else list(channels), n_channels
        self.dtype, self.device, self.precision = np.dtype(dtype), device, precision
        self.batch = batch
        self.coarse = mask if layout.ratio == 1 else mask.coarser(layout.ratio)

    def may_have_tissue(self, i: int, j: int) -> bool:
        """Return False for tiles that are background for sure, at the cost of a glance at the mask."""
        box = self.layout.box(i, j)
        if isinstance(self.coarse, SlideExtent):
            return True
        corners = np.array([[x, y, 1] for y in (box.y, box.y + box.height) for x in (box.x, box.x + box.width)])
        x, y, _ = self.coarse.to_mask @ corners.T
        rows = slice(max(int(np.floor(y.min())) - 1, 0), max(int(np.ceil(y.max())) + 1, 0))
        cols = slice(max(int(np.floor(x.min())) - 1, 0), max(int(np.ceil(x.max())) + 1, 0))
        return bool(self.coarse.mask[rows, cols].any())

    def tiles(self) -> list[tuple[int, int]]:
        """Return the tiles that may hold tissue, row by row."""
        rows, cols = self.layout.tiles
        return [(i, j) for i in range(rows) for j in range(cols) if self.may_have_tissue(i, j)]

    def tile(self, i: int, j: int, work: TileCost | None = None) -> np.ndarray | None:
        """Predict tile ``(i, j)``.

        Parameters
        ----------
        i, j
            Row and column of the tile.
        work
            What it cost is added here.

        Returns
        -------
        ndarray or None
            ``(channels, y, x)``, NaN on background; None where all of it is background.
        """
        work = TileCost() if work is None else work
        layout, box = self.layout, self.layout.box(i, j)
        tissue = self.coarse.window(box.y, box.x, box.height, box.width)
        if not tissue.any():
            return None
        fine = layout.fine(box)
        if layout.ratio == 1:
            out = np.full((self.n_channels, box.height, box.width), np.nan, self.dtype)
            for window, values in self._windows(fine, tissue, work):
                out[:, window.y - box.y :, window.x - box.x :][:, : window.height, : window.width] = values
            out[:, ~tissue] = np.nan
        else:
            out = self._reduced(box, fine, work)
            out[:, ~tissue] = np.nan
        work.pixels += int(tissue.sum())
        return out

    def _reduced(self, box: Box, fine: Box, work: TileCost) -> np.ndarray:
        """Area means of the model's tissue pixels."""
        layout = self.layout
        mask = self.mask.window(fine.y, fine.x, fine.height, fine.width)
        total = np.zeros((self.n_channels, box.height, box.width), np.float32)
        area = np.zeros((box.height, box.width), np.float32)
        for window, values in self._windows(fine, mask, work):
            # Only the map pixels that this window touches.
            y0 = max(int((window.y + 1e-6) / layout.ratio), box.y)
            y1 = min(int(np.ceil((window.y + window.height) / layout.ratio - 1e-6)), box.y + box.height)
            x0 = max(int((window.x + 1e-6) / layout.ratio), box.x)
            x1 = min(int(np.ceil((window.x + window.width) / layout.ratio - 1e-6)), box.x + box.width)
            wy = layout.shares(0, y0, y1 - y0, window.y, window.height)
            wx = layout.shares(1, x0, x1 - x0, window.x, window.width)
            inside = mask[window.y - fine.y :, window.x - fine.x :][: window.height, : window.width]
            values = np.where(inside, values, 0)
            part = (slice(y0 - box.y, y1 - box.y), slice(x0 - box.x, x1 - box.x))
            total[(slice(None), *part)] += wy @ values @ wx.T
            area[part] += wy @ inside.astype(np.float32) @ wx.T
        with np.errstate(invalid="ignore", divide="ignore"):
            return (total / area).astype(self.dtype)

    def _windows(self, fine: Box, tissue: np.ndarray, work: TileCost) -> Iterator[tuple[Box, np.ndarray]]:
        """Run the windows behind a box that hold tissue; yield each one's part of the box, and its values there."""
        layout = self.layout
        core = layout.core
        wanted = []
        for i, j in layout.windows(fine):
            y0, x0 = max(i * core, fine.y), max(j * core, fine.x)
            y1 = min((i + 1) * core, fine.y + fine.height)
            x1 = min((j + 1) * core, fine.x + fine.width)
            if tissue[y0 - fine.y : y1 - fine.y, x0 - fine.x : x1 - fine.x].any():
                wanted.append((i, j, Box(y0, x0, y1 - y0, x1 - x0)))
        batch = self.batch  # it may shrink on the way
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            pixels = self._read(part, work)
            values = self._forward(pixels, work)
            for (i, j, inside), value in zip(part, values):
                top, left = inside.y - i * core, inside.x - j * core
                yield inside, value[:, top : top + inside.height, left : left + inside.width]
            work.windows += len(part)

    def _read(self, part: Sequence[tuple[int, int, Box]], work: TileCost) -> np.ndarray:
        layout, start = self.layout, time.perf_counter()
        size = layout.window + 2 * layout.halo
        pixels = np.empty((len(part), 3, size, size), np.uint8)
        for k, (i, j, _) in enumerate(part):
            pixels[k] = self.reader.read(i * layout.window - layout.halo, j * layout.window - layout.halo, size, size)
        work.read += time.perf_counter() - start
        return pixels

    def _forward(self, pixels: np.ndarray, work: TileCost) -> np.ndarray:
        """Run the model: uint8 ``(n, 3, y, x)`` to float32 ``(n, channels, core, core)``, without the halo."""
        return in_callers_thread(lambda: self._forward_fitting(pixels, work))

    def _forward_fitting(self, pixels: np.ndarray, work: TileCost) -> np.ndarray:
        """Run a batch, in halves where the GPU's memory does not hold it: windows do not know of each other."""
        try:
            return self._forward_here(pixels, work)
        except torch.OutOfMemoryError as error:
            if len(pixels) == 1:
                raise RuntimeError(
                    f"the memory of device {self.device!r} does not hold one window of the model "
                    f"({pixels.shape[-1]} x {pixels.shape[-1]} px): free some of it, or predict with device='cpu'"
                ) from error
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.batch = min(self.batch, len(pixels) // 2)  # and from here on
        return np.concatenate([self._forward_fitting(part, work) for part in np.array_split(pixels, 2)])

    def _forward_here(self, pixels: np.ndarray, work: TileCost) -> np.ndarray:
        device = torch.device(self.device)
        model = self.model.ready(device)
        image = torch.from_numpy(pixels)
        gpu = device.type == "cuda"
        if gpu:
            image = image.pin_memory()
        lowered = PRECISIONS[self.precision]
        with _FORWARD, torch.inference_mode():
            start = time.perf_counter()
            image = image.to(device, non_blocking=gpu).to(memory_format=torch.channels_last).float().div_(255)
            channels = None if self.channels is None else torch.tensor(self.channels, device=device)
            with torch.autocast(device.type, dtype=lowered, enabled=lowered is not None):
                out = model(image, channels, self.layout.halo // self.layout.grid.stride)
            out = out.float()
            if gpu:
                pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
                out = pinned.copy_(out, non_blocking=True)
                torch.cuda.synchronize(device)
            else:
                out = out.cpu()
            work.forward += time.perf_counter() - start
        return out.numpy()


# graphs ------------------------------------------------------------------------------------------------------------


def lazy_map(runner: TileRunner, token: str) -> da.Array:
    """Return the map as a dask array, one task a tile; the runner is one key of the graph, shared by all.

    Parameters
    ----------
    runner
        The runner.
    token
        What makes the map what it is; equal tokens mean equal maps.
    """
    layout = runner.layout
    name, shared = f"pixnet-map-{token}", f"pixnet-runner-{token}"
    graph: dict[Any, Any] = {shared: runner}
    rows, cols = layout.tiles
    for i in range(rows):
        for j in range(cols):
            graph[name, 0, i, j] = (_lazy_tile, shared, i, j)
    chunks = (
        (runner.n_channels,),
        tuple(layout.box(i, 0).height for i in range(rows)),
        tuple(layout.box(0, j).width for j in range(cols)),
    )
    return da.Array(HighLevelGraph.from_collections(name, graph, []), name, chunks, dtype=runner.dtype)


def _lazy_tile(runner: TileRunner, i: int, j: int) -> np.ndarray:
    out = runner.tile(i, j)
    if out is None:
        box = runner.layout.box(i, j)
        out = np.full((runner.n_channels, box.height, box.width), np.nan, runner.dtype)
    return out


def store_tile(runner: TileRunner, target: Any, i: int, j: int) -> tuple[int, int, TileCost]:
    """Predict a tile and write it: the task of a stored map."""
    work = TileCost()
    out = runner.tile(i, j, work)
    if out is not None:
        start = time.perf_counter()
        box = runner.layout.box(i, j)
        target[:, box.y : box.y + box.height, box.x : box.x + box.width] = out
        work.write += time.perf_counter() - start
    return i, j, work
