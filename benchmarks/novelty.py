"""Does a model know where it does not know the tissue? Novelty of slides and of a cell type that training never saw.

    python benchmarks/novelty.py real DATA --json docs/_generated/novelty_real.json
    python benchmarks/novelty.py synthetic --json docs/_generated/novelty_synthetic.json
    python benchmarks/novelty.py cost DATA

real: a kidney model (spots of one part of the section) and a breast model (her2st C2 to C4, at the kidney's pixel size, so that both
see both slides at the same scale) predict held-out tissue of their own and slides of the other organ; and the model that ships
predicts C5, and B4 of another patient. Each row has the mean percentile, the share of 100 µm squares above 99, and the area under
the ROC curve that tells these squares from those of held-out tissue. Risk: the mean squared error of log CP10k, over the mean of
all, by quarters of the spots from familiar to new.

synthetic: training on spots without one cell type; squares of an unseen slide that are mostly that type against those without it.

cost: prediction with and without novelty, in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import quality
from her2st import panel
from sklearn.metrics import roc_auc_score
from spatialdata import SpatialData
from trust import show

import pixnet as px

SQUARE_UM = 100
TYPES = {"tumour": ("tumour",), "glands": ("epithelial",), "lymphoid": ("T cell", "B cell")}


def squares(sdata: SpatialData, model: px.models.PixNet, region: str | None = None) -> np.ndarray:
    """Return the novelty of the 100 µm squares of a slide."""
    px.tl.predict(sdata, model, genes=model.genes[:1], region=region, key_added="probe", overwrite=True)
    px.pp.make_grid(sdata, SQUARE_UM, key_added="squares", overwrite=True)
    table = px.tl.aggregate(sdata, "squares", image_key="probe", inplace=False)
    return table.obs["novelty"].dropna().to_numpy()


def row(own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Compare squares with those of held-out tissue."""
    auc = roc_auc_score(np.r_[np.zeros(len(own)), np.ones(len(other))], np.r_[own, other])
    return {
        "squares": len(other),
        "mean": round(float(other.mean()), 1),
        "above_99": round(float((other > 99).mean()), 3),
        "auc": round(float(auc), 3),
    }


def risk(sdata: SpatialData, model: px.models.PixNet, genes: list[str]) -> list[float]:
    """Return the error of spots by quarters of their novelty, over the mean error."""
    px.tl.predict(sdata, model, key_added="all", overwrite=True)
    table = px.tl.aggregate(sdata, "spots", image_key="all", genes=genes, inplace=False)
    counts = sdata["spots_counts"]
    rows = counts.obs["instance_id"].to_numpy()
    table = table[table.obs.set_index("instance_id").index.get_indexer(rows)]
    total = np.asarray(counts.X.sum(axis=1)).ravel()
    measured = np.log1p(1e4 * counts[:, genes].X.toarray() / np.maximum(total, 1)[:, None])
    error = ((np.log1p(table.X) - measured) ** 2).mean(axis=1)
    novelty = table.obs["novelty"].to_numpy()
    known = np.isfinite(novelty) & np.isfinite(error)
    novelty, error = novelty[known], error[known]
    quarter = np.digitize(novelty, np.quantile(novelty, [0.25, 0.5, 0.75]))
    return [round(float(error[quarter == q].mean() / error.mean()), 2) for q in range(4)]


def real(data: Path, seed: int) -> dict[str, dict]:
    """Kidney, breast, and a second patient."""
    train, test, genes = quality.kidney_split(data / "visium_hd_kidney", False)
    sections = {name: px.datasets.her2st(name, path=data / "her2st") for name in ("C2", "C3", "C4", "C5", "B4")}
    learned = {name: sections[name] for name in ("C2", "C3", "C4")}
    mpp = px.models.PixNet(genes[:2], mpp=2.0).mpp
    kidney = px.tl.train(train, genes=genes, shapes="spots", table_key="spots_counts", seed=seed)
    breast = px.tl.train(learned, mpp=mpp, seed=seed)
    found = {}
    own = squares(test, kidney, "spots")
    found["kidney model"] = {"kidney, held out": row(own, own)} | {
        f"her2st {name}": row(own, squares(sections[name], kidney)) for name in ("C5", "B4")
    }
    own = squares(sections["C5"], breast)
    found["breast model at 2 um"] = {
        "her2st C5": row(own, own),
        "her2st B4": row(own, squares(sections["B4"], breast)),
        "kidney": row(own, squares(train, breast)),
    }
    shipped = px.models.load("her2st")
    scored = panel(str(data / "her2st"))
    own = squares(sections["C5"], shipped)
    found["her2st"] = {
        name: row(own, squares(sections[name], shipped)) | {"risk": risk(sections[name], shipped, scored)}
        for name in ("C5", "B4")
    }
    return found


def synthetic(seed: int) -> dict[str, dict]:
    """Leave one cell type out of training."""
    train = px.datasets.synthetic_tissue(3000, n_genes=20, seed=seed + 1, shapes=("spots", "cells"))
    test = px.datasets.synthetic_tissue(3000, n_genes=20, seed=seed + 2, shapes=("cells",))
    found = {}
    for name, kinds in TYPES.items():
        centres = train["cells"].centroid
        of_type = centres[train["cells"]["cell_type"].isin(kinds)]
        spots = train["spots"]
        free = ~spots.buffer(spots["radius"] + 40).intersects(of_type.union_all())
        slide = train.subset(["he"])
        slide["spots"] = spots[free]
        table = train["spots_counts"]
        slide["spots_counts"] = table[table.obs["instance_id"].isin(spots.index[free])].copy()
        model = px.tl.train(slide, shapes="spots", table_key="spots_counts", seed=seed, max_epochs=30)
        px.tl.predict(test, model, key_added="whole", overwrite=True)
        px.pp.make_grid(test, SQUARE_UM, key_added="squares", overwrite=True)
        grid = test["squares"]
        cells = test["cells"]
        inside = grid.sindex.query(cells.centroid, predicate="within")
        kind = cells["cell_type"].isin(kinds).to_numpy()[inside[0]]
        n = np.bincount(inside[1], minlength=len(grid))
        share = np.bincount(inside[1], kind, minlength=len(grid)) / np.maximum(n, 1)
        table = px.tl.aggregate(test, "squares", image_key="whole", inplace=False)
        truth = px.tl.aggregate(test, "squares", image_key="truth", genes=model.genes, inplace=False)
        error = np.square(np.log1p(table.X) - np.log1p(truth.X)).mean(axis=1)
        novelty = table.obs["novelty"].to_numpy()
        new, old = novelty[share > 0.5], novelty[(share == 0) & (n > 0)]
        known = np.isfinite(novelty) & np.isfinite(error)
        quarter = np.digitize(novelty[known], np.quantile(novelty[known], [0.25, 0.5, 0.75]))
        found[name] = {
            "spots": int(free.sum()),
            **row(old[np.isfinite(old)], new[np.isfinite(new)]),
            "risk": [round(float(error[known][quarter == q].mean() / error[known].mean()), 2) for q in range(4)],
            "rank": round(
                float(np.corrcoef(novelty[known].argsort().argsort(), error[known].argsort().argsort())[0, 1]), 2
            ),
        }
        print(name, found[name], flush=True)
    return found


def cost(data: Path, rounds: int = 3) -> dict[str, list[float]]:
    """Time the prediction of a section with and without novelty."""
    sdata = px.datasets.her2st("C5", path=data / "her2st")
    known, unknown = px.models.load("her2st"), px.models.load("her2st")
    unknown.novelty.quantiles.zero_()
    found: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(rounds):
        for name, model in (("with", known), ("without", unknown)):
            start = time.perf_counter()
            px.tl.predict(sdata, model, overwrite=True)
            found[name].append(round(time.perf_counter() - start, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["real", "synthetic", "cost"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.task == "synthetic":
        found = synthetic(args.seed)
    else:
        found = real(args.data, args.seed) if args.task == "real" else cost(args.data)
    show(found, args.json)


if __name__ == "__main__":
    main()
