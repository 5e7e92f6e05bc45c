"""How good the predictions are, on real tissue, beside reference methods on the same features and splits.

    python benchmarks/quality.py kidney DATA/visium_hd_kidney          # spots -> bins of 8 to 56 µm, another part of the section
    python benchmarks/quality.py kidney DATA/visium_hd_kidney --methods dense mixed --seeds 3
    python benchmarks/quality.py kidney DATA/visium_hd_kidney --methods "32 programs" "128 programs" --seeds 3
    python benchmarks/quality.py her2st DATA/her2st                    # leave one section out, and across patients
    python benchmarks/quality.py her2st DATA/her2st --panel            # the 250 genes alone, a channel for each
    python benchmarks/quality.py her2st DATA/her2st --protocol patient # leave one patient out, of all that are there

Results go to docs/_generated/quality_{protocol}.json and figures to docs/_static. Recipes were not chosen on the test parts:
for the kidney on the reverse split (trained below, tested above), for her2st on C2, C3, C4 and B4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import istar
import kidney
import numpy as np
import patients
import references as ref
from her2st import SHIPPED_DROPOUT
from spatialdata import SpatialData

import pixnet as px
from pixnet._sdata.slide import Slide
from pixnet.models import PixNet

ROOT = Path(__file__).parents[1] / "docs"
BINS = list(kidney.SCALES)
SPOT_UM = 55
UPPER, LOWER = (0.0, 0.5), (0.55, 1.0)
"""Parts of the kidney's height; a twentieth of it (about 330 µm) lies between them."""


# kidney ------------------------------------------------------------------------------------------------------------


def kidney_split(folder: Path, reverse: bool) -> tuple[SpatialData, SpatialData, list[str]]:
    """Return the training part, the test part and the 250 genes of highest mean in training that the bins have."""
    whole = kidney.load(folder)
    train, test = (LOWER, UPPER) if reverse else (UPPER, LOWER)
    train, test = kidney.part(whole, *train, least_umi=0), kidney.part(whole, *test, least_umi=20)
    ranked = px.pp.select_genes(
        train, table_key="spots_counts", total_key=kidney.TOTAL_KEY, n_top=None, exclude_prefixes=("MT-",)
    )
    known = set(whole.tables["bins_008um_counts"].var_names)
    genes = [g for g in ranked if g in known][:250]
    for key in [*BINS, "spots"]:  # only shapes that are scored are predicted
        test.shapes[key] = test.shapes[key].loc[test.tables[f"{key}_counts"].obs["instance_id"]]
    return train, test, genes


def kidney_dense(
    train: SpatialData,
    test: SpatialData,
    genes: list[str],
    shapes: list[str],
    seed: int,
    out: Path,
    n_programs: int | None = None,
) -> dict:
    """Train PixNet with its defaults, sum its map over every test shape and score ``genes``; programs hold all genes."""
    start = time.perf_counter()
    model = px.tl.train(
        train,
        shapes=shapes,
        table_key=[f"{s}_counts" for s in shapes],
        genes=None if n_programs else genes,
        n_programs=n_programs,
        total_key=kidney.TOTAL_KEY,
        seed=seed,
    )
    seconds = time.perf_counter() - start
    kind = f"{n_programs}_programs" if n_programs else len(shapes)
    model.save(out / f"kidney_{kind}_{seed}.safetensors", overwrite=True)
    found = {"train_s": round(seconds), "passes": len(model.history), "model_genes": len(model.genes)}
    return found | kidney_scores(test, model, genes)


def kidney_scores(test: SpatialData, model: PixNet, genes: list[str]) -> dict:
    """Predict the test part and score genes at every scale, and all genes of the model at the coarsest two."""
    px.tl.predict(test, model, store="programs" if len(model.genes) > len(genes) else "genes", overwrite=True)
    image = "he_programs" if len(model.genes) > len(genes) else "he_genes"
    px.tl.aggregate(test, [*BINS, "spots"], image_key=image, genes=genes, overwrite=True)

    def scores(key: str, genes: list[str]):
        tables = {"table_key": f"{key}_genes", "reference_key": f"{key}_counts"}
        return px.tl.evaluate(test, **tables, genes=genes, total_key=kidney.TOTAL_KEY)

    def summary(frame) -> dict:
        return {k: round(float(v), 4) for k, v in frame.attrs["summary"].items()}

    found = {key: summary(scores(key, genes)) for key in [*BINS, "spots"]}
    if image == "he_programs":
        for key in ("bins_056um", "spots"):
            reference = test.tables[f"{key}_counts"]
            both = [g for g in model.genes if g in set(reference.var_names)]
            px.tl.aggregate(test, key, image_key=image, genes=both, overwrite=True)
            every = scores(key, both)
            total = reference.obs[kidney.TOTAL_KEY].to_numpy(dtype=float)
            ceiling = ref.ceiling(reference[:, both].X.toarray().astype(float), total)
            clear = every["pearson"].to_numpy()[ceiling > 0.2]
            found[f"{key}, all genes"] = summary(every)
            found[f"{key}, ceiling above 0.2"] = {"pcc_mean": round(float(np.nanmean(clear)), 4), "n_genes": len(clear)}
    return found


def kidney_channels(train: SpatialData, test: SpatialData, genes: list[str], seed: int, at_once: int = 600) -> dict:
    """Train a channel for each of all genes; score ``genes`` at every scale, and all in spots. Maps hold some at a time."""
    start = time.perf_counter()
    spots = {"shapes": "spots", "table_key": "spots_counts", "total_key": kidney.TOTAL_KEY}
    model = px.tl.train(train, **spots, genes=kidney.every_gene(train), n_programs=0, seed=seed)
    found: dict = {"train_s": round(time.perf_counter() - start), "model_genes": len(model.genes)}

    def scores(key: str, genes: list[str]) -> np.ndarray:
        r = []
        for i in range(0, len(genes), at_once):
            part = genes[i : i + at_once]
            px.tl.predict(test, model, genes=part, overwrite=True, scale_factors=())
            px.tl.aggregate(test, key, genes=part, overwrite=True)
            tables = {"table_key": f"{key}_genes", "reference_key": f"{key}_counts"}
            r.append(px.tl.evaluate(test, **tables, genes=part, total_key=kidney.TOTAL_KEY)["pearson"].to_numpy())
        return np.concatenate(r)

    r, reference = scores("spots", model.genes), test.tables["spots_counts"]
    total = reference.obs[kidney.TOTAL_KEY].to_numpy(dtype=float)
    clear = r[ref.ceiling(reference[:, model.genes].X.toarray().astype(float), total) > 0.2]
    found["spots, all genes"] = {"pcc_mean": round(float(np.nanmean(r)), 4), "n_genes": len(r)}
    found["spots, ceiling above 0.2"] = {"pcc_mean": round(float(np.nanmean(clear)), 4), "n_genes": len(clear)}
    return found | {key: {"pcc_mean": round(float(np.nanmean(scores(key, genes))), 4)} for key in [*BINS, "spots"]}


def kidney_references(train: SpatialData, test: SpatialData, genes: list[str], seeds: int) -> dict[str, list[dict]]:
    """Score the reference methods on every scale."""
    mpp = Slide.open(train).mpp
    net = PixNet(genes, mpp=mpp)
    ref.adapt(net, train, "spots", genes, kidney.TOTAL_KEY)
    discs = [ref.add_discs(test, key, SPOT_UM, mpp) for key in BINS]
    inner = {key: _inner_split(net, train, key, genes) for key in ("spots", "bins_016um", "bins_032um")}
    fitted = {
        "ridge on spots": [ref.ridge(*inner["spots"])],
        "MLP on spots": [ref.mlp(*inner["spots"], seed=s) for s in range(seeds)],
        "MLP on 16 um bins": [ref.mlp(*inner["bins_016um"], seed=s) for s in range(seeds)],
        "MLP on 32 um bins": [ref.mlp(*inner["bins_032um"], seed=s) for s in range(seeds)],
    }
    results: dict[str, list[dict]] = {}

    def score(method: str, run: int, key: str, predicted: np.ndarray, pooled: ref.Pooled) -> None:
        runs = results.setdefault(method, [])
        while len(runs) <= run:
            runs.append({})
        runs[run][key] = _summary(predicted, pooled.target)

    for key in [*BINS, "spots"]:
        asked = [key] + ([f"{key}_disc"] if key in BINS else [])
        pooled = ref.pool(net, test, asked, genes, kidney.TOTAL_KEY)
        own = pooled[key]
        for method, fits in fitted.items():
            for run, fit in enumerate(fits):
                score(method, run, key, fit(own), own)
        if key in BINS:  # the same network sees a spot's disc around every bin
            disc = pooled[f"{key}_disc"]
            for run, fit in enumerate(fitted["MLP on spots"]):
                score("MLP on spots, slid", run, key, fit(disc), disc)
        pitch = 100.0 if key == "spots" else 8.0 * kidney.SCALES[key]
        score("mean of measured neighbours", 0, key, ref.neighbours(own, pitch, 6 if key == "spots" else 8), own)
        score("section mean", 0, key, np.tile(inner["spots"][0][0].target.mean(axis=0), (len(own.target), 1)), own)
        counts = own.cp10k * own.total[:, None] / 1e4
        runs = results.setdefault("ceiling (perfect prediction)", [{}])
        runs[0][key] = {"pcc_mean": round(float(np.nanmean(ref.ceiling(counts, own.total))), 4)}
    for key in discs:
        del test.shapes[key], test.tables[f"{key}_counts"]
    return results


def _inner_split(net: PixNet, train: SpatialData, key: str, genes: list[str]) -> tuple[list, list]:
    """Return the training part's shapes for fitting and a block at its end for validation, as `tl.train` cuts it."""
    pooled = ref.pool(net, train, [key], genes, kidney.TOTAL_KEY)[key]
    axis = int(np.argmax(np.ptp(pooled.centres, axis=0)))
    far = pooled.centres[:, axis] > np.quantile(pooled.centres[:, axis], 0.8)
    return [pooled.take(~far)], [pooled.take(far)]


def _summary(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    r = ref.pearson(predicted, measured)
    known = np.isfinite(predicted).all(axis=1)
    error = predicted[known] - measured[known]
    found = {"mse": (error**2).mean(), "mae": np.abs(error).mean()}
    if np.isfinite(r).any():
        found |= {"pcc_mean": np.nanmean(r), "pcc_median": np.nanmedian(r), "pcc_q1": np.nanquantile(r, 0.25)}
    return {k: round(float(v), 4) for k, v in found.items()}


def run_kidney(args) -> dict:
    train, test, genes = kidney_split(Path(args.data), args.reverse)
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(args.keep or scratch)
        out.mkdir(parents=True, exist_ok=True)
        for method, shapes in (("mixed", ["spots", "bins_016um", "bins_032um"]), ("dense", ["spots"])):
            if method in args.methods:
                name = {"dense": "PixNet on spots", "mixed": "PixNet on spots and bins"}[method]
                results[name] = [kidney_dense(train, test, genes, shapes, s, out) for s in range(args.seeds)]
                print(name, json.dumps(results[name]), flush=True)
                if method == "dense" and not args.reverse:
                    draw_kidney(test, ROOT / "_static" / "quality_kidney.png")
        for method in args.methods:  # "64 programs": all genes in as many programs, spots only
            if method.endswith(" programs"):
                k = int(method.removesuffix(" programs"))
                name = f"PixNet on spots, all genes in {k} programs"
                results[name] = [kidney_dense(train, test, genes, ["spots"], s, out, k) for s in range(args.seeds)]
                print(name, json.dumps(results[name]), flush=True)
        if "channels" in args.methods:
            name = "PixNet on spots, a channel for each of all genes"
            results[name] = [kidney_channels(train, test, genes, s) for s in range(args.seeds)]
        if "istar" in args.methods:
            below = kidney.part(kidney.load(Path(args.data)), *(UPPER if args.reverse else LOWER))
            runs = [istar.score(train, test, below, genes, [*BINS, "spots"], seed) for seed in range(args.seeds)]
            results["iStar's network on the same features"] = runs
        if "references" in args.methods:
            results |= kidney_references(train, test, genes, args.seeds)
    return {"protocol": "kidney", "reverse": args.reverse, "genes": len(genes), "methods": results}


def draw_kidney(test: SpatialData, path: Path, gene: str = "NPHS2") -> None:
    """Draw a gene measured in 32 µm bins beside its prediction."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    px.pl.compare(test, gene, table_key="bins_032um_genes", reference_key="bins_032um_counts", ax=axes)
    fig.savefig(path, dpi=85)
    plt.close(fig)


# her2st ------------------------------------------------------------------------------------------------------------


def run_her2st(args) -> dict:
    """Leave each section out in turn; the model of C2, C3 and C4 also predicts B4, of another patient."""
    results: dict[str, dict] = {}
    for held in args.sections:
        others = [n for n in ("C2", "C3", "C4") if n != held]  # C5 is in no training
        objects = {n: px.datasets.her2st(n, path=args.data) for n in others}
        start = time.perf_counter()
        if args.panel:
            dropout = SHIPPED_DROPOUT if held == "C5" else None
            model = px.tl.train(objects, seed=args.seed, n_programs=0, dropout=dropout)
        else:  # the model that ships was trained on the others by `benchmarks/her2st.py train`
            model = px.models.load("her2st") if held == "C5" else px.tl.train(objects, seed=args.seed)
        seconds = round(time.perf_counter() - start)
        genes = px.pp.select_genes(
            [objects[n] for n in others[:-1]]
        )  # the model has all; 250 of highest mean are scored
        fits = [ref.pool(model, o, ["spots"], genes, None)["spots"] for o in objects.values()]
        ridge, mlp = ref.ridge(fits[:-1], fits[-1:]), ref.mlp(fits[:-1], fits[-1:], seed=args.seed)
        for name in ["C5", "B4"] if held == "C5" else [held]:
            sdata = px.datasets.her2st(name, path=args.data)
            pooled = ref.pool(model, sdata, ["spots"], genes, None)["spots"]
            px.pp.normalize_stain(sdata, model)
            dense, normalised = (
                ref.predicted_rows(sdata, model, image, pooled, genes) for image in ("he", "he_normalized")
            )
            smooth = np.log1p(ref.smoothed(pooled, 200.0))
            found = {"trained on": others, "train_s": seconds, "spots": len(pooled.total)}
            for method, predicted in (
                ("PixNet", dense),
                ("PixNet, stain normalised", normalised),
                ("ridge on spots", ridge(pooled)),
                ("MLP on spots", mlp(pooled)),
                ("mean of measured neighbours", ref.neighbours(pooled, 200.0)),
            ):
                scores = _summary(predicted, pooled.target)
                if method != "mean of measured neighbours":  # which the smoothed targets are made of
                    scores["pcc_mean_smoothed"] = round(float(np.nanmean(ref.pearson(predicted, smooth))), 4)
                found[method] = scores
            counts = pooled.cp10k * pooled.total[:, None] / 1e4
            found["ceiling"] = round(float(np.nanmean(ref.ceiling(counts, pooled.total))), 4)
            results[name] = found
            print(name, json.dumps(found), flush=True)
    return {"protocol": "her2st", "seed": args.seed, "sections": results}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=["kidney", "her2st"])
    parser.add_argument("data")
    parser.add_argument(
        "--protocol", choices=["section", "patient"], default="section", help="her2st: what is held out"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        help='kidney: dense, mixed, references, "64 programs", channels, istar; patients: dense, ridge, paper',
    )
    parser.add_argument("--seeds", type=int, default=1, help="kidney: runs of each method")
    parser.add_argument("--seed", type=int, default=0, help="her2st")
    parser.add_argument("--reverse", action="store_true", help="kidney: the split on which recipes were chosen")
    parser.add_argument("--panel", action="store_true", help="her2st: a channel for each of the 250 genes, no programs")
    parser.add_argument("--sections", nargs="+", help="her2st: sections to hold out (C2 to C5), or to take (patients)")
    parser.add_argument("--genes", type=int, default=patients.N_GENES, help="patients: genes of each choice")
    parser.add_argument("--encoder", default="efficientnet_lite0", help="patients: of all methods")
    parser.add_argument("--max-epochs", type=int, help="patients: passes at most; each method has its own default")
    parser.add_argument("--keep", help="kidney: folder to keep the trained models in; patients: folder for stores")
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    name = args.data_set
    if args.protocol == "patient":
        if args.data_set != "her2st":
            parser.error("--protocol patient is for her2st")
        results = patients.run(args)
        name = "her2st_patients"
    elif args.data_set == "kidney":
        args.methods = args.methods or ["dense", "64 programs", "mixed", "references"]
        results = run_kidney(args)
    else:
        args.sections = args.sections or ["C2", "C3", "C4", "C5"]
        name = "her2st_genes" if args.panel else "her2st"
        results = run_her2st(args)
    path = Path(args.json) if args.json else ROOT / "_generated" / f"quality_{name}.json"
    if "methods" in results and path.exists():  # methods that did not run keep their figures
        known = json.loads(path.read_text())
        if known["reverse"] == results["reverse"]:
            results["methods"] = known["methods"] | results["methods"]
    # indented, the correlations of the patients would take a line each
    path.write_text(json.dumps(results, indent=None if args.protocol == "patient" else 1) + "\n")
    if args.protocol == "patient":
        patients.draw(
            results["patients"], path.with_suffix(".png") if args.json else ROOT / "_static" / f"quality_{name}.png"
        )
        for row in patients.table(results["patients"]):
            print(json.dumps(row))
        return
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
