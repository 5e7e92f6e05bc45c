"""Running independent tasks in threads or on a Dask cluster, with results in the order of the tasks."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

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
