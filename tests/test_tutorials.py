"""What tutorials say of files that are not here holds: the kidney's first cells read a Space Ranger folder."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import shapely

import pixnet as px
from pixnet._sdata.pixel_size import find_mpp

pytest.importorskip("spatialdata_io")
pytest.importorskip("tifffile")
mpl.use("agg")

ROOT = Path(__file__).parent.parent
KIDNEY = ROOT / "tutorials" / "kidney.ipynb"

pytestmark = [
    pytest.mark.skipif(not KIDNEY.is_file(), reason="the tutorials are not here"),
    pytest.mark.filterwarnings("ignore"),
]


def platforms():
    # tests are not a package (importmode importlib), so the helper beside the tests of io is loaded by its path
    spec = importlib.util.spec_from_file_location("platforms", Path(__file__).parent / "io" / "platforms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells():
    cells = json.loads(KIDNEY.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The state of the notebook after it has read a Space Ranger folder and built spots and squares of its bins."""
    source = px.datasets.synthetic_tissue(400, n_genes=6, shapes=("bins",))
    folder = platforms().visium_hd(tmp_path_factory.mktemp("kidney"), source)
    start, reading, building = code_cells()[:3]
    reading, n = re.subn(
        r"^FOLDER, IMAGE = None, None.*$", f"FOLDER, IMAGE = {str(folder)!r}, None", reading, flags=re.M
    )
    assert n == 1
    start, n = re.subn(r"^SCALES = .*$", 'SCALES = {"bins_016um": 2}', start, flags=re.M)
    assert n == 1
    state: dict = {}
    before = (px.settings.progress, px.settings.verbosity)
    for cell in (start, reading, building):
        exec(compile(cell, "kidney.ipynb", "exec"), state)
    px.settings.progress, px.settings.verbosity = before
    return source, state


def test_the_pixel_size_comes_from_the_bins(opened):
    _, state = opened
    assert find_mpp(state["sdata"], "he") == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_array_equal(
        state["sdata"]["he"]["scale0"]["image"].values, opened[0]["he"]["scale0"]["image"].values
    )


def test_squares_are_sums_of_four_bins(opened):
    source, state = opened
    sdata = state["sdata"]
    area = shapely.area(sdata["bins_016um"].geometry.to_numpy())
    np.testing.assert_allclose(area, 32**2, rtol=1e-3)
    table, bins = sdata["bins_016um_counts"], source["bins_counts"]
    centre = shapely.centroid(source["bins"].geometry.to_numpy())
    for row in (0, len(table) // 2, len(table) - 1):
        square = sdata["bins_016um"].geometry.iloc[row]
        inside = shapely.contains(square, centre)
        assert inside.sum() == 4
        expected = np.asarray(bins[inside].X.sum(axis=0)).ravel()
        genes = [str(g) for g in bins.var_names]
        np.testing.assert_allclose(table[row, genes].X.toarray().ravel(), expected)
        assert table.obs["total"].iloc[row] == expected.sum()


def test_spots_are_discs_of_bins_on_visiums_pitch(opened):
    source, state = opened
    sdata = state["sdata"]
    np.testing.assert_allclose(sdata["spots"]["radius"] * 0.5, 27.5, rtol=1e-3)
    xy = np.column_stack([sdata["spots"].geometry.x, sdata["spots"].geometry.y]) * 0.5
    nearest = np.sort(np.linalg.norm(xy[:, None] - xy[None], axis=-1), axis=1)[:, 1]
    np.testing.assert_allclose(nearest, 100, rtol=1e-3)
    per_spot = np.asarray(sdata["spots_counts"].X.sum(axis=1)).ravel().mean()
    per_bin = np.asarray(source["bins_counts"].X.sum(axis=1)).ravel().mean()
    assert per_spot / per_bin == pytest.approx(np.pi * 27.5**2 / 64, rel=0.2)
