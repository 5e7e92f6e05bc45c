"""Leave one patient out, on the sections of her2st that are there: `python benchmarks/quality.py her2st DATA --protocol patient`.

Each patient is held out once. Models train on the sections of all others; one of these (or the last section, where there is one other
patient) chooses the number of passes and the penalty of ridge. All methods see the same encoder. They learn the union of two
choices of 250 genes, both made on the training sections: the highest mean, and the most variable (scanpy, by section). A figure depends as
much on the choice as on the method, so each is given for both, for raw and for 3 x 3-smoothed targets.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import anndata as ad
import numpy as np
import references as ref
import scanpy as sc
import spatialdata

import pixnet as px
from pixnet._sdata.slide import Slide
from pixnet.datasets import _her2st
from pixnet.models import PixNet

METHODS = ("dense", "ridge", "paper")
NAMES = {"dense": "PixNet", "ridge": "ridge on spots", "paper": "PixNet as published"}
CHOICES = {"mean": "highest mean", "variable": "most variable"}
N_GENES = 250
PITCH_UM = 200.0


def sections_at(data: Path) -> list[str]:
    """Return the sections whose files are all there."""
    files = {name: _her2st._section_files(name).values() for name in _her2st.sections()}
    return [name for name, parts in files.items() if all((data / part).is_file() for part in parts)]


def stored(names: list[str], data: Path, folder: Path) -> dict[str, Path]:
    """Write the sections as stores, so that 36 of them need no more memory than one."""
    stores = {name: folder / f"{name}.zarr" for name in names}
    for name, store in stores.items():
        if not store.exists():
            px.datasets.her2st(name, path=data).write(store)
    return stores


def chosen_genes(stores: dict[str, Path], n: int, measured: set[str]) -> dict[str, list[str]]:
    """Return the genes of highest mean and the most variable ones of the training sections, among those that all sections name."""
    by_mean = [gene for gene in px.pp.select_genes(stores, n_top=None, min_fraction=0.01) if gene in measured]
    tables = {name: spatialdata.read_zarr(store)["spots_counts"][:, by_mean].copy() for name, store in stores.items()}
    joined = ad.concat(tables, label="section", index_unique="-")
    joined = joined[np.asarray(joined.X.sum(axis=1)).ravel() > 0].copy()
    sc.pp.normalize_total(joined, target_sum=1e4)
    sc.pp.log1p(joined)
    sc.pp.highly_variable_genes(joined, n_top_genes=min(n, len(by_mean)), batch_key="section")
    return {"mean": by_mean[:n], "variable": list(joined.var_names[joined.var["highly_variable"]])}


def held_out(patients: dict[str, list[str]], patient: str) -> tuple[list[str], list[str]]:
    """Return the sections to train on, and those of them that choose the number of passes."""
    others = {other: names for other, names in patients.items() if other != patient}
    training = [name for names in others.values() for name in names]
    return training, (others[max(others)] if len(others) > 1 else training[-1:] if len(training) > 1 else [])


def ridge(pooled: dict[str, ref.Pooled], validation: list[str]):
    """Fit ridge regression on pooled features; without a section to choose the penalty, the last fifth of the spots does."""
    if validation:
        return ref.ridge(
            [p for name, p in pooled.items() if name not in validation], [pooled[name] for name in validation]
        )
    (one,) = pooled.values()
    far = one.centres[:, 0] > np.quantile(one.centres[:, 0], 0.8)
    return ref.ridge([one.take(~far)], [one.take(far)])


def run(args) -> dict:
    """Hold out each patient in turn; return the correlation of each gene by patient and method."""
    data = Path(args.data)
    names = args.sections or sections_at(data)
    patients: dict[str, list[str]] = defaultdict(list)
    for name in names:
        patients[name[0]].append(name)
    if len(patients) < 2:
        raise SystemExit(f"sections of two patients are needed; {data} has {', '.join(names) or 'none'}")
    methods = args.methods or METHODS
    quick = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=args.keep) as folder:
        stores = stored(names, data, Path(folder))
        measured = set.intersection(*(set(spatialdata.read_zarr(s)["spots_counts"].var_names) for s in stores.values()))
        for patient in patients:
            training, validation = held_out(patients, patient)
            train = {name: stores[name] for name in training}
            choices = chosen_genes(train, args.genes, measured)
            genes = sorted({gene for found in choices.values() for gene in found})
            mpp = Slide.open(spatialdata.read_zarr(train[training[0]])).mpp
            net = PixNet(genes, mpp=mpp, encoder=args.encoder)
            fits, seconds = {}, {}
            for method in methods:
                start = time.perf_counter()
                if method == "ridge":
                    pooled = {n: _pooled(net, store, genes) for n, store in train.items()}
                    fits[method] = ridge(pooled, validation)
                else:
                    common = {"validation": validation or None, "seed": args.seed, **quick}
                    if method == "dense":
                        fits[method] = px.tl.train(train, mpp=mpp, encoder=args.encoder, **common)  # all genes
                    else:
                        start_from = PixNet.paper(genes, mpp=mpp, encoder=args.encoder, stride=4)
                        fits[method] = px.tl.train(train, model=start_from, **common)
                seconds[method] = round(time.perf_counter() - start)
            found = {"trained on": training, "validation": validation, "train_s": seconds, "genes": choices, "r": {}}
            for name in patients[patient]:
                _score(found["r"], name, stores[name], net, genes, fits)
            results[patient] = found
            print(patient, json.dumps(table({patient: found}), ensure_ascii=False), flush=True)
    return {
        "protocol": "her2st, leave one patient out", "encoder": args.encoder, "seed": args.seed,
        "max_epochs": args.max_epochs, "patients": results,
    }  # fmt: skip


def _pooled(net: PixNet, store: Path, genes: list[str]) -> ref.Pooled:
    return ref.pool(net, spatialdata.read_zarr(store), ["spots"], genes, None)["spots"]


def _score(scores: dict, name: str, store: Path, net: PixNet, genes: list[str], fits: dict) -> None:
    """Add the correlations of a section: ``scores[method][target][gene]`` is a list, one for each section."""
    pooled = _pooled(net, store, genes)
    targets = {"raw": pooled.target, "smoothed": np.log1p(ref.smoothed(pooled, PITCH_UM))}
    sdata = spatialdata.read_zarr(store)
    for method, fit in fits.items():
        known = (
            genes if method == "ridge" else [gene for gene in genes if gene in set(fit.genes)]
        )  # not those never seen
        predicted = fit(pooled) if method == "ridge" else ref.predicted_rows(sdata, fit, "he", pooled, known)
        for target, measured in targets.items():
            columns = [genes.index(gene) for gene in known]
            r = ref.pearson(predicted, measured[:, columns])
            into = scores.setdefault(method, {}).setdefault(target, {})
            for gene, value in zip(known, r):
                into.setdefault(gene, []).append(None if np.isnan(value) else round(float(value), 4))
    counts = pooled.cp10k * pooled.total[:, None] / 1e4
    into = scores.setdefault("ceiling", {}).setdefault("raw", {})
    for gene, value in zip(genes, ref.ceiling(counts, pooled.total)):
        into.setdefault(gene, []).append(None if np.isnan(value) else round(float(value), 4))


def per_gene(found: dict, method: str, target: str, choice: str) -> dict[str, float]:
    """Return the mean correlation of each gene of a choice over the sections of a held-out patient."""
    r = found["r"].get(method, {}).get(target, {})
    known = {gene: [x for x in r.get(gene, []) if x is not None] for gene in found["genes"][choice]}
    return {gene: float(np.mean(values)) for gene, values in known.items() if values}


def table(patients: dict[str, dict]) -> list[dict]:
    """Return a row for each method and choice of genes: means over genes, then over patients."""
    rows = []
    for method in (*METHODS, "ceiling"):
        for choice in CHOICES:
            row = {"method": NAMES.get(method, method), "genes": CHOICES[choice]}
            for target in ("raw", "smoothed"):
                values = [list(per_gene(found, method, target, choice).values()) for found in patients.values()]
                values = [v for v in values if v]
                if values:
                    row |= {f"{target} mean": round(float(np.mean([np.mean(v) for v in values])), 4)}
                    row |= {f"{target} median": round(float(np.mean([np.median(v) for v in values])), 4)}
                    row |= {
                        f"{target} genes above .3": round(float(np.mean([np.sum(np.array(v) > 0.3) for v in values])))
                    }
            if len(row) > 2:
                rows.append(row)
    return rows


def draw(patients: dict[str, dict], path: Path) -> None:
    """Draw the correlations of genes in order, one curve for each method, one panel for each choice and target."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True, layout="constrained")
    for ax, (choice, target) in zip(axes, [(c, t) for c in CHOICES for t in ("raw", "smoothed")]):
        for method in METHODS:
            curves = [
                sorted(per_gene(found, method, target, choice).values(), reverse=True) for found in patients.values()
            ]
            curves = [np.interp(np.linspace(0, 1, 251), np.linspace(0, 1, len(c)), c) for c in curves if c]
            if curves:
                ax.plot(np.linspace(0, 100, 251), np.mean(curves, axis=0), label=NAMES[method])
        ax.axhline(0, color="0.7", lw=0.8)
        ax.set(title=f"{CHOICES[choice]}, {target}", xlabel="genes, best first (%)")
    axes[0].set_ylabel("Pearson's r, mean over held-out patients")
    axes[0].legend(frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
