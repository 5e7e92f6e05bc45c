"""Tasks on threads: what the caller's thread does for them, and how they end."""

from __future__ import annotations

import queue
import threading

import pytest

from pixnet._core import parallel as tasks


def on_callers_thread(out, i, j):
    """Ask the caller's thread for a name, as a tile asks it for a forward pass."""
    name = tasks.in_callers_thread(lambda: threading.current_thread().name)
    out.append((i, j))
    return name


def test_threads_are_served_by_the_callers_thread():
    done = []
    found = list(tasks.run_tasks(on_callers_thread, [done], [(i, 0) for i in range(20)]))
    assert set(found) == {threading.current_thread().name}
    assert sorted(done) == [(i, 0) for i in range(20)]


def test_an_interrupt_that_loses_an_event_does_not_hang(monkeypatch):
    """Ctrl-C can come after an event was taken from the queue and before anything was done with it."""

    class Interrupted(queue.SimpleQueue):
        taken = 0

        def get(self, *args, **kwargs):
            event = super().get(*args, **kwargs)
            Interrupted.taken += 1
            if Interrupted.taken == lost:
                raise KeyboardInterrupt
            return event

    monkeypatch.setattr(tasks, "SimpleQueue", Interrupted)
    ends = []

    def run():
        try:
            list(tasks.run_tasks(on_callers_thread, [[]], [(i, 0) for i in range(50)]))
        except KeyboardInterrupt:
            ends.append(sum(t.name.startswith("pixnet") for t in threading.enumerate()))

    for lost in range(1, 9):  # requests and results alike
        Interrupted.taken = 0
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive(), f"hangs when event {lost} is lost"
    assert ends == [0] * 8, "and no thread works on"


def test_a_task_that_fails_ends_the_others():
    def fail(i, j):
        tasks.in_callers_thread(lambda: None)
        if i == 3:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(tasks.run_tasks(fail, [], [(i, 0) for i in range(50)]))
    assert not [t for t in threading.enumerate() if t.name.startswith("pixnet")]
