"""Spots on their slide, coloured by whether they lie on tissue."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pixnet._sdata.slide import Slide
from pixnet.pl._frame import make_frame
from pixnet.pl._he import draw_he
from pixnet.pl._style import ACCENT, SECOND, style


def draw_alignment(slide: Slide, x: NDArray, y: NDArray, on_tissue: NDArray, title: str, ax: Axes | None) -> None:
    """Draw a slide and points on it, given in its pixels."""
    frame = make_frame(slide.sdata, slide.key)
    with style():
        if ax is None:
            _, ax = plt.subplots(figsize=(6, 6 / frame.aspect + 0.4), layout="constrained")
        draw_he(ax, frame, slide.key)
        size = float(np.clip(8000 / max(len(x), 1), 0.5, 30))
        for wanted, colour, label in ((True, ACCENT, "on tissue"), (False, SECOND, "not on tissue")):
            chosen = on_tissue == wanted
            ax.scatter(
                x[chosen] * frame.unit_per_pixel, y[chosen] * frame.unit_per_pixel,
                s=size, c=colour, label=label, linewidths=0, alpha=0.8,
            )  # fmt: skip
        ax.set_title(title)
        ax.legend(loc="lower right", markerscale=max(1.0, 4 / size), frameon=True, framealpha=0.9)
