"""Write the tables of the model card from measured results.

python benchmarks/her2st.py DATA test --json docs/_generated/her2st.json
python benchmarks/quality.py her2st DATA
python benchmarks/quality.py kidney DATA --methods "64 programs" --seeds 3
python docs/make_card.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pixnet as px

GENERATED = Path(__file__).parent / "_generated"


def kidney() -> None:
    """Write the card of the kidney model, as the model itself gives it, and what its recipe reached on hidden tissue."""
    card = px.models.load("kidney").card().split("\n", 2)[2].replace("\n## ", "\n### ")
    methods = json.loads((GENERATED / "quality_kidney.json").read_text())["methods"]
    runs = methods["PixNet on spots, all genes in 64 programs"]

    def mean(key: str, value: str = "pcc_mean") -> float:
        return sum(run[key][value] for run in runs) / len(runs)

    scales = {
        "bins_008um": "8 µm",
        "bins_016um": "16 µm",
        "bins_032um": "32 µm",
        "bins_056um": "56 µm",
        "spots": "55 µm spots",
    }
    ratios = [mean(key, "ratio") for key in scales]
    lines = [
        card.strip(),
        "",
        "### On hidden tissue",
        "",
        "The same recipe, trained on the upper part of the section and tested on the lower one: mean Pearson's r over the 250 genes of",
        f"highest mean, and measured over predicted amounts. Means of {len(runs)} seeds.",
        "",
        f"| | {' | '.join(scales.values())} |",
        "|---" * (len(scales) + 1) + "|",
        f"| mean r | {' | '.join(f'{mean(key):.3f}' for key in scales)} |",
        f"| ratio of amounts | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |",
        "",
        f"Over all {runs[0]['spots, all genes']['n_genes']:,.0f} genes, the mean r in spots is {mean('spots, all genes'):.3f}.",
    ]
    (GENERATED / "kidney_card.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    kidney()
    model = px.models.load("her2st")
    measured = json.loads((GENERATED / "her2st.json").read_text())
    provenance = model.provenance
    training = ", ".join(f"{name} ({sum(n.values())} spots)" for name, n in provenance["training"].items())
    validation = ", ".join(f"{name} ({sum(n.values())} spots)" for name, n in provenance["validation"].items())
    *first, last = sorted({**provenance["training"], **provenance["validation"]})
    everything = f"{', '.join(first)} and {last}"
    score, every = measured["scores"], measured["all_genes"]
    quality = json.loads((GENERATED / "quality_her2st.json").read_text())["sections"]["B4"]
    other, normalised = quality["PixNet"], quality["PixNet, stain normalised"]
    size = px.models._load.SHIPPED["her2st"].stat().st_size / 1e6
    best = ", ".join(f"{gene} {r:.2f}" for gene, r in measured["best_genes"].items())
    lines = [
        "| | |",
        "|---|---|",
        "| data | [her2st](https://github.com/almaan/her2st): HER2-positive breast tumours, legacy Spatial Transcriptomics, 100 µm spots (Andersson et al., *Nat Commun* 2021) |",
        "| licence of the data | the article is under CC BY 4.0, and the repository has no licence file; the weights have the licence of the package, BSD-3-Clause |",
        f"| tissue | {provenance['tissue']}; no other tissue was seen |",
        f"| trained on | {training} |",
        f"| validation | {validation} decided when to stop; the final model was then trained on {everything} for the same number of epochs |",
        f"| never seen | section C5, from the same patient as {everything}; section B4, from another patient |",
        f"| genes | {len(model.genes):,}, all that were detected in at least 1 % of the training spots, in {len(model.loadings)} programs |",
        f"| pixel size | {model.mpp:.3f} µm/px in, {model.mpp * model.stride:.2f} µm/px out (stride {model.stride}) |",
        f"| encoder | {model.config.encoder}, frozen, ImageNet weights (Apache-2.0) |",
        f"| file | {size:.1f} MB, float16 |",
        "",
        f"Held-out scores on section C5: {measured['spots']} spots of 100 µm, raw (not smoothed) log1p CP10k, over the spots of the section.",
        "C5 comes from the same patient as the training sections, so this is a *within patient* test.",
        "",
        "| genes | PCC mean | PCC median | PCC first quartile | MSE | MAE |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {s['pcc_mean']:.3f} | {s['pcc_median']:.3f} | {s['pcc_q1']:.3f} | {s['mse']:.3f} | {s['mae']:.3f} |"
            for name, s in (
                ("the 250 of highest mean in training", score),
                (f"all {every['n_genes']:,} that vary", every),
            )
        ),
        "",
        f"Most genes cannot be told from H&E: {measured['above_0.3']:,} have r above 0.3. The total of all transcripts has {measured['total_pcc']:.2f}.",
        'The model says which genes held-out spots showed to be predicted (`model.evidence`, `genes="trusted"`).',
        "",
        f"On section B4, from another patient, the mean PCC of the 250 is {other['pcc_mean']:.3f}, and {normalised['pcc_mean']:.3f} after `pixnet.pp.normalize_stain`. B4 has 650 UMI",
        "per spot, against 8,000 to 12,000 in training. Expect this, not the scores above, on your own slides.",
        "",
        textwrap.fill(f"Best predicted genes (r): {best}.", 120),
        "",
        f"Predicting the whole section took {measured['predict_s']:.0f} s and {measured['predict_peak_gb']:.1f} GB of memory (peak of the process) with {measured['threads']} CPU threads.",
    ]
    (GENERATED / "her2st_card.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
