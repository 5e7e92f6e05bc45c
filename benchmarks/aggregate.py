"""Time, peak memory and error of turning an image into a table, beside what else there is.

    python benchmarks/aggregate.py                      # 50 genes: the table of docs/benchmarks/aggregate.md
    python benchmarks/aggregate.py --genes 50 250
    python benchmarks/aggregate.py --large              # one million bins x 250 genes, 200,000 polygons x 250 genes
    python benchmarks/aggregate.py --python sopa=/path/to/env/bin/python    # a tool that lives in another environment

An image of 2048 x 2048 float32 pixels is stored by SpatialData in zarr chunks of (all channels, 512, 512), then each
tool opens it and aggregates it over 1,600 spots (r = 13.75 px), 20,000 cells (polygons, r = 3 to 6 px) and 262,144 bins
(4 x 4 px). Every tool runs in a process of its own; memory is its peak above what it
holds after its imports and the opening of the store; the time is the best of up to 5 calls, on a store that the
operating system has in memory. Processor time, over all threads, tells the tools apart on a machine that does other
work besides. Errors are against exactextract, on a sample of the shapes. A tool that is not installed says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

IMAGE, SIDE, CHUNK = "image", 2048, 512
SHAPES = {"spots": "1,600 spots", "cells": "20,000 cells", "bins": "262,144 bins of 4 x 4 px"}
TOOLS = ("read", "pixnet", "sopa", "harpy", "spatialdata", "exactextract")
SAMPLE = 400  # shapes of each element for which the oracle is asked
SECONDS = 1500  # after which a tool is stopped
ENOUGH = 20  # seconds after which a tool is not called once more


# data ----------------------------------------------------------------------------------------------------------------


def make_store(path: Path, n_genes: int) -> None:
    import geopandas as gpd
    import shapely
    from scipy.ndimage import zoom
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel

    rng = np.random.default_rng(0)
    data = np.empty((n_genes, SIDE, SIDE), np.float32)
    for channel in data:
        coarse = rng.random((SIDE // 16 + 1,) * 2, dtype=np.float32)
        channel[:] = zoom(coarse, 16, order=1)[:SIDE, :SIDE] + 0.2 * rng.random((SIDE, SIDE), dtype=np.float32)
    names = [f"g{i}" for i in range(n_genes)]
    image = Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=names, chunks=(n_genes, CHUNK, CHUNK))

    pitch = SIDE / 40
    y, x = (np.mgrid[:40, :40].reshape(2, -1) + 0.5) * pitch
    spots = gpd.GeoDataFrame({"geometry": shapely.points(x, y), "radius": 13.75})
    centres, radii = rng.uniform(8, SIDE - 8, (20_000, 2)), rng.uniform(3, 6, 20_000)
    angles = 2 * np.pi * np.arange(16) / 16
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.8, 1.1, (20_000, 16, 1))
    cells = gpd.GeoDataFrame({"geometry": shapely.polygons(centres[:, None] + radii[:, None, None] * outline)})
    y, x = np.mgrid[0:SIDE:4, 0:SIDE:4].reshape(2, -1)
    bins = gpd.GeoDataFrame({"geometry": shapely.box(x, y, x + 4, y + 4)})
    elements = {"spots": spots, "cells": cells, "bins": bins}
    SpatialData(
        images={IMAGE: image}, shapes={name: ShapesModel.parse(frame) for name, frame in elements.items()}
    ).write(path)


# tools: each returns a function that aggregates once, to an array (shapes, genes) --------------------------------------


def tool_read(store: Path, shapes: str):
    """Decode every chunk once, in threads, and throw it away: what no tool can be faster than."""
    from concurrent.futures import ThreadPoolExecutor

    import zarr

    array = zarr.open_array(store / "images" / IMAGE / "s0", mode="r")
    corners = [(y, x) for y in range(0, SIDE, CHUNK) for x in range(0, SIDE, CHUNK)]

    def read(corner):
        y, x = corner
        return array[:, y : y + CHUNK, x : x + CHUNK].shape

    def run():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read, corners))

    return run


def tool_pixnet(store: Path, shapes: str):
    import spatialdata as sd

    import pixnet as px

    px.settings.progress = False
    px.settings.verbosity = "error"
    aggregate = px.tl.aggregate
    sdata = sd.read_zarr(store)
    return lambda: aggregate(sdata, shapes, image_key=IMAGE, inplace=False).X


def tool_sopa(store: Path, shapes: str):
    import spatialdata as sd
    from sopa.aggregation import aggregate_channels

    sdata = sd.read_zarr(store)
    if "radius" in sdata[shapes]:  # it takes polygons only
        frame = sdata[shapes]
        frame = frame.set_geometry(frame.geometry.buffer(frame["radius"], quad_segs=16)).drop(columns="radius")
        sdata[shapes] = sd.models.ShapesModel.parse(frame)

    def run():
        found = aggregate_channels(sdata, image_key=IMAGE, shapes_key=shapes, mode="average")
        return np.asarray(getattr(found, "X", found))  # a table in newer versions

    return run


def tool_harpy(store: Path, shapes: str):
    """Through labels, which are made from the shapes in each call; shapes that overlap lose pixels."""
    import harpy
    import spatialdata as sd

    sdata = sd.read_zarr(store)
    frame = sdata[shapes]
    if "radius" in frame:  # it takes polygons only
        frame = frame.set_geometry(frame.geometry.buffer(frame["radius"], quad_segs=16)).drop(columns="radius")
    frame.index = np.arange(1, len(frame) + 1)  # 0 is the background of labels
    memory = sd.SpatialData(images={IMAGE: sdata[IMAGE]}, shapes={"shapes": sd.models.ShapesModel.parse(frame)})

    def run():
        found = harpy.im.rasterize(memory, "shapes", "labels", out_shape=(SIDE, SIDE), chunks=CHUNK, overwrite=True)
        found = harpy.tb.allocate_intensity(found, IMAGE, "labels", calculate_center_of_mass=False, chunks=CHUNK)
        table = found.tables["table_intensities"]
        values = np.full((len(frame), table.n_vars), np.nan)
        values[table.obs["cell_ID"].to_numpy(dtype=int) - 1] = table.X
        return values

    return run


def tool_spatialdata(store: Path, shapes: str):
    """Through labels, one gene (its cost is per gene); shapes that overlap lose pixels, and 65,535 are the most."""
    import spatialdata as sd

    sdata = sd.read_zarr(store)

    def run():
        labels = sd.rasterize(
            sdata[shapes],
            ["x", "y"],
            min_coordinate=[0, 0],
            max_coordinate=[SIDE, SIDE],
            target_coordinate_system="global",
            target_unit_to_pixels=1.0,
            return_regions_as_labels=True,
        )
        found = sd.aggregate(values=sdata[IMAGE].isel(c=[0]), by=labels, agg_func="mean")
        table = found.tables["table"]
        values = np.full((len(sdata[shapes]), 1), np.nan)
        names = labels.attrs["label_index_to_category"]
        position = {name: i for i, name in enumerate(sdata[shapes].index)}
        for label, value in zip(table.obs["instance_id"], np.asarray(table.X.todense()).ravel()):
            if label != 0:
                values[position[names[label]]] = value
        return values

    return run


def tool_exactextract(store: Path, shapes: str):
    """The oracle, on the sample."""
    import spatialdata as sd
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    sdata = sd.read_zarr(store)
    frame = sdata[shapes]
    frame = frame.iloc[sample_of(len(frame))]
    geometry = frame.geometry.buffer(frame["radius"], quad_segs=500) if "radius" in frame else frame.geometry
    geometry = geometry.affine_transform([1, 0, 0, -1, 0, SIDE])  # its y axis points up
    features = json.loads(geometry.to_json())["features"]
    data = sdata[IMAGE].values

    def run():
        rasters = [NumPyRasterSource(channel, 0, 0, SIDE, SIDE, name=f"g{i}") for i, channel in enumerate(data)]
        return exact_extract(rasters, features, ["mean"], output="pandas").to_numpy()

    return run


def sample_of(n: int) -> np.ndarray:
    return np.sort(np.random.default_rng(1).choice(n, min(n, SAMPLE), replace=False))


# one tool, one process -------------------------------------------------------------------------------------------------


def child(tool: str, shapes: str, store: Path, out: Path, repeats: int) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        run = globals()[f"tool_{tool}"](store, shapes)
        base = memory(now=True)
        times, work, result = [], [], None
        for _ in range(repeats):
            result = None
            start, start_work = time.perf_counter(), time.process_time()
            result = run()
            times.append(time.perf_counter() - start)
            work.append(time.process_time() - start_work)
            if sum(times) > ENOUGH:
                break
    if result is not None:
        np.save(out, result)
    print(
        json.dumps({"first": times[0], "best": min(times), "work": min(work), "peak": memory() - base, "times": times})
    )


def memory(now: bool = False) -> float:
    """Memory of this process, GB: its peak so far, or what it holds now."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent had before it started this process
        field = "VmRSS" if now else "VmHWM"
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def call(tool: str, shapes: str, store: Path, out: Path, repeats: int, pythons: dict[str, str], **environment) -> dict:
    command = [pythons.get(tool, sys.executable), __file__, "--child", tool, shapes, str(store), str(out), str(repeats)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {SECONDS} s"}
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return {"failed": last[0][:90] if last else f"exit {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


# all of it -------------------------------------------------------------------------------------------------------------


def measure(n_genes: int, tools: list[str], pythons: dict[str, str], folder: Path, repeats: int) -> list[str]:
    store = folder / f"{n_genes}.zarr"
    if not store.exists():
        make_store(store, n_genes)
    lines = [
        "| shapes | tool | time, s | first call, s | CPU time, s | peak memory, GB | largest error | mean error | lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shapes, label in SHAPES.items():
        found, values = {}, {}
        for tool in tools:
            out = folder / f"{tool}.npy"
            out.unlink(missing_ok=True)
            n = 1 if tool in {"spatialdata", "exactextract"} else repeats
            found[tool] = call(tool, shapes, store, out, n, pythons)
            values[tool] = np.load(out) if out.exists() else None
            print(n_genes, shapes, tool, found[tool], file=sys.stderr, flush=True)
        for tool in tools:
            figures = found[tool]
            name = {"read": "reading the store", "spatialdata": "spatialdata, labels, 1 gene"}.get(tool, tool)
            name = f"exactextract, {SAMPLE} shapes" if tool == "exactextract" else name
            if "failed" in figures:
                lines.append(f"| {label} | {name} | `{figures['failed']}` | | | | | | |")
                continue
            row = [label, name, *(f"{figures[key]:.2f}" for key in ("best", "first", "work", "peak"))]
            row += (
                compare(values[tool], values.get("exactextract")) if tool not in {"read", "exactextract"} else [""] * 3
            )
            lines.append(f"| {' | '.join(row)} |")
    return lines


def compare(values: np.ndarray | None, oracle: np.ndarray | None) -> list[str]:
    if values is None:
        return [""] * 3
    lost = str(int(np.isnan(values).all(axis=1).sum()))
    if oracle is None:
        return ["", "", lost]
    error = np.abs(values[sample_of(len(values))] - oracle[:, : values.shape[1]])
    return [f"{np.nanmax(error):.1g}", f"{np.nanmean(error):.1g}", lost]


def first_call(pythons: dict[str, str], folder: Path) -> str:
    """Time of the first call of all, with nothing compiled yet, against the next one."""
    store = folder / "small.zarr"
    if not store.exists():
        make_store(store, 2)
    with tempfile.TemporaryDirectory() as cache:
        figures = [
            call("pixnet", shapes, store, folder / "x.npy", 2, pythons, NUMBA_CACHE_DIR=cache)
            for shapes in ("cells", "cells")
        ]
    cold, warm = ((f["first"] - f["best"]) if "first" in f else float("nan") for f in figures)
    return (
        f"The first call after installation compiles the kernels, which takes {cold:.1f} s; they are kept on disk, and "
        f"the first call of every later process spends {warm:.2f} s on loading them and on first imports."
    )


LARGE = {"polygons": "200,000 polygons of 16 corners", "bins": "1,048,576 bins of 4 x 4 px"}


def large(shapes: str, n_genes: int = 250, side: int = 4096) -> None:
    """Aggregate a map that is made as it is read over very many shapes, and print the figures."""
    import dask.array as da
    import geopandas as gpd
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel

    import pixnet as px

    px.settings.progress = False
    px.settings.verbosity = "error"
    ramp = np.linspace(0.5, 1.5, n_genes + 1, dtype=np.float32)[:, None, None]

    def block(block_info=None):
        (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]
        return ramp * np.hypot.outer(np.arange(y0, y1, dtype=np.float32), np.arange(x0, x1, dtype=np.float32))

    chunks = ((n_genes + 1,), (256,) * (side // 256), (256,) * (side // 256))
    lazy = da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.zeros((0, 0, 0), np.float32))
    names = [f"g{i}" for i in range(n_genes)] + ["__total__"]
    if shapes == "bins":
        y, x = np.mgrid[0:side:4, 0:side:4].reshape(2, -1)
        geometry = shapely.box(x, y, x + 4, y + 4)
    else:
        rng = np.random.default_rng(0)
        centres, radii = rng.uniform(8, side - 8, (200_000, 1, 2)), rng.uniform(2, 6, (200_000, 1, 1))
        angles = 2 * np.pi * np.arange(16) / 16
        geometry = shapely.polygons(centres + radii * np.stack([np.cos(angles), np.sin(angles)], 1))
    sdata = SpatialData(
        images={"map": Image2DModel.parse(lazy, dims=("c", "y", "x"), c_coords=names)},
        shapes={shapes: ShapesModel.parse(gpd.GeoDataFrame(geometry=geometry))},
    )
    px.tl.aggregate  # noqa: B018  late imports are not part of the call
    before, start, start_work = memory(now=True), time.perf_counter(), time.process_time()
    table = px.tl.aggregate(sdata, shapes, inplace=False)
    figures = {
        "seconds": time.perf_counter() - start,
        "work": time.process_time() - start_work,
        "peak": memory() - before,
        "table": (table.X.nbytes + table.layers["density"].nbytes) / 1e9,
        "map": (n_genes + 1) * side**2 * 4 / 1e9,
        "lost": int(np.isnan(table.X).all(axis=1).sum()),
    }
    print(json.dumps(figures))


def measure_large() -> list[str]:
    lines = [
        "| shapes x 250 genes | time, s | CPU time, s | peak memory, GB | table, GB (part of the peak) | lost |",
        "|---|---|---|---|---|---|",
    ]
    for shapes, label in LARGE.items():
        command = [sys.executable, __file__, "--child", "large", shapes, "", "", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        row = [
            label,
            *(f"{figures[key]:.{digits}f}" for key, digits in (("seconds", 0), ("work", 0), ("peak", 1), ("table", 1))),
        ]
        lines.append(f"| {' | '.join([*row, str(figures['lost'])])} |")
    return [*lines, "", f"The map has 4096 x 4096 pixels, {figures['map']:.0f} GB, and is made as it is read."]


def machine() -> str:
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="+", default=[50])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help="interpreter for a tool")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the stores (1 to 5 GB); default: a temporary folder")
    parser.add_argument("--large", action="store_true", help="a million bins and 200,000 polygons instead")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tool, shapes, store, out, repeats = options.child
        if tool == "large":
            large(shapes)
            return
        child(tool, shapes, Path(store), Path(out), int(repeats))
        return
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}\n", flush=True)
    if options.large:
        print(*measure_large(), sep="\n")
        return
    pythons = dict(item.split("=", 1) for item in options.python)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for n_genes in options.genes:
            lines = measure(n_genes, options.tools, pythons, folder, options.repeats)
            print(f"{n_genes} genes, {SIDE} x {SIDE} pixels\n", *lines, "", sep="\n", flush=True)
        if "pixnet" in options.tools:
            print(first_call(pythons, folder))


if __name__ == "__main__":
    main()
