"""Tutorials as tests: nbmake runs them with the smaller values that each names in its first cell's metadata.

Those on real data run where it is: in PIXNET_DATA_DIR, or in ``../shared/data`` beside the checkout.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "shared" / "data"
if not os.environ.get("PIXNET_DATA_DIR") and BESIDE.is_dir():
    os.environ["PIXNET_DATA_DIR"] = str(BESIDE)  # kernels inherit it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip notebooks whose data is not here, and say so."""
    here = Path(os.environ.get("PIXNET_DATA_DIR", ""))
    for item in items:
        if item.path.suffix != ".ipynb":
            continue
        needs = json.loads(item.path.read_text(encoding="utf-8"))["metadata"].get("pixnet", {}).get("data")
        if needs and not (os.environ.get("PIXNET_DATA_DIR") and (here / needs).is_dir()):
            reason = f"{item.path.name} reads real data: set PIXNET_DATA_DIR to a folder that holds {needs!r}"
            item.add_marker(pytest.mark.skip(reason=reason))
