"""How far the map of a crop of a slide is from the map of the slide: section C5 of her2st, shipped model, float32.

    python benchmarks/crops.py              # eight random origins (needs the data; see PIXNET_DATA_DIR)
    python benchmarks/crops.py unanchored   # with blocks laid from the corner of each crop instead

The table gives the median relative difference of a map pixel, and of a block of 50 µm, more than 480 px from the crop's
edges, for CD24 and the total.
"""

from __future__ import annotations

import sys

import numpy as np
import spatialdata as sd
from spatialdata.transformations import get_transformation

import pixnet as px
from pixnet._sdata import slide as slides

SIDE, EDGE, CENTRE, BLOCK = 1600, 480, (3812, 4051), 18


def predicted(sdata, y: np.ndarray, x: np.ndarray, **arguments) -> np.ndarray:
    """The map at pixels of the slide in rows and columns."""
    lazy = px.tl.predict(sdata, "her2st", genes=["CD24"], precision="float32", inplace=False, **arguments)
    matrix = np.linalg.inv(get_transformation(lazy, "global").to_affine_matrix(("y", "x"), ("y", "x")))
    rows, columns = (np.floor(matrix[k, k] * (n + 0.5) + matrix[k, 2]).astype(int) for k, n in enumerate((y, x)))
    part = lazy.data[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].compute(scheduler="synchronous")
    return part[:, rows - rows[0]][:, :, columns - columns[0]]


def blocks(values: np.ndarray) -> np.ndarray:
    n = values.shape[-1] // BLOCK
    return values[:, : n * BLOCK, : n * BLOCK].reshape(-1, n, BLOCK, n, BLOCK).mean(axis=(2, 4))


def main(arguments: list[str]) -> None:
    px.settings.progress = False
    if arguments == ["unanchored"]:
        slides.find_origin = lambda sdata, key: (0.0, 0.0)
    sdata = px.datasets.her2st("C5")
    rng = np.random.default_rng(0)
    print("| origin (y, x), px | CD24, pixel | 50 µm | total, pixel | 50 µm |")
    print("| --- | --- | --- | --- | --- |")
    for _ in range(8):
        y, x = (int(c - SIDE // 2 + rng.integers(-300, 300)) for c in CENTRE)
        box = {"min_coordinate": [x, y], "max_coordinate": [x + SIDE, y + SIDE], "target_coordinate_system": "global"}
        crop = sd.bounding_box_query(sdata, axes=("x", "y"), filter_table=False, **box)
        inner = np.arange(EDGE, SIDE - EDGE, 4)
        where = (inner + y, inner + x)
        region = (x + EDGE, y + EDGE, x + SIDE - EDGE, y + SIDE - EDGE)
        whole, found = predicted(sdata, *where, mask_key=False, region=region), predicted(crop, *where, mask_key=False)
        cells = []
        for channel in range(2):
            for one, other in ((whole, found), (blocks(whole), blocks(found))):
                cells.append(f"{np.median(np.abs(other[channel] / one[channel] - 1)):.1%}")
        print(f"| {y}, {x} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
