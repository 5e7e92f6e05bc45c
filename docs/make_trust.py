"""Write the tables of docs/benchmarks/trust.md from what benchmarks/trust.py and benchmarks/novelty.py measured."""

from __future__ import annotations

import json

from make_quality import GENERATED, printed

ROWS = {
    "bins_008um": "kidney, 8 µm bins",
    "bins_016um": "kidney, 16 µm bins",
    "bins_032um": "kidney, 32 µm bins",
    "bins_056um": "kidney, 56 µm bins",
    "spots": "kidney, 55 µm spots",
    "C5": "her2st C5, same patient",
    "B4": "her2st B4, another patient",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def coverage() -> str:
    """Return nominal against observed coverage, with what stands beside it."""
    found = {}
    for name in ("kidney", "her2st"):
        path = GENERATED / f"trust_{name}.json"
        found |= json.loads(path.read_text()) if path.exists() else {}
    head = [
        "shapes",
        "50 %",
        "80 %",
        "90 %",
        "95 %",
        "genes within 84 to 96 %",
        "width, 50 best genes",
        "amounts",
        "rank of r",
    ]
    rows = []
    for key, label in ROWS.items():
        if key in found:
            f = found[key]
            rows.append(
                [label, *(f"{100 * f['coverage'][level]:.1f}" for level in ("0.5", "0.8", "0.9", "0.95"))]
                + [f"{100 * f['genes_84_to_96']:.0f} %", f"{f['width_50_best']:.2f}", f"{f['ratio']:.2f}"]
                + [f"{f['rank_of_stated_r']:.2f}"]
            )
    return table(head, rows)


def of_truth() -> str:
    """Return the share of true expression, and of thinned counts, inside intervals; empty where it was not measured."""
    path = GENERATED / "trust_synthetic.json"
    rows = [
        [
            key.removesuffix("um") + (" µm squares" if key.endswith("um") else ""),
            *(f"{100 * v:.1f}" for v in f["truth_inside"].values()),
        ]
        for key, f in (json.loads(path.read_text()) if path.exists() else {}).items()
    ]
    return table(["shapes", "50 %", "80 %", "90 %", "95 %"], rows)


def thinned() -> str:
    """Return coverage of the kidney's counts, and of counts of which half was thrown away."""
    found = json.loads((GENERATED / "trust_kidney.json").read_text())
    rows = [
        [ROWS[key], f"{100 * f['coverage']['0.9']:.1f}", f"{100 * f['thinned_90']:.1f}"]
        for key, f in found.items()
        if "thinned_90" in f
    ]
    return table(["shapes", "counts", "half of the counts"], rows)


def novelty() -> str:
    """Return how well novelty tells tissue unlike that of training."""
    real = json.loads((GENERATED / "novelty_real.json").read_text())
    rows = []
    for model, slides in real.items():
        for slide, f in slides.items():
            auc = "" if f["auc"] == 0.5 else f"{f['auc']:.3f}"
            rows.append(
                [
                    printed(model),
                    slide,
                    f"{f['squares']:,}",
                    f"{f['mean']:.0f}",
                    f"{100 * f['above_99']:.0f} %",
                    auc,
                ]
            )
    return table(["model", "slide", "squares of 100 µm", "mean percentile", "above 99", "ROC area"], rows)


def unseen() -> str:
    """Return the same of a cell type that training never saw."""
    found = json.loads((GENERATED / "novelty_synthetic.json").read_text())
    rows = [
        [
            name,
            f"{f['squares']:,}",
            f"{f['mean']:.0f}",
            f"{f['auc']:.3f}",
            *(f"{r:.2f}" for r in f["risk"]),
            f"{f['rank']:.2f}",
        ]
        for name, f in found.items()
    ]
    head = ["left out", "squares of it", "mean percentile", "ROC area", "1st", "2nd", "3rd", "4th quarter", "rank"]
    return table(head, rows)


def risk() -> str:
    """Return the error of spots by quarters of novelty."""
    real = json.loads((GENERATED / "novelty_real.json").read_text())["her2st"]
    rows = [[name, *(f"{r:.2f}" for r in f["risk"])] for name, f in real.items()]
    return table(["section", "1st quarter", "2nd", "3rd", "4th (newest)"], rows)


if __name__ == "__main__":
    for name, text in {
        "coverage": coverage(), "truth": of_truth(), "thinned": thinned(),
        "novelty": novelty(), "unseen": unseen(), "risk": risk(),
    }.items():  # fmt: skip
        (GENERATED / f"trust_{name}.md").write_text(text, encoding="utf-8")
