"""Write the model card's figures from what was measured.

python benchmarks/her2st.py DATA test --json docs/_generated/her2st.json
python benchmarks/quality.py her2st DATA
python docs/make_card.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pixnet as px

GENERATED = Path(__file__).parent / "_generated"


def main() -> None:
    model = px.models.load("her2st")
    measured = json.loads((GENERATED / "her2st.json").read_text())
    provenance = model.provenance
    training = ", ".join(f"{name} ({sum(n.values())} spots)" for name, n in provenance["training"].items())
    validation = ", ".join(f"{name} ({sum(n.values())} spots)" for name, n in provenance["validation"].items())
    score = measured["scores"]
    quality = json.loads((GENERATED / "quality_her2st.json").read_text())["sections"]["B4"]
    other, normalised = quality["PixNet"], quality["PixNet, stain normalised"]
    size = px.models._load.SHIPPED["her2st"].stat().st_size / 1e6
    best = ", ".join(f"{gene} {r:.2f}" for gene, r in measured["best_genes"].items())
    lines = [
        "| | |",
        "|---|---|",
        "| data | [her2st](https://github.com/almaan/her2st): HER2-positive breast tumours, legacy Spatial Transcriptomics, 100 µm spots (Andersson et al., *Nat Commun* 2021) |",
        "| licence of the data | the article is under CC BY 4.0, the repository holds no licence file; the weights carry the licence of the package, BSD-3-Clause |",
        f"| trained on | {training} |",
        f"| passes chosen on | {validation}; then trained on these too, for as many passes |",
        "| never seen | section C5, of the patient of C2, C3 and C4; section B4, of another |",
        f"| genes | {len(model.genes)}, those of highest mean CP10k over the training spots, without mitochondrial ones |",
        f"| um/px | {model.mpp:.3f} in, {model.mpp * model.stride:.2f} out (stride {model.stride}) |",
        f"| encoder | {model.config.encoder}, frozen, ImageNet weights (Apache-2.0) |",
        f"| file | {size:.1f} MB, float16 |",
        "",
        f"Held-out figures, section C5, {measured['spots']} spots of 100 µm, raw (unsmoothed) log1p CP10k, within the section. C5 shares its patient with",
        "the training sections, so this is *within patient*.",
        "",
        "| PCC mean | PCC median | PCC first quartile | MSE | MAE | genes | total, r |",
        "|---|---|---|---|---|---|---|",
        f"| {score['pcc_mean']:.3f} | {score['pcc_median']:.3f} | {score['pcc_q1']:.3f} | {score['mse']:.3f} | {score['mae']:.3f} | {score['n_genes']} | {measured['total_pcc']:.2f} |",
        "",
        f"On section B4, of another patient: PCC mean {other['pcc_mean']:.3f}, {normalised['pcc_mean']:.3f} after `pixnet.pp.normalize_stain` (at 650 UMI a spot, against 8,000 to 12,000 in training).",
        "Expect that, not the figures above, on slides of your own.",
        "",
        f"Best predicted genes (r): {best}.",
        "",
        f"Predicting the whole section took {measured['predict_s']:.0f} s and {measured['predict_peak_gb']:.1f} GB (peak of the process) with {measured['threads']} threads on a CPU.",
    ]
    (GENERATED / "her2st_card.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
