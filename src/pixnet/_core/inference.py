"""Run a model over a slide, tile by tile: one runner for lazy, stored, resumed and distributed maps."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import itertools
import json
import pickle
import queue
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import cloudpickle
import dask.array as da
import dask.base
import numpy as np
import torch
from dask.highlevelgraph import HighLevelGraph
from torch import nn

from pixnet._core.layout import Box, Layout
from pixnet._core.masking import SlideExtent, TissueMask
from pixnet._core.tiling import SlideReader

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_FORWARD = threading.Lock()
"""One forward pass at a time in a process: it uses all of torch's threads, and its memory is what counts."""

_READY: OrderedDict[tuple[str, str], nn.Module] = OrderedDict()
_READY_SIZE = 2
_LOADING = threading.Lock()


# device and precision ----------------------------------------------------------------------------------------------


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to run on; None takes a GPU where there is one.

    With a cluster in scope a device that is named is taken at its word: this machine's devices say nothing of the workers'.

    Raises
    ------
    ValueError
        If the device is unknown or not there.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; valid: 'cpu', 'cuda', 'cuda:0', 'mps', ...") from error
    if cluster_client() is not None:
        return device
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device is {str(device)!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps'; torch sees no such device here")
    return device


def resolve_precision(precision: str | None, device: torch.device) -> str:
    """Return the arithmetic to run in; None takes bfloat16 where the device computes in it natively, else float32.

    Raises
    ------
    ValueError
        If the name is unknown, or float16 is asked of a CPU.
    """
    if precision is None:
        return "bfloat16" if _native_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; valid: None, {', '.join(map(repr, PRECISIONS))}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision is 'float16', which CPUs do not compute in; take 'bfloat16' or 'float32'")
    return precision


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        names = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")
        if capabilities:
            return any(capabilities.get(name) for name in names)
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(check is not None and check() for check in checks)
    return False


# the model ---------------------------------------------------------------------------------------------------------


class PackedModel:
    """A model as tasks carry it: pickled as bytes with a hash, unpacked once in a process.

    Parameters
    ----------
    model
        The model; a copy is kept, so that later training does not change a lazy map.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hash = model_hash(model)
        self._module = fold_norms(copy.deepcopy(model).eval().cpu())
        self._bytes: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._bytes is None:
            self._bytes = cloudpickle.dumps(self._module)
        return {"hash": self.hash, "_bytes": self._bytes, "_module": None}

    def ready(self, device: torch.device) -> nn.Module:
        """Return the model on a device, laid out for it; the same object each time in a process."""
        key = (self.hash, str(device))
        with _LOADING:
            if key not in _READY:
                module = pickle.loads(self._bytes) if self._module is None else self._module
                module = module if device.type == "cpu" else copy.deepcopy(module)
                _READY[key] = module.to(device=device, memory_format=torch.channels_last)
                while len(_READY) > _READY_SIZE:
                    _READY.popitem(last=False)
            _READY.move_to_end(key)
            return _READY[key]


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(getattr(model, "config", {}), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm that follows a convolution in a sequence into its weights: the same function, less work."""
    for child in module.children():
        fold_norms(child)
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        for first, second in zip(names, names[1:]):
            conv, norm = module._modules[first], module._modules[second]
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                module._modules[first] = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
                module._modules[second] = nn.Identity()
    return module


# the runner --------------------------------------------------------------------------------------------------------


class TileError(RuntimeError):
    """A tile that could not be read."""


@dataclass
class Work:
    """What a tile cost: seconds reading, in the model and writing, windows run, and pixels predicted."""

    read: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    windows: int = 0
    pixels: int = 0

    def add(self, other: Work) -> None:
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
    name
        Name of the slide, for messages.
    """

    def __init__(
        self,
        reader: SlideReader,
        mask: TissueMask | SlideExtent,
        model: PackedModel,
        layout: Layout,
        *,
        channels: Sequence[int] | None,
        n_channels: int,
        dtype: str = "float32",
        device: str = "cpu",
        precision: str = "float32",
        batch: int = 1,
        name: str = "image",
    ) -> None:
        self.reader, self.mask, self.model, self.layout = reader, mask, model, layout
        self.channels, self.n_channels = None if channels is None else list(channels), n_channels
        self.dtype, self.device, self.precision = np.dtype(dtype), device, precision
        self.batch, self.name = batch, name
        self.coarse = mask if layout.ratio == 1 else _coarser(mask, layout.ratio)

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

    def tile(self, i: int, j: int, work: Work | None = None) -> np.ndarray | None:
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
        work = Work() if work is None else work
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

    def _reduced(self, box: Box, fine: Box, work: Work) -> np.ndarray:
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

    def _windows(self, fine: Box, tissue: np.ndarray, work: Work) -> Iterator[tuple[Box, np.ndarray]]:
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
        for start in range(0, len(wanted), self.batch):
            part = wanted[start : start + self.batch]
            pixels = self._read(part, work)
            values = self._forward(pixels, work)
            for (i, j, inside), value in zip(part, values):
                top, left = inside.y - i * core, inside.x - j * core
                yield inside, value[:, top : top + inside.height, left : left + inside.width]
            work.windows += len(part)

    def read(self, y0: int, x0: int, size: int) -> np.ndarray:
        """Read a square of model pixels, ``(3, size, size)`` uint8.

        Raises
        ------
        TileError
            If the image cannot be read there.
        """
        try:
            return self.reader.read(y0, x0, size, size)
        except Exception as error:  # whatever a storage format raises
            py, px = self.layout.grid.px
            top, bottom, left, right = (
                max(0, round(v)) for v in (y0 * py, (y0 + size) * py, x0 * px, (x0 + size) * px)
            )
            raise TileError(
                f"pixels y {top} to {bottom}, x {left} to {right} of image {self.name!r} could not be read "
                f"({type(error).__name__}: {error}). If the file is damaged there, write the image again from its source; "
                "resume=True then goes on from what is done"
            ) from error

    def _read(self, part: Sequence[tuple[int, int, Box]], work: Work) -> np.ndarray:
        layout, start = self.layout, time.perf_counter()
        size = layout.window + 2 * layout.halo
        pixels = np.empty((len(part), 3, size, size), np.uint8)
        for k, (i, j, _) in enumerate(part):
            pixels[k] = self.read(i * layout.window - layout.halo, j * layout.window - layout.halo, size)
        work.read += time.perf_counter() - start
        return pixels

    def _forward(self, pixels: np.ndarray, work: Work) -> np.ndarray:
        """Run the model: uint8 ``(n, 3, y, x)`` to float32 ``(n, channels, core, core)``, without the halo."""
        return _in_callers_thread(lambda: self._forward_here(pixels, work))

    def _forward_here(self, pixels: np.ndarray, work: Work) -> np.ndarray:
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


def _coarser(mask: TissueMask | SlideExtent, ratio: float) -> TissueMask | SlideExtent:
    """Return the same mask, asked per larger pixel."""
    if isinstance(mask, SlideExtent):
        return SlideExtent((mask.shape[0] / ratio, mask.shape[1] / ratio))
    out = copy.copy(mask)
    out.to_mask = mask.to_mask @ np.diag([ratio, ratio, 1.0])
    return out


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


def store_tile(runner: TileRunner, target: Any, i: int, j: int) -> tuple[int, int, Work]:
    """Predict a tile and write it: the task of a stored map."""
    work = Work()
    out = runner.tile(i, j, work)
    if out is not None:
        start = time.perf_counter()
        box = runner.layout.box(i, j)
        target[:, box.y : box.y + box.height, box.x : box.x + box.width] = out
        work.write += time.perf_counter() - start
    return i, j, work


def run_tasks(
    function: Any, shared: Sequence[Any], items: Sequence[tuple[int, int]], threads: int = 3
) -> Iterator[Any]:
    """Run ``function(*shared, i, j)`` for all items and yield the results as they come.

    The tasks run on the ``dask.distributed`` client in scope, on the scheduler that dask is configured for, or on threads.

    Parameters
    ----------
    function
        The task.
    shared
        Its first arguments: they travel to a worker once.
    items
        Its last two arguments, one pair a task.
    threads
        Threads, where neither a client nor a scheduler is set.
    """
    get = dask.base.get_scheduler()
    client = cluster_client()
    if client is not None:
        yield from _on_cluster(client, function, shared, items)
    elif get is not None and "thread" not in getattr(get, "__module__", ""):
        yield from _on_scheduler(get, function, shared, items)
    else:
        yield from _on_threads(function, shared, items, threads)


def cluster_client() -> Any:
    """Return the ``dask.distributed`` client in scope; None where there is none, or another scheduler is configured."""
    if "distributed" not in sys.modules:
        return None
    owner = getattr(dask.base.get_scheduler(), "__self__", None)
    return owner if isinstance(owner, sys.modules["distributed"].Client) else None


def _on_threads(function: Any, shared: Sequence[Any], items: Sequence[Any], threads: int) -> Iterator[Any]:
    """Tasks run on threads that read and write; the caller's thread runs the model for them."""
    from concurrent.futures import ThreadPoolExecutor

    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pixnet", initializer=_serve, initargs=(events,))
    waiting, running = iter(items), 0
    try:
        with memory_kept():
            while True:
                for item in itertools.islice(waiting, threads - running):
                    pool.submit(function, *shared, *item).add_done_callback(events.put)
                    running += 1
                if not running:
                    return
                event = events.get()
                if isinstance(event, _Request):
                    event.run()
                else:
                    running -= 1
                    yield event.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while running:  # threads may wait for a forward pass: tell them that none will come
            event = events.get()
            if isinstance(event, _Request):
                event.refuse()
            else:
                running -= 1


_LOCAL = threading.local()


def _serve(events: queue.SimpleQueue[Any]) -> None:
    _LOCAL.events = events


class _Request:
    """A forward pass that a thread asks the caller's thread for, and waits for."""

    def __init__(self, function: Any) -> None:
        self.function, self.future = function, Future()

    def run(self) -> None:
        try:
            self.future.set_result(self.function())
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):  # Ctrl-C falls on this thread
                raise

    def refuse(self) -> None:
        self.future.set_exception(CancelledError())


def _in_callers_thread(function: Any) -> Any:
    events = getattr(_LOCAL, "events", None)
    if events is None:
        return function()
    request = _Request(function)
    events.put(request)
    return request.future.result()


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Have glibc keep freed memory, and give it back at the end.

    A forward pass frees and allocates hundreds of megabytes over and over. glibc asks the kernel for each large piece
    anew, and clearing those pages took a quarter of the time of a pass. It keeps them only in the main thread's arena,
    which is why the model runs there.
    """
    libc = None
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.gnu_get_libc_version  # noqa: B018  other libraries do not have it
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        if libc is not None:
            with contextlib.suppress(AttributeError):
                # what glibc itself arrives at in a process that frees large arrays
                libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
                libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
                libc.malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _graph(function: Any, shared: Sequence[Any], items: Sequence[Any]) -> tuple[dict[Any, Any], list[Any]]:
    import uuid

    token = uuid.uuid4().hex
    names = [f"pixnet-shared-{k}-{token}" for k in range(len(shared))]
    graph: dict[Any, Any] = dict(zip(names, shared))
    keys = [(f"pixnet-{function.__name__.strip('_')}-{token}", *item) for item in items]
    graph.update({key: (function, *names, *item) for key, item in zip(keys, items)})
    return graph, keys


def _on_scheduler(get: Any, function: Any, shared: Sequence[Any], items: Sequence[Any]) -> Iterator[Any]:
    # A few tasks at a time, so that results come while others run.
    for start in range(0, len(items), 64):
        graph, keys = _graph(function, shared, items[start : start + 64])
        yield from get(graph, keys)


def _on_cluster(client: Any, function: Any, shared: Sequence[Any], items: Sequence[Any]) -> Iterator[Any]:
    from distributed import as_completed

    graph, keys = _graph(function, shared, items)
    with warnings.catch_warnings():  # the model is in the graph on purpose: scattered, it would die with its worker
        warnings.filterwarnings("ignore", message="Sending large graph")
        futures = client.get(graph, keys, sync=False)
    try:
        for _, result in as_completed(futures, with_results=True):
            yield result
    finally:
        client.cancel(futures)
