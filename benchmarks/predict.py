"""Speed and memory of `pixnet.tl.predict`, by slide size and gene count, against two naive ways of doing the same.

Every case runs in a process of its own, so that its peak memory is its own. The slide is generated lazily: blocks of
noise around tissue colours on a white slide, tissue in a disc of 40 % of the area; nothing of it is on disk.

    python benchmarks/predict.py                       # the standard table: a quarter of an hour on two cores
    python benchmarks/predict.py size=20000 genes=250  # one case
    python benchmarks/predict.py her2st                # a real section (needs PIXNET_DATA_DIR)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = [
    {"size": 5_000, "genes": 250},
    {"size": 10_000, "genes": 250},
    {"size": 20_000, "genes": 250},
    {"size": 5_000, "genes": 50},
    {"size": 5_000, "genes": 1_000},
    {"size": 5_000, "genes": 250, "precision": "float32"},
    {"size": 5_000, "genes": 250, "workers": 1},
    {"size": 5_000, "genes": 250, "workers": 2},
    {"size": 5_000, "genes": 250, "how": "naive"},
    {"size": 5_000, "genes": 250, "how": "spots"},
]
DEFAULT = {
    "size": 5_000,
    "genes": 250,
    "precision": None,
    "workers": 0,
    "how": "pixnet",
    "tile": None,
    "decoder": "safb",
}


class Peak:
    """Peak memory of this process and its children, sampled."""

    def __init__(self) -> None:
        import psutil

        self.process, self.peak, self.stop = psutil.Process(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        import psutil

        while not self.stop.wait(0.05):
            total = 0
            for p in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += p.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def block(block_info=None):
    """One block of the slide: tissue-coloured noise, smooth over a few pixels, inside the disc."""
    import numpy as np

    (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
    side = block_info[None]["shape"][1]
    rng = np.random.default_rng((y0, x0))
    coarse = rng.normal(0, 28, (3, -(-(y1 - y0) // 4), -(-(x1 - x0) // 4))).repeat(4, 1).repeat(4, 2)
    colour = np.array([172, 108, 160])[:, None, None]
    tissue = np.clip(coarse[:, : y1 - y0, : x1 - x0] + colour, 0, 255).astype(np.uint8)
    yy, xx = np.ogrid[y0:y1, x0:x1]
    inside = (yy - side / 2) ** 2 + (xx - side / 2) ** 2 < disc_radius(side) ** 2
    return np.where(inside, tissue, np.uint8(245))


def disc_radius(side: int) -> float:
    return side * (0.4 / 3.14159265) ** 0.5


def make_slide(side: int):
    """A SpatialData object with a lazy slide and its mask."""
    import dask.array as da
    import numpy as np
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel
    from spatialdata.transformations import Scale

    n = [1024] * (side // 1024) + ([side % 1024] if side % 1024 else [])
    pixels = da.map_blocks(block, chunks=((3,), tuple(n), tuple(n)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    c = (np.arange(side // 10) + 0.5) * 10 - side / 2
    mask = (c[:, None] ** 2 + c[None, :] ** 2 < disc_radius(side) ** 2).astype(np.uint8)
    labels = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"global": Scale([10, 10], axes=("x", "y"))})
    return SpatialData(images={"he": image}, labels={"he_tissue": labels}, attrs={"pixnet": {"mpp": {"he": 0.5}}})


def make_model(genes: int, mpp: float, decoder: str):
    import torch

    import pixnet as px

    torch.manual_seed(0)
    return px.models.PixNet([f"gene{i}" for i in range(genes)], mpp=mpp, decoder=decoder).eval()


def naive(sdata, model) -> None:
    """Every tile, background too, in float32, into one array in memory that is stored at the end."""
    import numpy as np
    import torch
    from spatialdata.models import Image2DModel

    image = sdata["he"].data
    height, width = image.shape[1:]
    stride, window, halo = model.stride, model.window, model.halo
    out = np.zeros((len(model.channels), -(-height // stride), -(-width // stride)), np.float32)
    for y in range(0, height, window):
        for x in range(0, width, window):
            part = np.full((3, window + 2 * halo, window + 2 * halo), 255, np.uint8)
            y0, x0 = max(y - halo, 0), max(x - halo, 0)
            pixels = image[:, y0 : y + window + halo, x0 : x + window + halo].compute()
            top, left = y0 - y + halo, x0 - x + halo
            part[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
            with torch.inference_mode():
                value = model(torch.from_numpy(part)[None].float() / 255)[0].numpy()
            edge, core = halo // stride, window // stride
            here = out[:, y // stride : y // stride + core, x // stride : x // stride + core]
            here[:] = value[:, edge : edge + here.shape[1], edge : edge + here.shape[2]]
    sdata["he_genes"] = Image2DModel.parse(out, dims=("c", "y", "x"), c_coords=model.channels, scale_factors=(2, 2))
    sdata.write(Path(tempfile.mkdtemp(dir=tempfile.gettempdir())) / "naive.zarr")


def spots(sdata, model, n: int = 64) -> float:
    """Return the seconds that one 224 px crop per map pixel of tissue would take, from the time of a few."""
    import numpy as np
    import torch

    image, stride = sdata["he"].data, model.stride
    side = image.shape[1]
    pixels = image[:, side // 2 : side // 2 + 448, side // 2 : side // 2 + 448].compute()
    size = 256  # the next multiple of 64
    model(torch.zeros(8, 3, size, size))
    start = time.perf_counter()
    with torch.inference_mode():
        for k in range(0, n, 8):
            crops = np.stack([pixels[:, i : i + size, i : i + size] for i in range(k, k + 8)])
            model(torch.from_numpy(crops).float() / 255).mean(dim=(2, 3))
    each = (time.perf_counter() - start) / n
    return each * 0.4 * (side / stride) ** 2


def run(case: dict) -> dict:
    """Run one case in this process."""
    import logging

    import pixnet as px

    px.settings.progress = False
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pixnet").addHandler(handler)
    with tempfile.TemporaryDirectory(dir=os.environ.get("PIXNET_SCRATCH_DIR")) as folder:
        px.settings.scratch_dir = folder
        tempfile.tempdir = folder
        if case["how"] == "her2st":
            sdata = px.datasets.her2st("C5")
            model = px.models.load("her2st")
        else:
            sdata = make_slide(case["size"])
            model = make_model(case["genes"], 0.5, case["decoder"])
        stack = contextlib.ExitStack()
        if case["workers"]:
            from distributed import Client, LocalCluster

            cluster = LocalCluster(n_workers=case["workers"], threads_per_worker=1, dashboard_address=None)
            stack.enter_context(cluster)
            stack.enter_context(Client(cluster))
        with stack, Peak() as peak:
            start, busy = time.perf_counter(), os.times()
            seconds = None
            if case["how"] == "naive":
                naive(sdata, model)
            elif case["how"] == "spots":
                seconds = spots(sdata, model)
            else:
                px.tl.predict(sdata, model, precision=case["precision"], tile_size=case["tile"])
            seconds = time.perf_counter() - start if seconds is None else seconds
    now = os.times()
    cpu = sum(now[:4]) - sum(busy[:4])  # of this process and of children that ended
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    log = lines[-1] if lines and case["how"] in {"pixnet", "her2st"} else ""
    return {
        "seconds": round(seconds, 1),
        "cpu": round(cpu, 1),
        "peak_gb": round(peak.peak / 1e9, 2),
        "load": round(load, 1),
        "log": log,
    }


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--child"]:
        print(json.dumps(run(json.loads(arguments[1]))))
        return
    cases = CASES
    if arguments == ["her2st"]:
        cases = [{"how": "her2st", "size": 0}]  # the shipped model
    elif arguments:
        given = dict(argument.split("=", 1) for argument in arguments)
        wrong = set(given) - set(DEFAULT)
        if wrong:
            raise SystemExit(f"unknown: {', '.join(sorted(wrong))}; valid: {', '.join(DEFAULT)}")
        numbers = {"size", "genes", "workers", "tile"}
        cases = [{k: int(v) if k in numbers else v for k, v in given.items()}]
    print("| how | slide, px | genes | precision | workers | s | CPU s | peak, GB | load | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for case in cases:
        case = {**DEFAULT, **case}
        command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise SystemExit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [case["how"], case["size"] or "her2st C5", case["genes"], case["precision"] or "default"]
        cells += [
            case["workers"] or "threads",
            found["seconds"],
            found["cpu"],
            found["peak_gb"],
            found["load"],
            found["log"],
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
