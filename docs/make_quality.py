"""Write the tables of the quality page from the results of `benchmarks/quality.py` and `benchmarks/ablation.py`.

python docs/make_quality.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

GENERATED = Path(__file__).parent / "_generated"
SCALES = {
    "bins_008um": "8 µm",
    "bins_016um": "16 µm",
    "bins_032um": "32 µm",
    "bins_056um": "56 µm",
    "spots": "55 µm spots",
}
DEFAULT = "PixNet on spots, all genes in 64 programs"
ORDER = (
    DEFAULT,
    "PixNet on spots, all genes in 32 programs",
    "PixNet on spots, all genes in 128 programs",
    "PixNet on spots",
    "PixNet on spots, a channel for each of all genes",
    "PixNet on spots and bins",
    "ridge on spots",
    "MLP on spots",
    "MLP on spots, slid",
    "MLP on 16 um bins",
    "MLP on 32 um bins",
    "iStar's network on the same features",
    "mean of measured neighbours",
    "section mean",
    "ceiling (perfect prediction)",
)


def spread(values: list[float]) -> str:
    """Return the mean and, for several values, the standard deviation."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def printed(name: str) -> str:
    """Return the name of a row with µm for um, and what differs from the default."""
    name = f"{name}, 250 genes alone" if name == "PixNet on spots" else name
    return re.sub(r"\bum\b", "µm", name)


def summary() -> list[str]:
    """Return the main results, one line each."""
    methods = json.loads((GENERATED / "quality_kidney.json").read_text())["methods"]
    (ceiling,) = methods["ceiling (perfect prediction)"]
    fine, coarse = (np.mean([run[key]["pcc_mean"] for run in methods[DEFAULT]]) for key in ("bins_008um", "bins_056um"))
    shares = [
        f"{100 * r / ceiling[key]['pcc_mean']:.0f} %" for r, key in ((fine, "bins_008um"), (coarse, "bins_056um"))
    ]
    sections = json.loads((GENERATED / "quality_her2st.json").read_text())["sections"]
    alone = json.loads((GENERATED / "quality_her2st_genes.json").read_text())["sections"]
    within, panel = (
        np.mean([one["PixNet"]["pcc_mean"] for name, one in found.items() if name.startswith("C")])
        for found in (sections, alone)
    )
    other = [sections["B4"][name]["pcc_mean"] for name in ("PixNet", "PixNet, stain normalised")]
    return [
        f"- **Kidney, trained on 55 µm spots:** the mean r is {fine:.3f} in 8 µm bins and {coarse:.3f} in 56 µm bins, which is",
        f"  {shares[0]} and {shares[1]} of what a perfect prediction could reach.",
        f"- **Breast tumour, a section left out of the same patient:** the mean r is {within:.3f} with a whole transcriptome, and",
        f"  {panel:.3f} with these 250 genes alone.",
        f"- **Breast tumour, another patient:** the mean r is {other[0]:.3f}, and {other[1]:.3f} with normalised stain.",
    ]


def kidney() -> list[str]:
    """Return the rows of the kidney table."""
    methods = json.loads((GENERATED / "quality_kidney.json").read_text())["methods"]
    lines = [f"| method | {' | '.join(SCALES.values())} |", "|---" * (len(SCALES) + 1) + "|"]
    ceiling = methods.get("ceiling (perfect prediction)", [{}])[0]
    for name in [m for m in ORDER if m in methods]:
        cells = []
        for key in SCALES:
            values = [run[key]["pcc_mean"] for run in methods[name] if "pcc_mean" in run.get(key, {})]
            cells.append(spread(values) if values else "–")
        lines.append(f"| {printed(name)} | {' | '.join(cells)} |")
    if ceiling and DEFAULT in methods:
        shares = [
            f"{np.mean([r[key]['pcc_mean'] for r in methods[DEFAULT]]) / ceiling[key]['pcc_mean']:.0%}"
            for key in SCALES
        ]
        lines.append(f"| *64 programs, share of the ceiling* | {' | '.join(shares)} |")
    return lines


def her2st() -> list[str]:
    """Return the rows of the her2st table, one for each section and method."""
    sections = json.loads((GENERATED / "quality_her2st.json").read_text())["sections"]
    alone = json.loads((GENERATED / "quality_her2st_genes.json").read_text())["sections"]
    lines = [
        "| tested on | trained on | method | PCC mean | median | first quartile | MSE | MAE | PCC mean, 3 x 3-smoothed targets |",
        "|---" * 9 + "|",
    ]
    for section, found in sections.items():
        who = "another patient" if section.startswith("B") else "same patient"
        methods = {}
        for method, scores in found.items():
            methods[method] = scores
            if method.startswith("PixNet"):
                methods[f"{method}, 250 genes alone"] = alone[section][method]
        for method, scores in methods.items():
            if isinstance(scores, dict):
                smooth = f"{scores['pcc_mean_smoothed']:.3f}" if "pcc_mean_smoothed" in scores else "–"
                lines.append(
                    f"| {section} ({who}) | {', '.join(found['trained on'])} | {method} | {scores['pcc_mean']:.3f} | {scores['pcc_median']:.3f} "
                    f"| {scores['pcc_q1']:.3f} | {scores['mse']:.3f} | {scores['mae']:.3f} | {smooth} |"
                )
        lines.append(f"| {section} ({who}) | | ceiling (perfect prediction) | {found['ceiling']:.3f} | | | | | |")
    within, panel = (
        [f["PixNet"]["pcc_mean"] for s, f in found.items() if s.startswith("C")] for found in (sections, alone)
    )
    lines += [
        "",
        f"Mean PCC within the patient, over {len(within)} left-out sections: {np.mean(within):.3f} with all genes in programs, and",
        f"{np.mean(panel):.3f} with a channel for each of the 250 genes alone.",
    ]
    return lines


def ablation() -> list[str]:
    """Return the rows of the ablation table."""
    rows = json.loads((GENERATED / "ablation.json").read_text())
    lines = [f"| what differs | seeds | {' | '.join(SCALES.values())} |", "|---" * (len(SCALES) + 2) + "|"]
    for name, runs in rows.items():
        cells = [spread([run[key] for run in runs]) for key in SCALES]
        lines.append(f"| {printed(name)} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    for name, make, source in (
        ("quality_kidney", kidney, "quality_kidney"),
        ("quality_her2st", her2st, "quality_her2st"),
        ("ablation", ablation, "ablation"),
    ):
        if (GENERATED / f"{source}.json").exists():
            (GENERATED / f"{name}.md").write_text("\n".join(make()) + "\n")
    (GENERATED / "quality_summary.md").write_text("\n".join(summary()) + "\n")


if __name__ == "__main__":
    main()
