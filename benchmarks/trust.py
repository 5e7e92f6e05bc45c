"""Right amounts and honest intervals: counts of held-out tissue against what was predicted of them.

    python benchmarks/trust.py kidney DATA/visium_hd_kidney --json docs/_generated/trust_kidney.json
    python benchmarks/trust.py her2st DATA/her2st --json docs/_generated/trust_her2st.json
    python benchmarks/trust.py synthetic --json docs/_generated/trust_synthetic.json

kidney: a model of the 250 genes of highest mean is trained on the spots of one part of the section; the spots and bins of the other
part are tested. her2st: the model that ships is tested on a section of its patient (C5) and of another (B4). Each row
has the ratio of measured to predicted amounts, the share of counts inside their 50, 80, 90 and 95 % intervals (randomised PIT), the share of
genes whose 90 % interval holds 84 to 96 %, the width of the 90 % interval over that without an image for the 50 best genes, and
the rank correlation of each gene's stated r with the r that was found. Kidney: also of counts of which half was thrown away at
random. synthetic: intervals of expression against the true expression of an unseen slide, at shapes of any size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import quality
from her2st import panel
from scipy import sparse
from spatialdata import SpatialData

import pixnet as px

LEVELS = (0.5, 0.8, 0.9, 0.95)


def rows(sdata: SpatialData, shapes: list[str], genes: list[str], total_key: str | None) -> dict[str, dict]:
    """Return a row for each shapes element."""
    found = {}
    for key in shapes:
        scores = {
            level: px.tl.evaluate(
                sdata,
                table_key=f"{key}_genes",
                reference_key=f"{key}_counts",
                genes=genes,
                total_key=total_key,
                interval=level,
            )
            for level in LEVELS
        }
        at_90 = scores[0.9]
        best = at_90["pearson"].nlargest(50).index
        stated = sdata[f"{key}_genes"].var["validation_pearson"]
        found[key] = {
            "pcc": at_90.attrs["summary"]["pcc_mean"],
            "ratio": at_90.attrs["summary"]["ratio"],
            "ratio_10_50_90": [float(v) for v in np.nanquantile(at_90["ratio"], [0.1, 0.5, 0.9])],
            "coverage": {f"{level:g}": float(s["coverage"].mean()) for level, s in scores.items()},
            "genes_84_to_96": float(at_90["coverage"].between(0.84, 0.96).mean()),
            "width_50_best": float((at_90["width"] / at_90["marginal_width"])[best].mean()),
            "rank_of_stated_r": float(at_90["pearson"].corr(stated, method="spearman")),
        }
    return found


def kidney(folder: Path, seed: int) -> dict[str, dict]:
    """Train on one part of the section and test the other."""
    train, test, genes = quality.kidney_split(folder, False)
    total_key = quality.kidney.TOTAL_KEY
    model = px.tl.train(train, shapes="spots", table_key="spots_counts", total_key=total_key, genes=genes, seed=seed)
    px.tl.predict(test, model, overwrite=True)
    shapes = [*quality.BINS, "spots"]
    px.tl.aggregate(test, shapes, overwrite=True)
    found = rows(test, shapes, genes, total_key)
    rng = np.random.default_rng(seed)
    for key in shapes:
        thinned = test[f"{key}_counts"][:, genes].copy()
        whole = sparse.csr_matrix(thinned.X)
        whole.data = rng.binomial(whole.data.astype(np.int64), 0.5).astype(np.float32)
        thinned.X = whole
        total = rng.binomial(thinned.obs[total_key].to_numpy().astype(np.int64), 0.5)
        thinned.obs[total_key] = np.maximum(total, np.asarray(whole.sum(axis=1)).ravel())
        test[f"{key}_thinned"] = thinned
        scores = px.tl.evaluate(
            test, table_key=f"{key}_genes", reference_key=f"{key}_thinned", genes=genes, total_key=total_key
        )
        found[key]["thinned_90"] = float(scores["coverage"].mean())
    return found


def synthetic(seed: int) -> dict[str, dict]:
    """Train on the spots of one slide; compare intervals of another with its true expression, not with counts."""
    train = px.datasets.synthetic_tissue(2000, n_genes=30, seed=seed + 1, shapes="spots")
    test = px.datasets.synthetic_tissue(2000, n_genes=30, seed=seed + 2, shapes="cells")
    model = px.tl.train(train, shapes="spots", table_key="spots_counts", seed=seed)
    px.tl.predict(test, model)
    grids = {f"{size} um": size for size in (8, 16, 32, 56)}
    for key, size in grids.items():
        px.pp.make_grid(test, size, key_added=key.replace(" ", ""))
    found = {}
    for key in [*(key.replace(" ", "") for key in grids), "cells"]:
        truth = px.tl.aggregate(test, key, image_key="truth", genes=model.genes, inplace=False)
        inside = {}
        for level in LEVELS:
            table = px.tl.aggregate(test, key, image_key="he_genes", interval=level, inplace=False)
            within = (table.layers["lower"] <= truth.X) & (table.layers["upper"] >= truth.X)
            inside[f"{level:g}"] = float(within[np.isfinite(truth.X) & np.isfinite(table.X)].mean())
        found[key] = {"truth_inside": inside}
    return found


def her2st(folder: Path, model: str) -> dict[str, dict]:
    """Test a model on a section of its patient and on one of another."""
    net, genes, found = px.models.load(model), panel(str(folder)), {}
    for section in ("C5", "B4"):
        sdata = px.datasets.her2st(section, path=folder)
        px.tl.predict(sdata, net)
        px.tl.aggregate(sdata, "spots", genes=genes)
        found[section] = rows(sdata, ["spots"], genes, None)["spots"]
    return found


def show(found: dict, path: Path | None) -> None:
    """Print what was measured, and write it to a file if there is one."""
    text = json.dumps(found, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["kidney", "her2st", "synthetic"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--model", default="her2st", help="of her2st: a shipped model or a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.task == "synthetic":
        found = synthetic(args.seed)
    else:
        found = kidney(args.data, args.seed) if args.task == "kidney" else her2st(args.data, args.model)
    show(found, args.json)


if __name__ == "__main__":
    main()
