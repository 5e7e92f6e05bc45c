"""Keeping freed memory: one setting for the whole process, whoever asks for it."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import shapely

from pixnet._core import malloc
from pixnet._core.coverage import ShapeArrays
from pixnet._core.zonal import Mean, zonal, zonal_statistics


class FakeLibrary:
    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setattr(malloc, "_glibc", lambda: fake)
    return fake


def test_the_last_of_several_blocks_gives_memory_back(library):
    inside, leave = threading.Event(), threading.Event()

    def block():
        with malloc.memory_kept():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=block)
    with malloc.memory_kept():
        other.start()
        assert inside.wait(10)
    assert "trim" not in library.calls  # the other thread is still at work
    leave.set()
    other.join()
    assert library.calls[-1] == "trim"


def test_an_error_gives_memory_back(library):
    with pytest.raises(ZeroDivisionError), malloc.memory_kept():
        raise ZeroDivisionError
    assert library.calls[-1] == "trim"


@pytest.mark.parametrize("large", [True, False])
def test_aggregation_keeps_memory_where_there_is_much_to_read(library, monkeypatch, large):
    image = np.ones((3, 40, 50), np.float32)
    monkeypatch.setattr(zonal, "KEEP_BYTES", image.nbytes - 1 if large else image.nbytes)
    x, y = np.mgrid[1:50:10, 1:40:10].reshape(2, -1)
    boxes = ShapeArrays.from_geometries(shapely.box(x, y, x + 8, y + 8))
    found = zonal_statistics(image, boxes, channels=range(3), statistics=[Mean()], tile_px=20)
    np.testing.assert_array_equal(found.values["mean"], 1)
    assert ("trim" in library.calls) is large


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_torch_is_asked_for_huge_pages_unless_the_user_says_otherwise(before, after):
    name = "THP_MEM_ALLOC_ENABLE"
    env = {key: value for key, value in os.environ.items() if key != name} | ({} if before is None else {name: before})
    code = f"import os, sys, pixnet; print(os.environ[{name!r}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [after, "False"]
