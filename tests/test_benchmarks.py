"""The benchmark of the field's table runs, on sections in the format of her2st."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import pixnet as px
from pixnet.datasets import _her2st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here"),
    pytest.mark.filterwarnings("ignore"),
]


def section(folder, name, seed):
    """Write a synthetic section as the public repository holds one."""
    size = 1400 if name == "B1" else 600  # it trains alone, and a block of it validates
    source = px.datasets.synthetic_tissue(size, mpp=1.0, n_genes=26, shapes=("spots_legacy",), seed=seed, panel_seed=0)
    files = {kind: folder / path for kind, path in _her2st._section_files(name).items()}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    table, spots = source["spots_legacy_counts"], source["spots_legacy"]
    x, y = ((values.to_numpy() / 200).astype(int) for values in (spots.geometry.x, spots.geometry.y))
    counts = table.to_df().astype(int)
    counts.index = [f"{a}x{b}" for a, b in zip(x, y)]
    counts = counts.drop(columns="TUM1") if name == "B1" else counts  # as in her2st, sections name different genes
    counts.to_csv(files["counts"], sep="\t")
    spots = spots.drop(columns="geometry").assign(
        x=x, y=y, pixel_x=spots.geometry.x, pixel_y=spots.geometry.y, selected=1
    )
    spots.to_csv(files["spots"], sep="\t", index=False)
    Image.fromarray(source["he"]["scale0"]["image"].values.transpose(1, 2, 0)).save(files["image"], quality=95)


@pytest.mark.parametrize(
    "methods", [["ridge"], pytest.param(["dense", "ridge", "paper"], marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_leave_one_patient_out(tmp_path, monkeypatch, methods):
    pytest.importorskip("scanpy")
    for seed, name in enumerate(["A1", "A2", "B1"]):
        section(tmp_path / "her2st", name, seed)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(px.settings, "progress", False)
    quality = importlib.import_module("quality")
    options = ["--protocol", "patient", "--genes", "4", "--max-epochs", "1", "--json", str(tmp_path / "found.json")]
    options += ["--methods", *methods]
    quality.main(["her2st", str(tmp_path / "her2st"), *options])
    for module in ("quality", "patients", "references", "kidney"):
        sys.modules.pop(module, None)
    found = json.loads((tmp_path / "found.json").read_text())["patients"]
    assert {patient: one["trained on"] for patient, one in found.items()} == {"A": ["B1"], "B": ["A1", "A2"]}
    assert found["B"]["validation"] == ["A2"]
    for one in found.values():
        assert set(one["r"]) == {*methods, "ceiling"}
        assert {len(genes) for genes in one["genes"].values()} == {4}
        assert set(one["r"]["ridge"]["raw"]) == {gene for genes in one["genes"].values() for gene in genes}
    assert len(found["A"]["r"][methods[0]]["smoothed"].popitem()[1]) == 2
    assert (tmp_path / "found.png").exists()
