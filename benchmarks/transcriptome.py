"""The whole transcriptome of a big slide: time and memory of prediction, and of a table of all genes for many cells.

    python benchmarks/transcriptome.py                                # 20,000 px, 18,000 genes in 64 programs, 100,000 cells
    python benchmarks/transcriptome.py --size 5000 --cells 10000

The slide is that of `benchmarks/predict.py` (40 % tissue), on disk; the model has random weights, which costs the same. Each step runs
in a process of its own, so that its peak memory is its own: painting the slide, `tl.predict`, `tl.aggregate` with the table on disk.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from predict import Peak, disc_radius, make_slide, messages

STEPS = ("slide", "predict", "aggregate")


def folder_gb(path: Path) -> float:
    """Return the size of a folder."""
    return round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9, 2)


def slide(store: Path, args) -> dict:
    """Write the slide and its cells: discs of 10 µm somewhere on the tissue."""
    import geopandas as gpd
    import numpy as np
    import shapely
    from spatialdata.models import ShapesModel

    sdata = make_slide(args.size)
    rng = np.random.default_rng(0)
    radius, angle = disc_radius(args.size) * np.sqrt(rng.random(args.cells)), 2 * np.pi * rng.random(args.cells)
    centres = args.size / 2 + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    cells = shapely.buffer(shapely.points(centres), 10, quad_segs=3)
    sdata["cells"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=cells))
    sdata.write(store)
    return {}


def predict(store: Path, args) -> dict:
    """Predict the slide as programs."""
    import spatialdata
    import torch

    import pixnet as px

    said = messages()
    sdata = spatialdata.read_zarr(store)
    torch.manual_seed(0)
    genes = [f"G{i}" for i in range(args.genes)]
    model = px.models.PixNet(genes, mpp=0.5, n_programs=args.programs).eval()
    torch.nn.init.normal_(model.head.loading_logits)  # genes differ, so that the table is as large as a real one
    start = time.perf_counter()
    px.tl.predict(sdata, model)
    wall = time.perf_counter() - start
    note = next(text for text in reversed(said) if "in the model" in text)
    inside = float(re.search(r"([\d.]+) s in the model", note)[1])
    image = store / "images" / "he_programs"
    return {"wall_s": round(wall, 1), "outside_the_model": round(1 - inside / wall, 3), "map_gb": folder_gb(image)}


def aggregate(store: Path, args) -> dict:
    """Sum the programs over the cells, and write a table of all genes."""
    import spatialdata
    import zarr

    import pixnet as px

    sdata = spatialdata.read_zarr(store)
    start = time.perf_counter()
    px.tl.aggregate(sdata, "cells")
    wall = time.perf_counter() - start
    folder = store / "tables" / "cells_genes"
    shape = zarr.open_array(folder / "X", mode="r").shape  # SpatialData would read all 7 GB
    return {"wall_s": round(wall, 1), "shape": list(shape), "table_gb": folder_gb(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"size": 20_000, "genes": 18_000, "programs": 64, "cells": 100_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        import pixnet as px

        px.settings.progress = False
        with Peak() as peak:
            found = {"slide": slide, "predict": predict, "aggregate": aggregate}[args.step](args.store, args)
        print(json.dumps({"step": args.step, "peak_gb": round(peak.peak / 1e9, 2), **found}))
        return
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--store", f"{folder}/slide.zarr"]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
