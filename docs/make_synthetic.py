"""Draw the synthetic tissue beside real H&E: docs/_static/synthetic.png.

    python docs/make_synthetic.py DATA

DATA is the folder that holds her2st/ (sections of the public repository almaan/her2st) and wsi/CMU-1-Small-Region.svs
(OpenSlide's test slide). Both rows show the same widths in µm, each image in its own pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import pixnet as px
from pixnet._sdata.pixel_size import get_mpp

WIDTHS = (600, 600, 120, 120)  # um


def window(sdata, corner: tuple[float, float], width: float) -> np.ndarray:
    """Return a square of a slide, ``(y, x, 3)``; corner and width are in µm."""
    image = sdata["he"]
    data = (image["scale0"]["image"] if hasattr(image, "children") else image).data
    mpp = get_mpp(sdata, "he")
    y, x = (slice(int(c / mpp), int((c + width) / mpp)) for c in corner)
    return np.asarray(data[:, y, x]).transpose(1, 2, 0)


def main(data: str) -> None:
    """Draw the figure."""
    options = {"seed": 1, "n_genes": 13, "shapes": (), "lazy": True}  # only the windows are painted
    made = [px.datasets.synthetic_tissue(1600, stain_seed=stain, **options) for stain in (0, 4)]
    breast = px.datasets.her2st("C2", path=Path(data) / "her2st")
    skin = px.io.slide(Path(data) / "wsi" / "CMU-1-Small-Region.svs")
    rows = {
        "synthetic": [(made[0], (500, 500)), (made[1], (500, 500)), (made[0], (700, 620)), (made[1], (900, 900))],
        "real": [(breast, (4000, 4100)), (skin, (860, 380)), (breast, (4200, 4300)), (skin, (1000, 560))],
    }
    fig, axes = plt.subplots(2, 4, figsize=(12, 6.2), layout="constrained")
    for r, (name, places) in enumerate(rows.items()):
        for ax, (sdata, corner), width in zip(axes[r], places, WIDTHS):
            ax.imshow(window(sdata, corner, width), extent=(0, width, width, 0))
            ax.set(xticks=[], yticks=[])
        axes[r, 0].set_ylabel(name, fontsize=12)
    for ax, width in zip(axes[0], WIDTHS):
        ax.set_title(f"{width} µm")
    path = Path(__file__).parent / "_static" / "synthetic.png"
    fig.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
