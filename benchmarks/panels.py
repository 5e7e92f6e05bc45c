"""Do tables that measured different genes teach as much as tables that measured all?

    python benchmarks/panels.py

Two synthetic slides of 50 genes, measured in spots or in cells. One model sees all genes of both; one sees genes 1 to 30 of the first and 21 to 50
of the second (`totals="panel"`). Panels halve what is known of a gene that is in one of them only, so models of one slide alone, with
all its genes, stand beside them. All predict a third slide, whose true expression is known: Pearson's r of log1p CP10k over its
shapes, gene by gene: as the table of the map has them, and once more as shares of the panel alone, which is what panels measure.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import spatialdata
from trust import show

import pixnet as px
from pixnet._correlation import pearson

PANELS = slice(0, 30), slice(20, 50)


def compare_within(panel: slice, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return Pearson's r of each gene's log1p share of a panel; NaN for genes that it lacks."""
    shares = (np.log1p(1e4 * x[:, panel] / x[:, panel].sum(axis=1, keepdims=True)) for x in (predicted, truth))
    r = np.full(predicted.shape[1], np.nan)
    r[panel] = pearson(*shares)
    return r


def with_genes(sdata, genes: list[str]):
    """Return a slide whose table measured some genes only."""
    (shapes,) = sdata.shapes
    part = sdata.subset(["he", shapes])
    part[f"{shapes}_counts"] = sdata[f"{shapes}_counts"][:, genes].copy()
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-um", type=float, default=2500)
    parser.add_argument("--shapes", choices=["spots", "cells"], default="spots")
    parser.add_argument("--programs", type=int, default=0, help="0: a channel for each gene")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    px.settings.progress = False
    with tempfile.TemporaryDirectory() as folder:
        show(compare(args, Path(folder)), args.json)


def painted(args, seed: int, folder: Path):
    """Return a synthetic slide from a store: painting it anew takes longer than the model on it."""
    sdata = px.datasets.synthetic_tissue(args.size_um, n_genes=50, seed=seed, shapes=[args.shapes])
    sdata.write(folder / f"{seed}.zarr")
    return spatialdata.read_zarr(folder / f"{seed}.zarr")


def compare(args, folder: Path) -> dict:
    """Train both models with every seed, predict the third slide and compare them with its truth."""
    first, second, test = (painted(args, seed, folder) for seed in (1, 2, 3))
    shapes, table_key = args.shapes, f"{args.shapes}_counts"
    genes = list(first[table_key].var_names)
    truth = px.tl.aggregate(test, shapes, image_key="truth", genes=genes, inplace=False).X
    panels = {"first": with_genes(first, genes[:30]), "second": with_genes(second, genes[20:])}
    trained = {
        "all": ({"first": first, "second": second}, None),
        "panels": (panels, "panel"),
        "first": ({"first": first}, None),
        "second": ({"second": second}, None),
    }
    found: dict[str, list] = {name: [] for name in trained}
    for seed in range(args.seeds):
        for name, (slides, totals) in trained.items():
            common = {"genes": genes, "totals": totals, "seed": seed, "n_programs": args.programs}
            model = px.tl.train(slides, shapes=shapes, table_key=table_key, **common)
            px.tl.predict(test, model, key_added="map", store="genes", overwrite=True)
            table = px.tl.aggregate(test, shapes, image_key="map", genes=genes, inplace=False)
            known = np.isfinite(table.X).all(axis=1) & np.isfinite(truth).all(axis=1)
            x, y = table.X[known], truth[known]
            found[name].append([pearson(np.log1p(x), np.log1p(y)), *(compare_within(p, x, y) for p in PANELS)])
    mean = {name: np.mean(runs, axis=0) for name, runs in found.items()}
    parts = {
        "1 to 20, in the first": (slice(0, 20), "first", 1),
        "21 to 30, in both": (slice(20, 30), "all", 1),
        "31 to 50, in the second": (slice(30, 50), "second", 2),
    }
    rows = {}
    for name, (part, alike, panel) in parts.items():
        every, own, of_one = mean["all"][:, part], mean["panels"][:, part], mean[alike][:, part]
        rows[name] = {
            "all": round(float(every[0].mean()), 3),
            "panels": round(float(own[0].mean()), 3),
            "all genes of as many slides": round(float(of_one[0].mean()), 3),
            "within 0.02 of all": round(float((every[0] - own[0] < 0.02).mean()), 2),
            "within 0.02 of as many slides": round(float((of_one[0] - own[0] < 0.02).mean()), 2),
            "shares of the panel: all": round(float(every[panel].mean()), 3),
            "shares of the panel: panels": round(float(own[panel].mean()), 3),
            "shares of the panel: within 0.02 of all": round(float((every[panel] - own[panel] < 0.02).mean()), 2),
        }
    noise = float(np.nanmax(np.abs(np.subtract(*found["all"][:2])))) if args.seeds > 1 else None
    return {"genes": rows, "largest_difference_of_two_seeds": noise}


if __name__ == "__main__":
    main()
