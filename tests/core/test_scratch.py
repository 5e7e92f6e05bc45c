"""Arrays that are kept on disk, in the scratch folder."""

import errno
import os

import numpy as np
import pytest

import pixnet as px
from pixnet._core.scratch import on_disk, scratch_root


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(px.settings, "scratch_dir", tmp_path)


def test_arrays_come_back_and_their_file_has_no_name():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 99, n).astype(np.int32) for n in (5, 0, 700, 1)]
    found = on_disk(arrays)
    assert len(found) == 4
    for expected, values in zip(arrays, found):
        np.testing.assert_array_equal(values, expected)
    assert not found[0].flags.writeable
    assert os.listdir(scratch_root()) == []


def test_nothing_makes_no_file():
    assert on_disk([]) == []
    assert [len(a) for a in on_disk([np.zeros(0, np.int32)])] == [0]


def test_a_full_disk_names_the_setting(monkeypatch):
    import tempfile

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"cannot write to settings\.scratch_dir.*No space left.*PIXNET_SCRATCH_DIR"):
        on_disk([np.zeros(3, np.int32)])
