"""The claim of the paper where the truth is exact: trained on 100 µm spots, asked at 2 to 55 µm and cell by cell.

    python benchmarks/scales.py OUT                              # everything: slides, models and scores in the folder OUT
    python benchmarks/scales.py OUT --seeds 0 --only dense       # a part of it, for long runs in turns

Trained on legacy spots (100 µm across, 200 µm apart) of synthetic tissues, tested on another tissue in another stain, against the
noise-free map that the counts of a synthetic tissue are drawn from. Two networks have the same features of the same frozen
encoder, the same spots and the same loss:

- ``dense``: `pixnet.tl.train` as it is: a perceptron on each pixel's features, a map, its sum over the spot;
- ``slid``: the perceptron on the mean of the features inside the spot (`spot_to_vector.py`), which is what spot-to-vector
  methods do. It answers finer by moving over the slide, 2 µm a step, with the 100 µm window it was trained with
  (``slid, 100 um``) or with a window of the area of what is asked for (``slid, shrunk``).

Parts that OUT already holds are not done again. The table goes to docs/_generated/scales.md, the figure to docs/_static/scales.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pandas as pd
import shapely
import spatialdata as sd
from PIL import Image
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Scale, get_transformation

import pixnet as px
from pixnet._correlation import pearson

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

DOCS = Path(__file__).parents[1] / "docs"
SIZE_UM, N_GENES, MPP, MAP_UM = 2000, 50, 0.5, 2.0
TRAINING, VALIDATION, TEST = (1, 2, 3), (4,), 11  # seeds of tissue and stain
GENES = px.datasets.synthetic_tissue(150, n_genes=N_GENES, shapes=())["truth"].coords["c"].values[:-1].tolist()
# What is asked for: the shapes element, and the diameter in um of a disc of its area (of cells, the median's).
SCALES = {
    "2 um": ("squares_2um", 2.26),
    "8 um": ("bins", 9.03),
    "cell": ("cells", 10.0),
    "16 um": ("squares_16um", 18.05),
    "55 um": ("spots", 55.0),
    "100 um": ("spots_legacy", 100.0),
}
EPOCHS, BATCH, SLID_EPOCHS = 40, 32, 100
PARTS = ("slides", "dense", "score-dense", "score-slid", "show")
SHOWN, CORNER, EDGE_UM = "EPI1", (700, 700), 500  # of the figure: gene, upper left corner in um, edge


# slides ------------------------------------------------------------------------------------------------------------


def legacy_slide(seed: int) -> SpatialData:
    """Return a slide with 100 µm spots, its tissue marked."""
    sdata = px.datasets.synthetic_tissue(
        SIZE_UM, mpp=MPP, n_genes=N_GENES, seed=seed, stain_seed=seed, shapes="spots_legacy"
    )
    del sdata["truth"]
    px.pp.tissue_mask(sdata)
    return sdata


def unseen_slide(seed: int) -> SpatialData:
    """Return a slide that nothing was trained on, with the truth and a shapes element for each scale."""
    shapes = ("spots", "cells", "bins", "spots_legacy")
    sdata = px.datasets.synthetic_tissue(SIZE_UM, mpp=MPP, n_genes=N_GENES, seed=seed, stain_seed=seed, shapes=shapes)
    px.pp.tissue_mask(sdata)
    px.pp.make_grid(sdata, 16, key_added="squares_16um")
    # 40,000 of the squares of 2 µm that are tissue, since a million take long to score.
    tissue = np.argwhere(np.isfinite(sdata["truth"].data[-1].compute()))
    row, col = np.random.default_rng(0).permutation(tissue)[:40_000].T
    edge = MAP_UM / MPP
    frame = geopandas.GeoDataFrame(geometry=shapely.box(col * edge, row * edge, (col + 1) * edge, (row + 1) * edge))
    sdata["squares_2um"] = ShapesModel.parse(frame, transformations=get_transformation(sdata["spots"], get_all=True))
    return sdata


def slides(out: Path, seeds: tuple[int, ...], make=legacy_slide) -> dict[str, SpatialData]:
    """Return slides, made once and then read from the folder."""
    found = {}
    for seed in seeds:
        path = out / f"tissue-{seed}.zarr"
        if not path.exists():
            make(seed).write(path)
        found[f"tissue {seed}"] = sd.read_zarr(path)
    return found


def add_map(sdata: SpatialData, key: str, densities: np.ndarray) -> None:
    """Add a map that pixnet did not make to the object, as predict would."""
    to_pixels = Scale([MAP_UM / MPP] * 2, axes=("x", "y"))
    sdata[key] = Image2DModel.parse(
        densities, dims=("c", "y", "x"), c_coords=[*GENES, "__total__"], transformations={"global": to_pixels}
    )
    px.pp.set_mpp(sdata, key, MAP_UM)


# parts -------------------------------------------------------------------------------------------------------------


def fit(seed: int, path: Path) -> None:
    """Train the network that predicts a map."""
    tissues = slides(path.parent, TRAINING + VALIDATION)
    options = {"genes": GENES, "shapes": "spots_legacy", "max_epochs": EPOCHS, "batch_shapes": BATCH, "refit": False}
    start = time.perf_counter()
    model = px.tl.train(tissues, seed=seed, **options)
    print(f"dense, seed {seed}: trained in {time.perf_counter() - start:.0f} s; {_best(model.history)}", flush=True)
    model.save(path, overwrite=True)


def _best(history: list[dict]) -> dict:
    return {k: round(v, 3) for k, v in min(history, key=lambda row: row["val_expression"]).items()}


class Scorer:
    """Sums maps of the unseen slide over the shapes of each scale and compares them with the truth."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        (stored,) = slides(out, (TEST,), unseen_slide).values()
        # In memory, so that maps do not go to the stored slide.
        elements = {kind: dict(getattr(stored, kind)) for kind in ("images", "labels", "shapes")}
        self.sdata = sd.SpatialData(**elements, attrs=stored.attrs)
        shapes = [element for element, _ in SCALES.values()]
        self.true = px.tl.aggregate(self.sdata, shapes, image_key="truth", inplace=False)
        self.rows: list[dict] = []
        self.keep("truth", self.sdata["truth"].data, self.true)

    def ask(self, network: str, key: str, scales: list[str]) -> dict[str, AnnData]:
        """Score a map at some scales and return its tables."""
        found = px.tl.aggregate(self.sdata, [SCALES[scale][0] for scale in scales], image_key=key, inplace=False)
        for scale in scales:
            element = SCALES[scale][0]
            same = {"network": network, "scale": scale, "seed": self.seed}
            self.rows.append(same | agreement(found[element], self.true[element]))
        return found

    def keep(self, network: str, densities, tables: dict[str, AnnData]) -> None:
        """Keep what the figure shows of a map, and of its tables."""
        y, x = (slice(int(c / MAP_UM), int((c + EDGE_UM) / MAP_UM)) for c in CORNER)
        values = {"map": np.asarray(densities[GENES.index(SHOWN), y, x])}
        values |= {key: np.asarray(table[:, SHOWN].layers["density"]).ravel() for key, table in tables.items()}
        np.savez(self.out / f"shown-{network.replace(', ', '-').replace(' ', '')}-{self.seed}.npz", **values)

    def write(self, name: str) -> None:
        """Write the scores of a network."""
        pd.DataFrame(self.rows).to_csv(self.out / f"scores-{name}-{self.seed}.csv", index=False)


def score_dense(seed: int, out: Path) -> None:
    """Ask the network that predicts a map."""
    scorer = Scorer(out, seed)
    start = time.perf_counter()
    px.tl.predict(scorer.sdata, px.models.load(out / f"dense-{seed}.safetensors"), key_added="dense")
    print(f"dense, seed {seed}: predicted in {time.perf_counter() - start:.0f} s", flush=True)
    scorer.keep("dense", scorer.sdata["dense"]["scale0"]["image"].data, scorer.ask("dense", "dense", list(SCALES)))
    scorer.write("dense")


def score_slid(seed: int, out: Path) -> None:
    """Train the network that is slid, on features of the other's encoder, and ask it with both kinds of window."""
    from spot_to_vector import encode_slide, first_layer, slide, spot_features, train

    scorer = Scorer(out, seed)
    source = px.models.load(out / f"dense-{seed}.safetensors")
    spots, held_out = (
        spot_features(source, slides(out, seeds), "spots_legacy", variants, 0.15)
        for seeds, variants in ((TRAINING, 2), (VALIDATION, 1))
    )
    net, history = train(source, spots, held_out, seed, max_epochs=SLID_EPOCHS, batch=BATCH)
    best = min(history, key=lambda row: row["objective"])
    print(f"slid, seed {seed}: { ({k: round(v, 3) for k, v in best.items()}) }", flush=True)
    maps, mask = encode_slide(source, scorer.sdata)
    hidden = first_layer(source, net, maps, mask.shape)
    wide = slide(net, hidden, mask, 100 / MAP_UM)
    add_map(scorer.sdata, "slid", wide)
    scorer.keep("slid, 100 um", wide, scorer.ask("slid, 100 um", "slid", list(SCALES)))
    tables = {}
    for scale, (element, diameter) in SCALES.items():
        if scale == "100 um":
            continue
        densities = slide(net, hidden, mask, diameter / MAP_UM)
        add_map(scorer.sdata, "slid", densities)
        tables[element] = scorer.ask("slid, shrunk", "slid", [scale])[element]
        if scale == "2 um":
            fine = densities
    scorer.keep("slid, shrunk", fine, tables)
    scorer.write("slid")


def agreement(predicted: AnnData, true: AnnData) -> dict[str, float]:
    """Mean over genes of Pearson's r over the shapes, of log1p CP10k and of log1p density; and r of the log total."""
    known = np.isfinite(predicted.X).all(axis=1) & np.isfinite(true.X).all(axis=1)

    def r(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return pearson(*(np.log1p(x[known].astype(np.float64)) for x in (a, b)))

    hidden = np.array([name.startswith("GRA") for name in predicted.var_names])  # no trace in the picture
    share, density = r(predicted.X, true.X), r(predicted.layers["density"], true.layers["density"])
    total = r(*(1e4 * table.obs[["total"]].to_numpy() for table in (predicted, true)))
    found = {"cp10k": share.mean(), "cp10k_seen": share[~hidden].mean(), "cp10k_hidden": share[hidden].mean()}
    return found | {"density": density.mean(), "total": total[0], "shapes": int(known.sum())}


# what is shown -----------------------------------------------------------------------------------------------------


def draw(out: Path, seed: int) -> None:
    """Draw one gene in a corner of the slide: truth and networks in rows, scales in columns; each panel to its own 99th percentile."""
    import matplotlib.pyplot as plt

    (sdata,) = slides(out, (TEST,), unseen_slide).values()
    (top, left), edge = (c / MPP for c in CORNER), EDGE_UM / MPP
    he = np.asarray(sdata["he"]["scale0"]["image"].data[:, int(top) : int(top + edge), int(left) : int(left + edge)])
    columns = {"map": "2 µm", "bins": "8 µm", "cells": "cells", "spots": "55 µm spots"}
    rows = {"truth": "truth", "dense": "dense", "slid-100um": "slid,\n100 µm", "slid-shrunk": "slid,\nshrunk"}
    shown = {name: np.load(out / f"shown-{name}-{seed}.npz") for name in rows}
    fig, axes = plt.subplots(len(rows), len(columns) + 1, figsize=(11, 9), layout="constrained")
    extent = (left, left + edge, top + edge, top)
    for ax in axes[:, 0]:
        ax.axis("off")
    axes[0, 0].imshow(he.transpose(1, 2, 0), extent=extent)
    axes[0, 0].set_title("H&E")
    for r, (name, label) in enumerate(rows.items()):
        for c, (element, title) in enumerate(columns.items(), start=1):
            ax, values = axes[r, c], shown[name][element]
            look = {"cmap": "magma", "vmin": 0, "vmax": float(np.nanquantile(values, 0.99))}
            if element == "map":
                ax.imshow(values, extent=extent, interpolation="nearest", **look)
            else:
                frame = sdata[element].assign(value=values)
                if "radius" in frame:
                    frame["geometry"] = shapely.buffer(frame.geometry.to_numpy(), frame["radius"].to_numpy())
                frame.cx[left : left + edge, top : top + edge].dropna(subset="value").plot("value", ax=ax, **look)
            ax.set(xlim=(left, left + edge), ylim=(top + edge, top), facecolor="0.9", xticks=[], yticks=[], xlabel="")
            ax.set_ylabel(label if element == "map" else "", fontsize=12)
            if r == 0:
                ax.set_title(title)
    path = DOCS / "_static" / "scales.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def table(out: Path) -> str:
    """Return the scores as a table in Markdown: mean over the seeds, and their range."""
    scores = pd.concat([pd.read_csv(path) for path in sorted(out.glob("scores-*.csv"))])
    lines = []
    for what, title in (
        ("cp10k", "composition (log1p CP10k)"),
        ("density", "density (log1p)"),
        ("total", "total (log1p)"),
    ):
        lines += ["", f"| {title} | {' | '.join(SCALES)} |", "|---" * (len(SCALES) + 1) + "|"]
        for network in scores["network"].unique():
            cells = []
            for scale in SCALES:
                found = scores.loc[(scores["network"] == network) & (scores["scale"] == scale), what]
                spread = f" ({found.min():.2f} to {found.max():.2f})" if len(found) > 1 else ""
                cells.append(f"{found.mean():.3f}{spread}" if len(found) else "")
            lines.append(f"| {network} | {' | '.join(cells)} |")
    return "\n".join(lines).replace(" um", " µm").strip() + "\n"


def main() -> None:
    """Run the parts that are asked for and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only in {None, "slides"}:
        slides(args.out, TRAINING + VALIDATION)
        slides(args.out, (TEST,), unseen_slide)
    for seed in args.seeds:
        model = args.out / f"dense-{seed}.safetensors"
        if args.only in {None, "dense"} and not model.exists():
            fit(seed, model)
        if args.only in {None, "score-dense"} and not (args.out / f"scores-dense-{seed}.csv").exists():
            score_dense(seed, args.out)
        if args.only in {None, "score-slid"} and not (args.out / f"scores-slid-{seed}.csv").exists():
            score_slid(seed, args.out)
    if args.only in {None, "show"}:
        draw(args.out, args.seeds[0])
        (DOCS / "_generated" / "scales.md").write_text(table(args.out))
        print(table(args.out))


if __name__ == "__main__":
    main()
