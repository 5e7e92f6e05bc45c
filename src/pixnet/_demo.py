"""A demonstration of every step on data that needs no download: ``python -m pixnet._demo --out demo``.

It trains on the spots of one synthetic slide, predicts another that the model has not seen, sums the map over spots,
cells and an 8 µm grid, and compares each with the truth. Where ``PIXNET_DATA_DIR`` holds real data, it also runs the
shipped model on a real section.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from spatialdata import SpatialData

import pixnet as px
from pixnet._correlation import pearson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GENES_SHOWN = ["TUM1", "BCE1", "FIB1"]
SECTION = "C5"  # the shipped model was not trained on it
SECTION_GENES = ["CD24", "IGHA1", "HLA-DRA"]


def say(text: str = "") -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def step(text: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    say(f"- {text} ...")
    start = time.perf_counter()
    yield
    say(f"  done in {time.perf_counter() - start:.0f} s")


def save(axes: Axes | np.ndarray, path: Path) -> None:
    """Save the figure that Axes belong to."""
    import matplotlib.pyplot as plt

    plt.sca(axes[0] if isinstance(axes, np.ndarray) else axes)
    plt.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close()


def synthetic(out: Path, *, size_um: float, n_genes: int, max_epochs: int) -> None:
    """Train, predict, aggregate and compare on synthetic slides."""
    with step(f"painting two synthetic slides, {size_um:g} x {size_um:g} µm, one to train on and one to test on"):
        training = px.datasets.synthetic_tissue(size_um, n_genes=n_genes, seed=1, shapes=["spots"])
        test = px.datasets.synthetic_tissue(size_um, n_genes=n_genes, seed=2, shapes=["spots", "cells"])
    with step(f"training on the {len(training['spots'])} spots of the first"):
        genes = px.pp.select_genes(training, table_key="spots_counts", n_top=n_genes)
        model = px.tl.train(training, shapes="spots", genes=genes, max_epochs=max_epochs, seed=0, refit=False)
        model.save(out / "model.safetensors", overwrite=True)
        save(px.pl.training(model), out / "training.png")
    with step("predicting the second, and summing its map over spots, cells and an 8 µm grid"):
        px.pp.make_grid(test, 8.0, key_added="grid_8um")
        truth = SpatialData(
            images={"truth": test.images.pop("truth")}, shapes=dict(test.shapes), attrs=dict(test.attrs)
        )
        store = out / "demo.zarr"
        if store.exists():
            shutil.rmtree(store)
        test.write(store)
        px.tl.predict(test, model)
        px.tl.aggregate(test, ["spots", "cells", "grid_8um"])
    with step("comparing with the truth, and drawing figures"):
        rows, scores = _compare(test, truth)
        genes = [gene for gene in GENES_SHOWN if gene in model.genes] or model.genes[:3]
        save(px.pl.gene_map(test, genes, shapes="spots"), out / "gene_maps.png")
        save(px.pl.scales(test, genes[0], ["cells", "grid_8um", "spots"]), out / "scales.png")
        save(
            px.pl.compare(test, genes[0], table_key="cells_genes", reference_key="cells_counts"),
            out / "measured_and_predicted.png",
        )
        save(px.pl.evaluation(scores), out / "evaluation.png")
    say()
    say(f"A slide that the model has not seen, {len(model.genes)} genes; mean Pearson's r of log1p CP10k over shapes:")
    say()
    say(f"  {'scale':<22}{'shapes':>8}{'with the truth':>17}{'with noisy counts':>20}")
    for name, n, truth, counts in rows:
        say(f"  {name:<22}{n:>8,}{truth:>17.2f}{'-' if counts is None else f'{counts:.2f}':>20}")
    say()


def _compare(test: SpatialData, truth: SpatialData) -> tuple[list[tuple], dict[str, pd.DataFrame]]:
    """Score the predicted tables of a synthetic slide: rows to print, and Pearson's r by gene and scale."""
    names = {"spots": "spots, 55 µm", "cells": "cells", "grid_8um": "grid, 8 µm"}
    tables = px.tl.aggregate(truth, list(names), image_key="truth", inplace=False)
    assert isinstance(tables, dict)
    rows, scores = [], {}
    for name, shown in names.items():
        predicted = test[f"{name}_genes"]
        a = np.log1p(predicted.X)
        b = np.log1p(tables[name][:, predicted.var_names].X)
        known = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        r = pearson(a[known], b[known])
        scores[shown] = pd.DataFrame({"pearson": r}, index=predicted.var_names)
        counts = None
        if f"{name}_counts" in test.tables:
            measured = px.tl.evaluate(test, table_key=f"{name}_genes", reference_key=f"{name}_counts")
            counts = measured.attrs["summary"]["pcc_mean"]
        rows.append((shown, len(predicted), float(np.nanmean(r)), counts))
    return rows, scores


def real(out: Path) -> None:
    """Run the shipped model on a section that it was not trained on."""
    with step(f"her2st {SECTION}, a real section that the shipped model has not seen: predict, aggregate, evaluate"):
        sdata = px.datasets.her2st(SECTION)
        px.tl.predict(sdata)
        px.tl.aggregate(sdata, "spots")
        score = px.tl.evaluate(sdata, table_key="spots_genes", reference_key="spots_counts")
        known = [gene for gene in SECTION_GENES if gene in score.index] or list(score.index[:3])
        save(px.pl.gene_map(sdata, known, shapes="spots", show="cp10k"), out / f"her2st_{SECTION}_maps.png")
        save(px.pl.programs(sdata), out / f"her2st_{SECTION}_programs.png")
        best = score["pearson"].idxmax()
        save(
            px.pl.compare(sdata, best, table_key="spots_genes", reference_key="spots_counts"),
            out / f"her2st_{SECTION}_best_gene.png",
        )
        save(px.pl.evaluation(score), out / f"her2st_{SECTION}_evaluation.png")
    r, low = score["pearson"], sdata["spots_genes"].var["validation_pearson_low"].reindex(score.index)
    say(f"  {len(r):,} genes over {len(sdata['spots'])} spots: {int((r > 0.3).sum()):,} with Pearson's r above 0.3")
    say(f"  mean r {r[low > 0].mean():.2f} of the {int((low > 0).sum()):,} genes that training found to be predicted,")
    say(f"  and {r[~(low > 0)].mean():.2f} of the others: px.pl.trust(px.models.load('her2st')) shows which")
    say()


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m pixnet._demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--size-um", type=float, default=800.0, help="edge of the synthetic slides (µm)")
    parser.add_argument("--genes", type=int, default=30, help="genes of the synthetic slides")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the spots at most")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # from other libraries
    warnings.filterwarnings("ignore", category=UserWarning)
    px.settings.verbosity = "warning"
    px.settings.progress = sys.stderr.isatty()

    start = time.perf_counter()
    say(f"pixnet {px.__version__}: from an H&E slide to gene maps, and from maps to the numbers of any shapes\n")
    synthetic(out, size_um=arguments.size_um, n_genes=arguments.genes, max_epochs=arguments.epochs)
    data = os.environ.get("PIXNET_DATA_DIR")
    if data and (Path(data) / "her2st").is_dir():
        real(out)
    say(f"All of it took {time.perf_counter() - start:.0f} s. Results, in {out}/:")
    for path in sorted(out.iterdir()):
        say(f"  {path.name}{'/' if path.is_dir() else ''}")
    say()
    say("What to try next:")
    say(f"  look at     {out}/gene_maps.png, {out}/scales.png, {out}/evaluation.png")
    say(f"  open        spatialdata.read_zarr('{out}/demo.zarr'), for instance with napari-spatialdata")
    say("  a real one  pixnet.datasets.her2st('C5'), then pixnet.tl.predict(sdata): the shipped model, no training")
    say("  your own    pixnet.io.slide('slide.svs'), or any SpatialData object with an H&E image: see docs/")


if __name__ == "__main__":
    main()
