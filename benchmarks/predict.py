"""Speed, memory and seams of `pixnet.tl.predict`, against two naive ways of doing the same.

Every case runs in a process of its own, so that its peak memory is its own. The slide is generated lazily: blocks of
noise around tissue colours on a white slide, tissue in a disc of 40 % of the area; nothing of it is on disk.

    python benchmarks/predict.py                       # the standard table: about ten minutes on two cores
    python benchmarks/predict.py size=20000 genes=250  # one case
    python benchmarks/predict.py how=her2st            # a real section, shipped model (needs PIXNET_DATA_DIR)
    python benchmarks/predict.py how=graph size=100000 # a huge slide, lazily: built, not run
    python benchmarks/predict.py seams                 # windows against one forward pass (needs PIXNET_DATA_DIR)
    python benchmarks/predict.py limit size=20000      # a whole slide as a multiple of what its encoder alone takes
    python benchmarks/predict.py limit size=20000 genes=18000 programs=64 precision=float32

``how=naive`` runs every window, background too, into one float32 array in memory that is written at the end; ``how=spots``
runs the model on a crop around every map pixel of tissue, whose time is that of a few crops times their number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

CASES = [
    {"size": 5_000},
    {"size": 10_000},
    {"size": 20_000},
    {"size": 5_000, "genes": 50},
    {"size": 5_000, "genes": 1_000},
    {"size": 5_000, "precision": "float32"},
    {"size": 5_000, "workers": 1},
    {"size": 5_000, "workers": 1, "keep": 1},
    {"size": 5_000, "workers": 2},
    {"size": 5_000, "workers": 2, "keep": 1},
    {"size": 5_000, "how": "naive"},
    {"size": 5_000, "how": "spots"},
    {"size": 100_000, "how": "graph"},
    {"how": "her2st"},
]
DEFAULT = {
    "how": "pixnet",
    "size": 5_000,
    "genes": 250,
    "programs": None,
    "precision": None,
    "workers": 0,
    "keep": 0,
    "tile": None,
    "decoder": "pixel_mlp",
    "halo": None,
}
NUMBERS = {"size", "genes", "programs", "workers", "keep", "tile", "halo"}
KEPT = {"MALLOC_TRIM_THRESHOLD_": 2_000_000_000, "MALLOC_MMAP_THRESHOLD_": 1_000_000_000, "MALLOC_ARENA_MAX": 1}
"""With ``keep=1``: workers keep the memory that they free, as docs/clusters.md advises."""
COLUMNS = (
    "how", "slide, px", "genes", "precision", "workers", "keep", "wall, s", "model, s", "CPU, s", "peak, GB", "map, GB", "load",
)  # fmt: skip


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

    import pixnet as px

    n = [1024] * (side // 1024) + ([side % 1024] if side % 1024 else [])
    pixels = da.map_blocks(block, chunks=((3,), tuple(n), tuple(n)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    c = (np.arange(side // 10) + 0.5) * 10 - side / 2
    mask = (c[:, None] ** 2 + c[None, :] ** 2 < disc_radius(side) ** 2).astype(np.uint8)
    labels = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"global": Scale([10, 10], axes=("x", "y"))})
    sdata = SpatialData(images={"he": image}, labels={"he_tissue": labels})
    px.pp.set_mpp(sdata, "he", 0.5)
    return sdata


def make_model(case: dict):
    """The shipped model for a real section, else one with random weights, which costs the same."""
    import torch

    import pixnet as px

    if case["how"] == "her2st":
        model = px.models.load("her2st")
    else:
        torch.manual_seed(0)
        genes = [f"gene{i}" for i in range(case["genes"])]
        model = px.models.PixNet(genes, mpp=0.5, decoder=case["decoder"], n_programs=case["programs"])
    if case["halo"] is not None:
        model.config = replace(model.config, halo=case["halo"])
    return model.eval()


def forward(model, pixels, precision):
    """The model on uint8 ``(n, 3, y, x)``, in the arithmetic that predict would take."""
    import torch

    from pixnet._core.predict.device import PRECISIONS, resolve_precision

    dtype = PRECISIONS[resolve_precision(precision, torch.device("cpu"))]
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        image = torch.from_numpy(pixels).to(memory_format=torch.channels_last).float() / 255
        return model(image).float().numpy()


def naive(sdata, model, precision, folder: Path) -> None:
    """Every window, background too, into one float32 array in memory that is written at the end."""
    import numpy as np
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
            value = forward(model, part[None], precision)[0]
            edge, core = halo // stride, window // stride
            here = out[:, y // stride : y // stride + core, x // stride : x // stride + core]
            here[:] = value[:, edge : edge + here.shape[1], edge : edge + here.shape[2]]
    sdata["he_genes"] = Image2DModel.parse(out, dims=("c", "y", "x"), c_coords=model.channels, scale_factors=(2, 2))
    sdata.write(folder / "naive.zarr")


def spots(sdata, model, precision, n: int = 64) -> float:
    """Return the seconds that a crop of 256 px around each map pixel of tissue would take, from the time of a few."""
    import numpy as np

    image, size = sdata["he"].data, 256
    side = image.shape[1]
    pixels = image[:, side // 2 : side // 2 + 2 * size, side // 2 : side // 2 + 2 * size].compute()
    forward(model, np.zeros((8, 3, size, size), np.uint8), precision)
    start = time.perf_counter()
    for k in range(0, n, 8):
        crops = np.stack([pixels[:, i : i + size, i : i + size] for i in range(k, k + 8)])
        forward(model, crops, precision).mean(axis=(2, 3))
    return (time.perf_counter() - start) / n * 0.4 * (side / model.stride) ** 2


def messages() -> list[str]:
    """A list that receives what pixnet logs from now on."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pixnet").addHandler(handler)
    return said


def run(case: dict) -> dict:
    """Run one case in this process."""
    import pixnet as px

    px.settings.progress = False
    said = messages()
    found: dict = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("PIXNET_SCRATCH_DIR"))))
        px.settings.scratch_dir = folder
        sdata = px.datasets.her2st("C5") if case["how"] == "her2st" else make_slide(case["size"])
        model = make_model(case)
        with contextlib.ExitStack() as cluster, Peak() as peak:
            if case["workers"]:
                import dask
                from distributed import Client, LocalCluster

                if case["keep"]:
                    spawned = {f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in KEPT.items()}
                    cluster.enter_context(dask.config.set(spawned))
                options = {"n_workers": case["workers"], "threads_per_worker": 1, "dashboard_address": None}
                cluster.enter_context(Client(cluster.enter_context(LocalCluster(**options))))
            start, busy = time.perf_counter(), os.times()
            if case["how"] == "naive":
                naive(sdata, model, case["precision"], folder)
            elif case["how"] == "spots":
                found["wall, s"] = spots(sdata, model, case["precision"])
            elif case["how"] == "graph":
                lazy = px.tl.predict(sdata, model, inplace=False).data
                found["note"] = f"{lazy.npartitions} tiles, {len(lazy.dask)} tasks"
            else:
                px.tl.predict(sdata, model, precision=case["precision"], tile_size=case["tile"])
                found["note"] = next(text for text in reversed(said) if "in the model" in text)
                seconds, size = re.search(r"([\d.]+) s in the model\); ([\d.]+) GB", found["note"]).groups()
                found["model, s"], found["map, GB"] = float(seconds), float(size)
            found.setdefault("wall, s", time.perf_counter() - start)
        # of this process and of children that have ended: workers have
        found["CPU, s"] = sum(os.times()[:4]) - sum(busy[:4])
    if case["how"] == "spots":
        del found["CPU, s"]
    found["peak, GB"] = peak.peak / 1e9
    found["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {k: v if isinstance(v, str) else round(v, 2) for k, v in found.items()}


def encoder_throughput(model, precision: str | None) -> dict[str, tuple[float, int]]:
    """Return the best throughput of the encoder alone (Mpx/s), whole windows without halos, and their size in pixels.

    As torch runs it by itself, and with convolutions fused as `tl.predict` does.
    """
    import numpy as np
    import torch

    from pixnet._core.malloc import memory_kept
    from pixnet._core.predict.device import PRECISIONS, resolve_precision
    from pixnet._core.predict.placed import PlacedModel
    from pixnet._core.predict.portable_model import PortableModel
    from pixnet._core.predict.tile import TileCost

    precision = resolve_precision(precision, torch.device("cpu"))
    placed, dtype = PlacedModel(PortableModel(model), "cpu", precision, None, 1), PRECISIONS[precision]
    best = {"torch alone": (0.0, 0), "fused": (0.0, 0)}
    with memory_kept():
        for side in (256, 512, 1024, 1664):
            pixels = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8)
            image = torch.from_numpy(pixels).float().div_(255).to(memory_format=torch.channels_last)
            seconds: dict[str, list[float]] = {name: [] for name in best}
            for _ in range(max(5, 2_000_000 // side**2)):
                cost = TileCost()
                with placed.running(cost) as ready:
                    ready.encoder(placed.image(pixels))
                seconds["fused"].append(cost.forward)
                with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    start = time.perf_counter()
                    model.encoder(image)
                    seconds["torch alone"].append(time.perf_counter() - start)
            for name, found in seconds.items():
                best[name] = max(best[name], (side**2 / 1e6 / min(found), side))
    return best


def limit(case: dict) -> None:
    """Print the time of a whole slide as a multiple of what the encoder alone would take for its tissue, in one process."""
    import spatialdata

    import pixnet as px

    px.settings.progress = False
    said, model = messages(), make_model(case)
    before = encoder_throughput(model, case["precision"])
    with tempfile.TemporaryDirectory(dir=os.environ.get("PIXNET_SCRATCH_DIR")) as folder, Peak() as peak:
        make_slide(case["size"]).write(Path(folder) / "slide.zarr")  # painting it takes as long as the model
        sdata = spatialdata.read_zarr(Path(folder) / "slide.zarr")
        start, busy = time.perf_counter(), time.process_time()
        px.tl.predict(sdata, model, precision=case["precision"])
        wall, cpu = time.perf_counter() - start, time.process_time() - busy
    after = encoder_throughput(model, case["precision"])  # of a machine that others use: its best
    found = next(text for text in reversed(said) if "in the model" in text)
    tissue = float(re.search(r"([\d.]+) M px predicted", found).group(1)) * model.stride**2
    forward = float(re.search(r"([\d.]+) s in the model", found).group(1))
    print(
        f"tl.predict, {case['size']} px, {tissue:.1f} Mpx of tissue: {wall:.1f} s, {forward:.1f} s in the model "
        f"({1 - forward / wall:.0%} outside it); CPU {cpu:.0f} s; peak {peak.peak / 1e9:.2f} GB; load {os.getloadavg()[0]:.1f}"
    )
    for name, first in before.items():
        speed, side = max(first, after[name])
        print(
            f"encoder alone, {name}: {speed:.2f} Mpx/s (windows of {side} px), {tissue / speed:.1f} s for the tissue; "
            f"tl.predict takes {wall * speed / tissue:.2f} times as long"
        )


def seams() -> None:
    """Print how maps of a 3,072 px square of her2st C5 differ by tile size, and from one forward pass over all of it."""
    import numpy as np
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    import pixnet as px

    px.settings.progress = False
    model, margin, side = px.models.load("her2st"), 512, 3072
    model.config = replace(model.config, window=512)
    unit = 4 * model.window  # the square has four: whole ones and parts
    pixels = px.datasets.her2st("C5")["he"]
    pixels = pixels["scale0"]["image"] if "scale0" in pixels else pixels
    pixels = pixels.data[:, 4096 : 4096 + side, 3072 : 3072 + side].compute()
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))})
    px.pp.set_mpp(sdata, "he", model.mpp)
    padded = np.pad(pixels, [(0, 0), (margin, margin), (margin, margin)], constant_values=255)
    n = margin // model.stride
    truth = forward(model, padded[None], "float32")[0][:, n:-n, n:-n]
    core = unit // model.stride
    near = (
        np.abs((np.arange(truth.shape[1]) + core / 2) % core - core / 2 + 0.5) < 4
    )  # on both sides of the edge of each unit
    near[:4] = near[-4:] = False  # the square's own edge is not a seam
    seam = near[:, None] | near[None, :]

    def predict(tile: int):
        px.tl.predict(
            sdata, model, mask_key=False, precision="float32", tile_size=tile, key_added="map", overwrite=True
        )
        return sdata["map"]["scale0"]["image"].values

    print("| where | median | 99th percentile | largest |")
    print("| --- | --- | --- | --- |")
    found = predict(512)
    difference = np.abs(found / truth - 1)
    for where, part in (("all map pixels", difference), ("within 4 of a seam", difference[:, seam])):
        print(f"| {where} | {np.median(part):.1e} | {np.quantile(part, 0.99):.1e} | {part.max():.1e} |", flush=True)
    largest = max(float(np.abs(predict(tile) / found - 1).max()) for tile in (256, 1024, 2048))
    print(f"largest relative difference between tiles of 512 px and those of 256, 1024 and 2048 px: {largest:.1e}")


def case_of(arguments: list[str]) -> dict:
    """Return the settings that the command line gives."""
    given = dict(argument.split("=", 1) for argument in arguments)
    wrong = set(given) - set(DEFAULT)
    if wrong:
        raise SystemExit(f"unknown: {', '.join(sorted(wrong))}; valid: {', '.join(DEFAULT)}")
    return {k: int(v) if k in NUMBERS else v for k, v in given.items()}


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    if arguments[:1] == ["--child"]:
        print(json.dumps(run(json.loads(arguments[1]))))
        return
    if arguments == ["seams"]:
        seams()
        return
    if arguments[:1] == ["limit"]:
        limit({**DEFAULT, "size": 20_000, **case_of(arguments[1:])})
        return
    cases = [case_of(arguments)] if arguments else CASES
    print("| " + " | ".join([*COLUMNS, "note"]) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|", flush=True)
    for case in cases:
        case = {**DEFAULT, **case}
        command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise SystemExit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        shown = {
            **case,
            "slide, px": "her2st C5" if case["how"] == "her2st" else case["size"],
            "precision": case["precision"] or "default",
            "workers": case["workers"] or "threads",
            **found,
        }
        print("| " + " | ".join(str(shown.get(name, "")) for name in (*COLUMNS, "note")) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
