"""Which choices of the default recipe matter, on the kidney: a reduced protocol, several seeds.

    python benchmarks/ablation.py DATA/visium_hd_kidney                       # all rows, three seeds
    python benchmarks/ablation.py DATA/visium_hd_kidney --rows "loss: MSE only" --seeds 1

The split is the reverse of `quality.py kidney`'s: trained below the middle of the section, tested above it. Features of a
frozen encoder are computed once and shared by all rows; 8 passes (the default makes up to 30) with a dropout of 0.1, so that all
rows fit two hours on two cores; the best on a held-out block of the training part is tested, nothing is trained again on everything.
Rows differ from the base in what they name. The base leaves the encoder's batch norms as they came from ImageNet; the default
gives them the statistics of the training tissue (``adapted:``). Results go to docs/_generated/ablation.json, after each row.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import kidney
import numpy as np
import torch
from pixnet._core.train.loop import _optimise, _set_baseline, evaluate_material
from quality import BINS, kidney_split

import pixnet as px
from pixnet._core.train.crops import crop_size
from pixnet._core.train.dataset import CropDataset
from pixnet._core.train.features import adapt_norms, cache_features, set_feature_statistics
from pixnet._core.train.options import TrainingOptions
from pixnet._sdata.pixel_size import get_mpp
from pixnet._sdata.sections import open_section, resolve_sources, split_block
from pixnet.models import PixNet

REDUCED = {"max_epochs": 8, "dropout": 0.1}
ROWS: dict[str, dict] = {
    "base: no U-Net, exp, density, MSE + PCC, spots, frozen, enlarged to 1 um/px, batch norms of ImageNet": {},
    "decoder: U-Net with separable attention (SAFB)": {"model": {"decoder": "safb"}},
    "decoder: U-Net with concatenation": {"model": {"decoder": "plain"}},
    "link: softplus": {"model": {"link": "softplus"}},
    "space: sum of logs (published)": {"model": {"quantity": "log_sum"}},
    "space: mean of logs": {"model": {"quantity": "log_mean"}},
    "loss: MSE only": {"recipe": {"loss": "mse"}},
    "loss: PCC only": {"recipe": {"loss": "pcc"}},
    "loss: Poisson + PCC": {"recipe": {"loss": "poisson+pcc"}},
    "loss: negative binomial + PCC": {"recipe": {"loss": "nb+pcc"}},
    "trained on 16 um bins": {"shapes": ["bins_016um"]},
    "trained on spots and 32 um bins": {"shapes": ["spots", "bins_032um"]},
    "trained on spots, 16 and 32 um bins": {"shapes": ["spots", "bins_016um", "bins_032um"]},
    "stain: not varied": {"recipe": {"variants": 1}},
    "um/px: 2, not enlarged": {"model": {"zoom": 1}},
    "adapted: batch norms of the training tissue": {"adapt": True},
    "adapted; decoder: U-Net with separable attention (SAFB)": {"adapt": True, "model": {"decoder": "safb"}},
    "adapted; epochs: 30, dropout: 0.4 (the default)": {"adapt": True, "recipe": {"max_epochs": 30, "dropout": 0.4}},
    "adapted; um/px: 2, not enlarged": {"adapt": True, "model": {"zoom": 1}},
    "adapted; um/px: 2, not enlarged, encoder tuned": {
        "adapt": True,
        "model": {"zoom": 1},
        "recipe": {"tune_encoder": True, "lr": 5e-4},
    },
}


def sections(train, test, genes: list[str], mpp: float, stride: int):
    """Return the training part but for a block, the block, and the test part, with all their shapes."""

    def opened(sdata, shapes: list[str]):
        tables = [f"{s}_counts" for s in shapes]
        source = resolve_sources({"kidney": sdata}, None, shapes, tables, kidney.TOTAL_KEY)[0]
        return open_section(source, genes, mpp, stride, layer=None, total_key=kidney.TOTAL_KEY)

    near, far = split_block(opened(train, ["spots", "bins_016um", "bins_032um"]))
    return near, far, opened(test, [*BINS, "spots"])


def only(material: CropDataset, names: list[str]) -> CropDataset:
    """Return the material with the shapes of some elements; features are shared."""
    out = copy.copy(material)
    kept = [i for i, crop in enumerate(material.crops) if any(n in crop.rows for n in names)]
    out.crops = [
        replace(
            material.crops[i],
            rows={n: r for n, r in material.crops[i].rows.items() if n in names},
            weights={n: w for n, w in material.crops[i].weights.items() if n in names},
        )
        for i in kept
    ]
    out.features = [[level[kept] for level in variant] for variant in material.features]
    return out


def run(row: dict, seed: int, net: PixNet, materials: list[CropDataset]) -> dict:
    """Train one row with one seed, on the features of a network's encoder, and test it."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    settings = REDUCED | row.get("recipe", {})
    recipe = TrainingOptions(patience=settings["max_epochs"], **settings)  # every row makes all its passes
    model = PixNet(net.genes, mpp=net.mpp, **row.get("model", {}))
    model.encoder.load_state_dict(net.encoder.state_dict())
    model.encoder.requires_grad_(recipe.tune_encoder)
    shapes = row.get("shapes", ["spots"])
    train, valid = only(materials[0], shapes), only(materials[1], shapes)
    train.features = train.features[: recipe.variants]
    set_feature_statistics(model, train)
    _set_baseline(model, train)
    start = time.perf_counter()
    state, _ = _optimise(model, train, valid, recipe, rng, "cpu")
    found = {"seconds": round(time.perf_counter() - start)}
    model.load_state_dict(state)
    for name in [*BINS, "spots"]:
        scores = evaluate_material(model, only(materials[2], [name]), recipe, "cpu")
        found[name] = round(scores["pcc"], 4)
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
    mpp = get_mpp(train, "he")
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    ready: tuple = ()
    for name in args.rows:
        how = ROWS[name].get("model", {}).get("zoom", 2), ROWS[name].get("adapt", False)
        if how != ready:
            ready = how
            net = PixNet(genes, mpp=mpp, zoom=how[0])
            parts = sections(train, test, genes, mpp, net.stride)
            materials = [CropDataset([part], crop_size(list(parts))) for part in parts]
            rng = torch.Generator().manual_seed(0)
            if how[1]:
                adapt_norms(net, materials[0], rng, "cpu")
            for material, variants in zip(materials, (TrainingOptions().variants, 1, 1)):
                cache_features(net, material, variants, TrainingOptions().stain, rng, "cpu", "features")
        results[name] = [run(ROWS[name], seed, net, materials) for seed in range(args.seeds)]
        mean = {k: round(float(np.mean([r[k] for r in results[name]])), 4) for k in results[name][0]}
        print(name, json.dumps(mean), flush=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
