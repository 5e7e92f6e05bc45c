"""Train the model that ships with the package, and measure what is held out.

    python benchmarks/her2st.py DATA train --out src/pixnet/models/weights/her2st.safetensors
    python benchmarks/her2st.py DATA test --model src/pixnet/models/weights/her2st.safetensors --json docs/_generated/her2st.json
    python benchmarks/her2st.py DATA train --dropout 0.4 --out other.safetensors       # with another dropout, and what
    python benchmarks/her2st.py DATA test --model other.safetensors --section B4       # another patient makes of it
    python benchmarks/her2st.py DATA train --programs 0 --out genes.safetensors        # a channel for each of 250 genes

DATA is the folder that holds ST-cnts. The model is trained on three sections of patient C (C4 chooses the number of passes), on all
genes. Section C5 of that patient and B4 of another are in no training. Scores are of the 250 genes of highest mean in C2 and C3,
and of all. `benchmarks/quality.py her2st` leaves out each section in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

import pixnet as px
from pixnet._correlation import pearson
from pixnet.datasets import her2st

TRAINING = ("C2", "C3", "C4")
SHIPPED_DROPOUT = 0.6
"""More than the default, since this model meets other patients: it costs 0.01 on C4 and gives 0.03 on B4."""


def panel(data: str) -> list[str]:
    """Return the 250 genes that are scored: those of highest mean in the sections that training learns from."""
    return px.pp.select_genes([her2st(name, path=data) for name in TRAINING[:-1]])


def measure(model, section: str, data: str, normalised: bool, measured: dict) -> None:
    """Predict a section, sum it over its spots and a 50 µm grid, and score the spots."""
    sdata = her2st(section, path=data)
    if normalised:
        px.pp.normalize_stain(sdata, model)
    start = time.perf_counter()
    px.tl.predict(sdata, model, image_key="he_normalized" if normalised else None)
    measured["predict_s"] = round(time.perf_counter() - start, 1)
    measured["predict_peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    px.pp.make_grid(sdata, 50)
    px.tl.aggregate(sdata, ["spots", "grid"])
    tables = {"table_key": "spots_genes", "reference_key": "spots_counts"}
    scores = px.tl.evaluate(sdata, **tables, genes=panel(data))
    every = px.tl.evaluate(sdata, **tables)
    measured["threads"] = torch.get_num_threads()
    measured["section"], measured["spots"] = section, int(scores["n"].max())
    measured["grid_squares"] = int(sdata["grid_genes"].n_obs)
    measured["scores"] = {k: round(v, 4) for k, v in scores.attrs["summary"].items()}
    measured["all_genes"] = {k: round(v, 4) for k, v in every.attrs["summary"].items()}
    measured["model_genes"], measured["above_0.3"] = len(model.genes), int((every["pearson"] > 0.3).sum())
    best = every["pearson"].sort_values(ascending=False)
    measured["best_genes"] = {g: round(v, 3) for g, v in best.head(10).items()}
    measured["total_pcc"] = round(_total_pcc(sdata), 3)


def _total_pcc(sdata) -> float:
    predicted = sdata["spots_genes"].obs.set_index("instance_id")["total"]
    counts = sdata["spots_counts"]
    measured = np.asarray(counts.X.sum(axis=1)).ravel()
    found = predicted.reindex(counts.obs["instance_id"]).to_numpy()
    known = np.isfinite(found)
    return float(pearson(found[known], measured[known]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("task", choices=["train", "test"])
    parser.add_argument("--out", default="her2st.safetensors")
    parser.add_argument("--model", default="her2st")
    parser.add_argument("--dropout", type=float, default=SHIPPED_DROPOUT, help="of training")
    parser.add_argument("--programs", type=int, help="of training; 0: a channel for each of 250 genes")
    parser.add_argument("--section", default="C5", choices=["C5", "B4"], help="to test on")
    parser.add_argument("--normalize-stain", action="store_true", help="before the test")
    parser.add_argument("--json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    measured: dict = {"task": args.task}
    if args.task == "test":
        measure(px.models.load(args.model), args.section, args.data, args.normalize_stain, measured)
    else:
        sections = {n: her2st(n, path=args.data) for n in TRAINING}
        start = time.perf_counter()
        model = px.tl.train(sections, seed=args.seed, dropout=args.dropout, n_programs=args.programs)
        model.provenance["tissue"] = "HER2-positive breast tumour"
        measured["train_s"] = round(time.perf_counter() - start)
        measured["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        measured["validation"] = model.history[-1]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        model.save(args.out, dtype="float16", overwrite=True)
        measured["file_mb"] = round(Path(args.out).stat().st_size / 1e6, 2)
    print(json.dumps(measured, indent=1))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
