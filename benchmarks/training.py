"""Memory, disk and time of training on many slides, which are generated as they are read.

    python benchmarks/training.py                                   # 5 and 20 slides of 13,000 px with 3,000 spots each
    python benchmarks/training.py --slides 2 6 --size 2048 --spots 80 --passes 1        # a small version, about a minute

    # another encoder, with random weights: the estimate for one Visium slide, and a small slide whole
    python benchmarks/training.py --encoder timm/hf-hub:MahmoodLab/UNI2-h --slides 1 --estimate
    python benchmarks/training.py --encoder timm/hf-hub:MahmoodLab/UNI2-h --slides 1 --size 1024 --spots 30 --passes 1

Each number of slides runs in a process of its own. The table has its peak memory, the disk that its features take beside the
estimate, and the seconds of features and of a pass. Peak memory should not depend on the number of slides.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MPP = 0.5
N_GENES = 250
TILE = 1024


def slide(seed: int, size: int, n_spots: int):
    """Return an object whose pixels are made when they are read, with spots on a hexagonal array."""
    import anndata as ad
    import dask.array as da
    import geopandas as gpd
    import numpy as np
    import pandas as pd
    from scipy import sparse
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    import pixnet as px

    def tile(block_info=None):
        (_, *place), shape = block_info[None]["chunk-location"], block_info[None]["chunk-shape"]
        rng = np.random.default_rng([seed, *place])
        nuclei = (
            rng.random((shape[1] // 8 + 1, shape[2] // 8 + 1))
            .repeat(8, axis=0)
            .repeat(8, axis=1)[: shape[1], : shape[2]]
        )
        stain = nuclei[None] * np.array([90, 120, 60])[:, None, None]
        return (230 - stain - rng.integers(0, 20, shape)).astype(np.uint8)

    chunks = ((3,), *((TILE,) * (size // TILE) + ((size % TILE,) if size % TILE else ()),) * 2)
    pixels = da.map_blocks(
        tile, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8), name=f"slide-{seed}-{size}"
    )
    rng = np.random.default_rng(seed)
    pitch = (size - 400) / np.sqrt(n_spots)
    points = np.array([(200 + pitch * (i + 0.5), 200 + pitch * (j + 0.5)) for j in range(99) for i in range(99)])
    points = points[(points < size - 200).all(axis=1)][:n_spots]
    ids = [f"s{i}" for i in range(len(points))]
    spots = gpd.GeoDataFrame({"radius": 27.5 / MPP}, geometry=gpd.points_from_xy(*points.T), index=ids)
    counts = sparse.csr_matrix(rng.poisson(2, (len(ids), N_GENES)).astype(np.float32))
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * len(ids)), "instance_id": ids}, index=ids)
    table = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))
    sdata = SpatialData(
        images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        shapes={"spots": ShapesModel.parse(spots)},
        tables={"counts": TableModel.parse(table, region="spots", region_key="region", instance_key="instance_id")},
    )
    px.pp.set_mpp(sdata, "he", MPP)
    return sdata


def untrained(encoder: str):
    """Return an encoder with random weights."""
    import pixnet as px

    return px.models.PixNet(["a gene"], encoder=encoder, pretrained=False).encoder


class Estimated(Exception):
    """The estimate was made, and nothing else is wanted."""


def measure(n: int, args: argparse.Namespace) -> dict:
    """Train on a number of slides and return what it took, or what it would take."""
    import pixnet as px
    from pixnet._core.train.trainer import Trainer

    estimates, minutes, passes = [], [], []

    class Estimate(logging.Handler):
        def emit(self, record):
            if found := re.search(r"([\d.]+) (GB|MB) on disk(?:.*about ([\d.]+) min)?", record.getMessage()):
                estimates.append(float(found[1]) / (1 if found[2] == "GB" else 1e3))
                minutes.append(float(found[3] or "nan"))
                if args.estimate:
                    raise Estimated

    logging.getLogger("pixnet").addHandler(Estimate())
    epoch = Trainer._epoch

    def timed(self, number):
        start = time.perf_counter()
        row = epoch(self, number)
        passes.append(time.perf_counter() - start)
        return row

    Trainer._epoch = timed
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        px.settings.scratch_dir, px.settings.progress = scratch, False
        slides = {f"slide {i}": slide(i, args.size, args.spots) for i in range(n)}
        build = {}
        if args.encoder:
            px.models.register_encoder("random", lambda pretrained: untrained(args.encoder), mpp=MPP)
            build = {"encoder": "random"}
        start = time.perf_counter()
        try:
            px.tl.train(
                slides,
                mask_key=False,
                max_epochs=args.passes,
                patience=args.passes,
                refit=False,
                seed=0,
                variants=args.variants,
                **build,
            )
        except Estimated:
            return {
                "slides": n,
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "estimated_gb": round(sum(estimates), 3),
                "estimated_min": round(sum(minutes), 1),
            }
        seconds = time.perf_counter() - start
        used = sum(path.stat().st_blocks * 512 for path in Path(scratch).rglob("*.f16"))
    return {
        "slides": n,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "disk_gb": round(used / 1e9, 3),
        "estimated_gb": round(sum(estimates), 3),
        "features_s": round(seconds - sum(passes), 1),
        "pass_s": round(sum(passes) / len(passes), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--size", type=int, default=13_000, help="pixels a side")
    parser.add_argument("--spots", type=int, default=3000)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--variants", type=int, default=2, help="versions of each slide, as of tl.train")
    parser.add_argument("--encoder", help="with random weights; None: that of tl.train, with its own")
    parser.add_argument("--estimate", action="store_true", help="stop once the estimate is made")
    parser.add_argument("--scratch", help="folder for the features; None: that of temporary files")
    parser.add_argument("--in-process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(measure(args.in_process, args)))
        return
    rows = []
    for n in args.slides:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--in-process", str(n)]
        out = subprocess.run(command, env=os.environ, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
