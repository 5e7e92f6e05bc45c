"""Run many independent tasks: on threads, on the scheduler that dask is configured for, or on a Dask cluster."""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, tee
from typing import Any

import dask
import dask.threaded

BATCH = 64
"""Tasks given to a scheduler of dask at a time: results come while others wait."""


def run(
    function: Callable[..., Any],
    shared: Sequence[Any],
    items: Iterable[tuple[Any, ...]],
    *,
    ordered: bool = False,
    threads: int | None = None,
) -> Generator[tuple[tuple[Any, ...], Any], None, None]:
    """Call ``function(*shared, *item)`` for each item and yield ``(item, result)``.

    The calls run on the ``dask.distributed`` client in scope, on the scheduler that dask is configured for
    (``dask.config.set(scheduler=...)``), or on threads of this process. The first error ends them all. Close the
    iterator to be sure that no call is running any more.

    Parameters
    ----------
    function
        The task. It must pickle where tasks run in other processes.
    shared
        Its first arguments. They travel to each worker once.
    items
        Its other arguments, a tuple for each call. A dask collection among them is computed where the call runs.
    ordered
        Take only a few items ahead, and yield in their order. Otherwise a cluster gets all items at once, and results
        come as they are ready.
    threads
        Number of threads, where neither a client nor another scheduler is in use. None: `n_threads`.
    """
    client = cluster_client()
    if client is not None:
        yield from _on_cluster(client, function, shared, items, ordered)
    elif runs_here():
        yield from in_threads(lambda item: (item, function(*shared, *_computed(item))), items, threads)
    else:
        yield from _on_scheduler(function, shared, items)


def in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int | None = None
) -> Generator[Any, None, None]:
    """Call ``function(item)`` on threads of this process, a few items ahead, and yield the results in order.

    Items are taken in the caller's thread, between two results.
    """
    threads = n_threads() if threads is None else threads
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pixnet")
    try:
        yield from _in_order((pool.submit(function, item) for item in items), threads)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def runs_here() -> bool:
    """Whether `run` uses threads of this process."""
    return dask.base.get_scheduler() in (None, dask.threaded.get)


def cluster_client() -> Any | None:
    """Return the ``dask.distributed`` client in scope; None if there is none, or dask is set to another scheduler."""
    if "distributed" not in sys.modules:
        return None
    owner = getattr(dask.base.get_scheduler(), "__self__", None)
    return owner if isinstance(owner, sys.modules["distributed"].Client) else None


def n_threads() -> int:
    """Return the number of threads for tasks: ``num_workers`` of dask's configuration, else one a core, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(dask.config.get("num_workers", None) or min(available, 8))


def _in_order(futures: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield the results of futures in order, and take up to ``ahead`` more futures before waiting for one."""
    waiting: deque[Any] = deque()
    try:
        for future in futures:
            waiting.append(future)
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _computed(item: tuple[Any, ...]) -> list[Any]:
    """Compute the dask collections of an item in this thread."""
    return [arg.compute(scheduler="synchronous") if dask.is_dask_collection(arg) else arg for arg in item]


def _on_scheduler(function: Callable[..., Any], shared: Sequence[Any], items: Iterable[Any]) -> Iterator[Any]:
    """Run tasks on the scheduler that dask is configured for."""
    held = [dask.delayed(value, name=f"pixnet-{uuid.uuid4().hex}", traverse=False) for value in shared]
    task = dask.delayed(function, pure=False, traverse=False)
    items = iter(items)
    while batch := list(islice(items, BATCH)):
        yield from zip(batch, dask.compute(*(task(*held, *item) for item in batch)))


def _on_cluster(
    client: Any, function: Callable[..., Any], shared: Sequence[Any], items: Iterable[Any], ordered: bool
) -> Iterator[Any]:
    """Run tasks on the workers of a client."""
    from distributed import as_completed

    def sent(function: Callable[..., Any], *args: Any) -> Any:
        with warnings.catch_warnings():
            # A result of a task is made again if its worker dies; scattered, arguments would be lost with it.
            warnings.filterwarnings("ignore", message="Sending large graph")
            return client.submit(function, *args, pure=False)

    held = [sent(_same, value) for value in shared]

    def submit(item: tuple[Any, ...]) -> Any:
        return sent(function, *held, *(client.compute(arg) if dask.is_dask_collection(arg) else arg for arg in item))

    if ordered:
        items, taken = tee(items)
        yield from zip(items, _in_order(map(submit, taken), 2 * max(1, sum(client.nthreads().values()))))
        return
    waiting = {future.key: (item, future) for item in items for future in [submit(item)]}
    try:
        for future, result in as_completed([future for _, future in waiting.values()], with_results=True):
            yield waiting.pop(future.key)[0], result
    finally:
        client.cancel([future for _, future in waiting.values()])


def _same(value: Any) -> Any:
    return value
