"""Many tasks: where they run, in which order, and how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import dask
import dask.array as da
import numpy as np
import pytest

from pixnet._core.parallel import cluster_client, in_threads, n_threads, run

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    """Two workers that are threads of this process."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def threads_left(seconds=0.0):
    """Return the threads of runs that are still there after some time."""
    end = time.monotonic() + seconds
    while (left := [t for t in threading.enumerate() if t.name.startswith("pixnet")]) and time.monotonic() < end:
        time.sleep(0.001)
    return left


@pytest.fixture(autouse=True)
def _no_thread_left():
    """Every test ends with all threads of a run ended."""
    yield
    assert not threads_left()


def add(shift, i, j):
    return shift + 10 * i + j


def place(shift, i):
    """Name the worker, the thread of a pool, or the thread that runs the task."""
    try:
        return distributed.get_worker().name
    except ValueError:
        return threading.current_thread().name.split("_")[0]


ITEMS = [(i, j) for i in range(7) for j in range(3)]


@pytest.mark.parametrize(
    ("where", "ordered"),
    [
        *((where, ordered) for where in ("here", "threads", "synchronous", "cluster") for ordered in (False, True)),
        ("processes", False),
    ],
)
def test_each_item_comes_with_its_result(request, where, ordered):
    setting = {"scheduler": where} if where in {"threads", "synchronous", "processes"} else {}
    if where == "cluster":
        request.getfixturevalue("client")
    with dask.config.set(setting):
        found = list(run(add, [100], (item for item in ITEMS), ordered=ordered))
    if ordered:
        assert [item for item, _ in found] == ITEMS
    assert sorted(found) == [(item, add(100, *item)) for item in ITEMS]


@pytest.mark.parametrize(("setting", "names"), [(None, {0, 1}), ("threads", {"pixnet"}), ("sync", {"MainThread"})])
def test_the_client_in_scope_is_used_unless_dask_is_set_otherwise(client, setting, names):
    with dask.config.set({} if setting is None else {"scheduler": setting}):
        assert (cluster_client() is client) == (setting is None)
        assert {result for _, result in run(place, [0], [(i,) for i in range(20)])} == names


@pytest.mark.parametrize("where", ["here", "synchronous", "cluster"])
def test_dask_collections_of_an_item_are_computed(request, where):
    if where == "cluster":
        request.getfixturevalue("client")

    def total(pixels, factor):
        assert isinstance(pixels, np.ndarray)
        return float(pixels.sum() * factor)

    array = da.ones((3, 8, 8), chunks=4)
    items = [(array[:, :4], 1), (np.ones(5), 2), (array, 3)]
    with dask.config.set({"scheduler": where} if where == "synchronous" else {}):
        assert [result for _, result in run(total, [], items, ordered=True)] == [96, 10, 576]


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_items_are_taken_a_few_ahead(request, where):
    if where == "cluster":
        request.getfixturevalue("client")
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i, 0

    results = run(add, [0], items(), ordered=True, threads=2)
    for n, _ in zip(range(10), results):
        assert len(taken) <= n + 6
    results.close()
    assert len(taken) < 20


def test_threads_are_one_a_core_unless_dask_says_otherwise():
    assert 1 <= n_threads() <= 8
    with dask.config.set(num_workers=3):
        assert n_threads() == 3
        seen = [run(lambda i: time.sleep(0.01) or threading.get_ident(), [], [(i,) for i in range(30)])]
        assert len({ident for results in seen for _, ident in results}) <= 3


# how they end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "synchronous", "cluster"])
def test_an_error_is_the_callers_and_ends_the_others(request, where):
    if where == "cluster":
        request.getfixturevalue("client")
    done = []

    def fail(i):
        done.append(i)
        if i == 3:
            raise RuntimeError("broken")
        time.sleep(0.01)

    with (
        dask.config.set({"scheduler": where} if where == "synchronous" else {}),
        pytest.raises(RuntimeError, match="broken"),
    ):
        list(run(fail, [], [(i,) for i in range(500)]))
    assert len(done) < 100


def test_an_error_in_the_items_ends_the_tasks():
    def items():
        yield from ((i, 0) for i in range(5))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(run(add, [0], items()))


def test_closing_waits_for_the_tasks_that_run():
    running = []

    def task(i):
        running.append(i)
        time.sleep(0.05)
        running.remove(i)

    results = run(task, [], [(i,) for i in range(50)])
    next(results)
    results.close()
    assert not running


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_at_any_moment_ends_cleanly():
    """A signal at random moments of a run that reads ahead, works in this thread and writes behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    rng, interrupted = np.random.default_rng(0), 0
    try:
        for _ in range(40):
            timer = threading.Timer(rng.uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGINT))
            read = in_threads(lambda i: time.sleep(1e-3) or i, range(40), 2)
            written = in_threads(lambda i: time.sleep(1e-3), (sum(range(1000 + i)) for i in read), 1)
            try:
                timer.start()  # on a busy machine the signal may come before this returns
                for _ in written:
                    pass
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                written.close()
                read.close()
            timer.join()
            assert not threads_left(5)  # a thread that was just being started may end a moment later
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == 40
