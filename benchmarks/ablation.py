"""Which choices of the default recipe matter, on the kidney: a reduced protocol, several seeds.

    python benchmarks/ablation.py DATA/visium_hd_kidney                       # all rows, three seeds
    python benchmarks/ablation.py DATA/visium_hd_kidney --rows "loss: MSE only" --seeds 1

The split is the reverse of `quality.py kidney`'s: trained below the middle of the section, tested above it. Features of a
frozen encoder are computed once and shared by all rows; 8 passes (the default makes up to 30) with a dropout of 0.1, so that all
rows fit two hours on two cores; the best on a held-out block of the training part is tested, nothing is trained again on everything.
Rows differ from the base in what they name. The base leaves the encoder's batch norms as they came from ImageNet; the default
gives them the statistics of the training tissue (``adapted:``). Rows that begin with ``all genes`` learn every gene detected in
1 % of the spots, with adapted norms, and are scored on the same 250 genes as the others. Results go to
docs/_generated/ablation.json, after each row.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import kidney
import numpy as np
import torch
import variants
from quality import BINS, kidney_split

import pixnet as px
from pixnet._core.train import trainer
from pixnet._core.train.crops import Section, crop_size
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import adapt_norms, with_features
from pixnet._core.train.fit import initialise
from pixnet._core.train.objective import Objective
from pixnet._core.train.split import split_block
from pixnet._sdata.sections import open_measured, open_section
from pixnet._sdata.slide import Slide
from pixnet.models import PixNet
from pixnet.tl import TrainingOptions

REDUCED = {"max_epochs": 8, "dropout": 0.1}
PROGRAMS: dict = {"adapt": True, "all_genes": True, "model": {"n_programs": 64}}
ROWS: dict[str, dict] = {
    "base: no U-Net, exp, density, MSE + PCC, spots, frozen, enlarged to 1 um/px, batch norms of ImageNet": {},
    "decoder: U-Net with separable attention (SAFB)": {"unet": "attention"},
    "decoder: U-Net with concatenation": {"unet": "concatenation"},
    "link: softplus": {"head": variants.SoftplusHead},
    "space: sum of logs (published)": {"model": {"quantity": "log_sum"}},
    "space: mean of logs": {"head": variants.LogMeanHead},
    "loss: MSE only": {"loss": variants.squared_error},
    "loss: PCC only": {"loss": variants.correlation},
    "loss: Poisson + PCC": {"loss": variants.poisson_and_pcc},
    "loss: negative binomial + PCC": {"options": {"loss": "nb+pcc"}},
    "trained on 16 um bins": {"shapes": ["bins_016um"]},
    "trained on spots and 32 um bins": {"shapes": ["spots", "bins_032um"]},
    "trained on spots, 16 and 32 um bins": {"shapes": ["spots", "bins_016um", "bins_032um"]},
    "stain: not varied": {"options": {"variants": 1}},
    "um/px: 2, not enlarged": {"model": {"zoom": 1}},
    "adapted: batch norms of the training tissue": {"adapt": True},
    "adapted; decoder: U-Net with separable attention (SAFB)": {"adapt": True, "unet": "attention"},
    "adapted; epochs: 30, dropout: 0.4 (the default)": {"adapt": True, "options": {"max_epochs": 30, "dropout": 0.4}},
    "adapted; um/px: 2, not enlarged": {"adapt": True, "model": {"zoom": 1}},
    "adapted; um/px: 2, not enlarged, encoder tuned": {
        "adapt": True,
        "model": {"zoom": 1},
        "options": {"tune_encoder": True, "lr": 5e-4},
    },
    "all genes; 64 programs, genes by their signal, loadings from NMF at 5 times the rate (the default)": PROGRAMS,
    "all genes; genes weigh alike": PROGRAMS | {"options": {"gene_weights": "equal"}},
    "all genes; loadings start at the mean, shaken": PROGRAMS | {"start": variants.start_at_the_mean},
    "all genes; loadings stay as NMF found them": PROGRAMS | {"loadings_rate": 0.0},
    "all genes; loadings at the decoder's rate": PROGRAMS | {"loadings_rate": 1.0},
    "all genes; loadings at 30 times the rate": PROGRAMS | {"loadings_rate": 30.0},
    "all genes; 16 programs": PROGRAMS | {"model": {"n_programs": 16}},
    "all genes; 32 programs": PROGRAMS | {"model": {"n_programs": 32}},
    "all genes; 128 programs": PROGRAMS | {"model": {"n_programs": 128}},
}


def sections(train, test, genes: list[str], mpp: float, stride: int) -> tuple[Section, Section, Section]:
    """Return the training part but for a block, the block, and the test part, with all their shapes."""

    def opened(sdata, shapes: list[str]) -> Section:
        tables = [f"{s}_counts" for s in shapes]
        (slide,) = open_measured({"kidney": sdata}, None, shapes, tables, kidney.TOTAL_KEY)
        measured = slide.tables(total_key=kidney.TOTAL_KEY)  # bins have some of the genes that spots have
        return open_section(slide, {key: t.select(genes, partial=True) for key, t in measured.items()}, mpp, stride)

    near, far = split_block(opened(train, ["spots", "bins_016um", "bins_032um"]))
    return near, far, opened(test, [*BINS, "spots"])


def build(row: dict, net: PixNet, tune_encoder: bool) -> PixNet:
    """Build the model of a row on a network's encoder."""
    model = PixNet(net.genes, mpp=net.mpp, **row.get("model", {}))
    if "head" in row:
        model = variants.with_head(model, row["head"])
    if "start" in row:
        model.head.start = partial(row["start"], model.head)
    if "unet" in row:
        model = variants.with_unet(model, row["unet"])
    model.encoder.load_state_dict(net.encoder.state_dict())
    model.encoder.requires_grad_(tune_encoder)
    return model


def run(row: dict, seed: int, net: PixNet, datasets: list[CropDataset], n_scored: int) -> dict:
    """Train one row with one seed, on the features of a network's encoder, and test its first genes."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    settings = REDUCED | row.get("options", {})
    options = TrainingOptions(patience=settings["max_epochs"], **settings)  # every row makes all its passes
    objective = Objective(options, row.get("loss"))
    model = build(row, net, options.tune_encoder)
    train, valid = (dataset.of_elements(row.get("shapes", ["spots"])) for dataset in datasets[:2])
    train = replace(train, versions=train.versions[: options.variants])
    initialise(model, train, seed)
    objective.prepare(train, model.head.gene_weights)
    start = time.perf_counter()
    with patch.object(trainer, "LOADINGS_RATE", row.get("loadings_rate", trainer.LOADINGS_RATE)):
        state, _ = trainer.Trainer(model, train, valid, objective, rng=rng, device="cpu").run()
    found = {"seconds": round(time.perf_counter() - start)}
    model.load_state_dict(state)
    scoring = Objective(options, partial(variants.correlation_of_first, n_scored))
    for name in [*BINS, "spots"]:
        scores = scoring.evaluate(model, datasets[2].of_elements([name]), "cpu")
        found[name] = round(scores["expression"], 4)
    if len(net.genes) > n_scored:
        found["spots, all genes"] = round(scores["pcc"], 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parents[1] / "docs" / "_generated" / "ablation.json"
    )
    args = parser.parse_args()
    px.settings.progress = False
    train, test, genes = kidney_split(args.data, reverse=True)
    mpp = Slide.open(train).mpp
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    ready: tuple = ()
    for name in args.rows:
        row = ROWS[name]
        zoom, adapt, all_genes = (
            row.get("model", {}).get("zoom", 2),
            row.get("adapt", False),
            row.get("all_genes", False),
        )
        if (zoom, adapt, all_genes) != ready:
            ready = (zoom, adapt, all_genes)
            others = sorted(set(kidney.every_gene(train)) - set(genes)) if all_genes else []
            learned = genes + others
            net = PixNet(learned, mpp=mpp, zoom=zoom)
            parts = sections(train, test, learned, mpp, net.stride)
            plain = [CropDataset.of([part], crop_size(list(parts))) for part in parts]
            rng = torch.Generator().manual_seed(0)
            if adapt:
                adapt_norms(net, plain[0], rng, "cpu")
            defaults = TrainingOptions()
            datasets = with_features(plain, net, (defaults.variants, 1, 1), defaults.stain, "cpu")
        results[name] = [run(row, seed, net, datasets, len(genes)) for seed in range(args.seeds)]
        mean = {k: round(float(np.mean([r[k] for r in results[name]])), 4) for k in results[name][0]}
        print(name, json.dumps(mean), flush=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
