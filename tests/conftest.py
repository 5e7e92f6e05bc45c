"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pixnet as px


@pytest.fixture(autouse=True, scope="session")
def _quiet(tmp_path_factory):
    """No progress bars, and scratch files in a folder of this run."""
    px.settings.progress = False
    px.settings.scratch_dir = tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def float32():
    """Compute in float32 also on a CPU that computes in bfloat16 by default, which rounds by 0.4 %."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixnet._core.predict.device._native_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data, or skip."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PIXNET_DATA_DIR") or beside)
    if not (folder / "her2st").is_dir():
        pytest.skip("the real data is not here: set PIXNET_DATA_DIR to the folder that holds her2st")
    return folder
