"""The examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import pytest
from PIL import Image

import pixnet as px

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not here")


def test_snakemake(tmp_path):
    pytest.importorskip("snakemake")
    picture = px.datasets.synthetic_tissue(300)["he"]["scale0"]["image"].values.transpose(1, 2, 0)
    Image.fromarray(picture).save(tmp_path / "a slide.png")
    (tmp_path / "samples.csv").write_text("sample,image,mpp,shapes\na,a slide.png,0.5,\n")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "pixnet").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pixnet "$@"\n')
    (bin_dir / "pixnet").chmod(0o755)
    command = [sys.executable, "-m", "snakemake", "--snakefile", EXAMPLES / "snakemake" / "Snakefile", "--cores", "1"]
    command += ["--config", "grid=[100]", 'options=["--genes", "CD24", "ERBB2", "--out-mpp", "8"]']
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "a.html").is_file()
    assert list(ad.read_h5ad(tmp_path / "results" / "a.h5ad").var_names) == ["CD24", "ERBB2"]
