"""Run many independent tasks: on threads of this process, on a scheduler that dask is set to, or on a cluster."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import dask.base


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
    desk = _Desk()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pixnet", initializer=_serve, initargs=(desk,))
    waiting, running = iter(items), 0
    try:
        with memory_kept():
            while True:
                for item in itertools.islice(waiting, threads - running):
                    pool.submit(function, *shared, *item).add_done_callback(desk.events.put)
                    running += 1
                if not running:
                    return
                event = desk.events.get()
                if isinstance(event, _Request):
                    event.run()
                else:
                    running -= 1
                    yield event.result()
    finally:
        # Ctrl-C may have come between any two steps above and lost an event, so none is counted on here.
        desk.closed = True
        pool.shutdown(wait=True, cancel_futures=True)


class _Desk:
    """Where threads hand in what the caller's thread has to do or know."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.closed = False


_LOCAL = threading.local()


def _serve(desk: _Desk) -> None:
    _LOCAL.desk = desk


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

    def answer(self, desk: _Desk) -> Any:
        """Wait for the result, or until nobody is there any more to give one."""
        while not self.future.done():
            if desk.closed:
                raise CancelledError
            wait([self.future], timeout=0.2)
        return self.future.result()


def in_callers_thread(function: Any) -> Any:
    """Call a function in the thread that called :func:`run_tasks`, or here if this is none of its threads."""
    desk = getattr(_LOCAL, "desk", None)
    if desk is None:
        return function()
    request = _Request(function)
    desk.events.put(request)
    return request.answer(desk)


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


# ordered tasks ---------------------------------------------------------------------------------------------------

Task = TypeVar("Task")


def client_in_scope() -> Any | None:
    """Return the dask.distributed client that is in scope, if there is one (the module is loaded then)."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_client()
    except ValueError:
        return None


def n_threads() -> int:
    """Return how many threads this process may keep busy, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, 8))


def in_threads(tasks: Iterable[Task], run: Callable[[Task], Any]) -> Iterator[tuple[Task, Any]]:
    """Run tasks in threads, a few ahead of the one whose result is taken."""
    workers = n_threads()
    with ThreadPoolExecutor(workers, thread_name_prefix="pixnet") as pool:
        yield from in_order(tasks, lambda task: pool.submit(run, task), workers + 1)


def in_order(tasks: Iterable[Task], submit: Callable[[Task], Any], ahead: int) -> Iterator[tuple[Task, Any]]:
    """Keep up to ``ahead`` futures going, and yield ``(task, result)`` in the order of the tasks."""
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append((task, submit(task)))
            if len(waiting) >= ahead:
                task, future = waiting.popleft()
                yield task, future.result()
        while waiting:
            task, future = waiting.popleft()
            yield task, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
