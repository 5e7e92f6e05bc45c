"""A million squares of GeoJSON: read, summed over a map of ten genes, and written back with ten measurements each.

    python benchmarks/geojson.py [--n 1000000]

It prints times, and the peak memory of the process after each step.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import shapely
from spatialdata import SpatialData
from spatialdata.transformations import Scale

import pixnet as px
from pixnet._core.geojson import BATCH, write_features
from pixnet._sdata.raster_element import pyramid, raster_element

EDGE = 4  # pixels


def make_file(path: Path, side: int) -> None:
    """Write squares as QuPath would, ids and classes among them."""

    def batches() -> Iterator[tuple]:
        for start in range(0, side * side, BATCH):
            row, col = divmod(np.arange(start, min(start + BATCH, side * side)), side)
            boxes = shapely.box(col * EDGE, row * EDGE, (col + 1) * EDGE, (row + 1) * EDGE)
            properties = {'"objectType"': '"detection"', '"classification"': '{"name":"Tumor","color":[200,0,0]}'}
            yield boxes, [f"{r:08x}-0000-4000-8000-{c:012x}" for r, c in zip(row, col)], [properties] * len(boxes)

    with path.open("w") as file:
        write_features(file, batches())


@contextmanager
def measured(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what:10s} {time.perf_counter() - start:6.1f} s   peak so far {peak:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    side = int(parser.parse_args().n ** 0.5)
    rng = np.random.default_rng(0)
    size = side * EDGE
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "squares.geojson")
        make_file(file, side)
        print(f"{side * side:,} squares, {file.stat().st_size / 1e6:.0f} MB")
        slide = rng.integers(60, 220, (3, size, size), dtype=np.uint8)
        names = [*(f"G{i}" for i in range(10)), "__total__"]
        values = rng.random((11, size // 2, size // 2), dtype=np.float32)
        genes = raster_element(
            *pyramid(values), transformations={"global": Scale([2.0, 2.0], axes=("x", "y"))}, channels=names
        )
        sdata = SpatialData(images={"he": raster_element(*pyramid(slide)), "he_genes": genes})
        px.pp.set_mpp(sdata, "he", 0.5)
        px.pp.set_mpp(sdata, "he_genes", 1.0)
        with measured("read"):
            px.io.read_geojson(sdata, file, image_key="he", unit="px")
        with measured("aggregate"):
            px.tl.aggregate(sdata, "squares", image_key="he_genes")
        with measured("write"):
            px.io.write_geojson(sdata, "squares", Path(folder, "back.geojson"), image_key="he")
        with measured("write, gz"):
            px.io.write_geojson(sdata, "squares", Path(folder, "back.geojson.gz"), image_key="he")


if __name__ == "__main__":
    main()
