"""Speed of this version of pixnet beside another one, in one run on one machine.

    git worktree add /tmp/other 1831daa
    python benchmarks/versions.py /tmp/other/src
    python benchmarks/versions.py /tmp/other/src --only aggregate first --repeats 7

Each measurement runs in a process of its own, the two versions in turn, so that other work on the machine slows both alike.

aggregate
    Spots, cells and bins of the store of `aggregate.py` (50 genes); the best of three calls after one to warm up.
first
    The first call in a process, on a small image, with an empty cache of compiled kernels: that of a fresh installation.
predict
    Section C5 of her2st with the shipped model (needs the data; see ``PIXNET_DATA_DIR``), to a store.
kidney, her2st, folds
    `tl.train` of 250 genes on the spots of the kidney's upper half, and on C2 to C4 of her2st; `tl.cross_validate` over
    C2 to C5. Minutes each: name them with ``--only``. ``--passes 2`` makes that many passes in place of all.
    The kidney's time is also given in two parts: the features, and the mean of a pass.

The table gives the least and the median over repeats of wall time, and the least CPU time, each with its ratio new / old.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = ("spots", "cells", "bins")


def timed(call) -> tuple[float, float]:
    """Return wall and CPU seconds of a call; CPU time is that of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def aggregate(folder: Path) -> dict[str, tuple[float, float]]:
    import spatialdata as sd

    import pixnet as px

    sdata = sd.read_zarr(folder / "store.zarr")
    found = {}
    for shapes in SHAPES:
        runs = [
            timed(lambda shapes=shapes: px.tl.aggregate(sdata, shapes, image_key="image", inplace=False))
            for _ in range(4)
        ]
        found[f"aggregate {shapes}"] = tuple(min(values) for values in zip(*runs[1:]))
    return found


def first(folder: Path) -> dict[str, tuple[float, float]]:
    import numpy as np
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel

    import pixnet as px

    image = Image2DModel.parse(np.ones((5, 128, 128), np.float32), dims=("c", "y", "x"))
    spots = ShapesModel.parse(np.array([[40.0, 40.0], [80.0, 70.0]]), geometry=0, radius=9.5)
    sdata = SpatialData(images={"image": image}, shapes={"spots": spots})
    return {"first aggregate": timed(lambda: px.tl.aggregate(sdata, "spots", image_key="image", inplace=False))}


def predict(folder: Path) -> dict[str, tuple[float, float]]:
    import spatialdata as sd

    import pixnet as px

    sdata = px.datasets.her2st("C5")
    px.pp.tissue_mask(sdata)
    with tempfile.TemporaryDirectory(dir=folder) as store:
        sdata.write(Path(store) / "c5.zarr")
        sdata = sd.read_zarr(Path(store) / "c5.zarr")
        return {"predict C5": timed(lambda: px.tl.predict(sdata, "her2st"))}


def kidney(folder: Path) -> dict[str, tuple[float, float]]:
    import spatialdata as sd

    import pixnet as px

    sdata, known = sd.read_zarr(folder / "kidney.zarr"), json.loads((folder / "kidney.json").read_text())
    px.pp.set_mpp(sdata, "he", known.pop("mpp"))
    keys = {"shapes": "spots", "table_key": "spots_counts", **known}
    features, epochs = watched()
    found = {"train kidney": timed(lambda: px.tl.train(sdata, **keys, **passes()))}
    found["train kidney, features"] = tuple(map(sum, zip(*features)))
    return found | {"train kidney, a pass": tuple(map(statistics.median, zip(*epochs)))}


def watched() -> tuple[list, list]:
    """Return lists that training adds to: wall and CPU seconds of computing features, and of each pass."""
    features, epochs = [], []

    def watch(owner, name: str, times: list) -> None:
        function = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.perf_counter(), time.process_time()
            found = function(*args, **kwargs)
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            return found

        setattr(owner, name, call)

    try:
        from pixnet._core.train import fit, trainer
    except ImportError:  # 1831daa, whose passes are the steps of a progress bar
        from pixnet._core import fit

        class Bar(fit.tqdm):
            def __iter__(self):
                for step in self.iterable:
                    start = time.perf_counter(), time.process_time()
                    yield step
                    epochs.append((time.perf_counter() - start[0], time.process_time() - start[1]))

        watch(fit, "cache_features", features)
        fit.tqdm = Bar
    else:
        watch(fit, "with_features", features)
        watch(trainer.Trainer, "_epoch", epochs)
    return features, epochs


def write_kidney(folder: Path) -> None:
    """Write the kidney's training part for both versions, and what to train on."""
    from quality import kidney, kidney_split

    from pixnet._sdata.slide import Slide

    train, _, genes = kidney_split(Path(os.environ["PIXNET_DATA_DIR"]) / "visium_hd_kidney", False)
    train.subset(["he", "spots", "spots_counts"]).write(folder / "kidney.zarr")
    known = {"mpp": Slide.open(train).mpp, "genes": genes, "total_key": kidney.TOTAL_KEY}
    (folder / "kidney.json").write_text(json.dumps(known))


def her2st(folder: Path) -> dict[str, tuple[float, float]]:
    import pixnet as px

    sections = {name: px.datasets.her2st(name) for name in ("C2", "C3", "C4")}
    genes = px.pp.select_genes(sections)
    found = {"train her2st": timed(lambda: px.tl.train(sections, genes=genes, **passes()))}
    return found | {"train her2st again": timed(lambda: px.tl.train(sections, genes=genes, **passes()))}


def folds(folder: Path) -> dict[str, tuple[float, float]]:
    import pixnet as px

    sections = {name: px.datasets.her2st(name) for name in ("C2", "C3", "C4", "C5")}
    call, genes = px.tl.cross_validate, px.pp.select_genes(sections)
    return {"cross-validate her2st": timed(lambda: call(sections, groups=list(sections), genes=genes, **passes()))}


def passes() -> dict[str, int]:
    """Return the number of passes to make in training."""
    n = os.environ.get("PASSES")
    return {"max_epochs": int(n)} if n else {}


MEASURED = {
    "aggregate": aggregate,
    "first": first,
    "predict": predict,
    "kidney": kidney,
    "her2st": her2st,
    "folds": folds,
}
LONG = {"kidney", "her2st", "folds"}


def run(what: str, source: Path, folder: Path, threads: int) -> dict[str, tuple[float, float]]:
    """Measure one version in a process of its own."""
    env = os.environ | {
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_CACHE_DIR": str(folder / f"kernels of {source.parent.name}"),
        "PIXNET_PROGRESS": "0",
    }
    with tempfile.TemporaryDirectory() as empty:
        if what == "first":
            env["NUMBA_CACHE_DIR"] = empty
        command = [sys.executable, "-W", "ignore", __file__, str(source), "--in-process", what, "--folder", str(folder)]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the src folder of the other version")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=[k for k in MEASURED if k not in LONG])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, help="of training; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--in-process", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        import pixnet as px

        assert Path(px.__file__).is_relative_to(arguments.other), (px.__file__, arguments.other)
        px.settings.progress, px.settings.verbosity = False, "error"
        print(json.dumps(MEASURED[arguments.in_process](arguments.folder)))
        return

    if arguments.passes:
        os.environ["PASSES"] = str(arguments.passes)
    sys.path.insert(0, str(HERE))
    sources = {"new": HERE.parent / "src", "old": arguments.other.resolve()}
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), {}
        if "aggregate" in arguments.only:
            from aggregate import make_store

            make_store(folder / "store.zarr", 50)
        if "kidney" in arguments.only:
            write_kidney(folder)
        for what in arguments.only:
            for repeat in range(arguments.repeats):
                for version in ("new", "old") if repeat % 2 else ("old", "new"):
                    for key, seconds in run(what, sources[version], folder, arguments.threads).items():
                        runs.setdefault(key, {}).setdefault(version, []).append(seconds)
                        print(f"{key}, {version}: {seconds[0]:.2f} s, CPU {seconds[1]:.2f} s", file=sys.stderr)
    print("| | least, s: old | new | ratio | median, s: old | new | ratio | CPU, s: old | new | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for key, of in runs.items():
        cells = []
        for column, summary in ((0, min), (0, statistics.median), (1, min)):
            old, new = (summary([seconds[column] for seconds in of[version]]) for version in ("old", "new"))
            cells += [f"{old:.2f}", f"{new:.2f}", f"{new / old:.2f}"]
        print(f"| {key} | {' | '.join(cells)} |")
    print(f"\nload averages over 1, 5 and 15 minutes at the end: {', '.join(f'{n:.1f}' for n in os.getloadavg())}")


if __name__ == "__main__":
    main()
