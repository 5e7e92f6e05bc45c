"""Draw the figures of the landing page and the README: ``python docs/make_figures.py [idea] [readme] [lines]``.

``readme`` and ``lines`` show a real section, her2st C5, predicted by the shipped model. They read it from PIXNET_DATA_DIR or
download it. ``lines`` is the figure that the code on the landing page draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

import pixnet as px

STATIC = Path(__file__).parent / "_static"
MOST_BYTES = 600_000
SHOWN = ["CD24", "IGHA1", "HLA-DRA"]
"""Genes of tumour, plasma cells and immune cells, among those with much evidence on held-out spots."""


def save(figure: plt.Figure, name: str) -> None:
    """Save a figure as a PNG at the highest resolution that its size limit allows."""
    path = STATIC / name
    for dpi in (170, 150, 130, 115, 100, 85):
        figure.savefig(path, dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.08)
        Image.open(path).convert("RGB").save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def idea() -> None:
    """One gene of a synthetic tissue: slide, map, and the map summed over cells and spots."""
    sdata = px.datasets.synthetic_tissue(600, n_genes=30, seed=4)
    px.tl.aggregate(sdata, ["cells", "spots"], image_key="truth")
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.6), layout="constrained")
    px.pl.scales(sdata, "TUM1", ["cells", "spots"], image_key="truth", ax=list(axes))
    for ax, title in zip(axes, ["H&E", "map, 2 µm pixels", "cells", "55 µm spots"], strict=True):
        ax.set_title(title)
    save(figure, "idea.png")


def readme(section: str = "C5") -> None:
    """A section that the shipped model never saw: H&E, predicted maps, predicted beside measured, and what to trust."""
    sdata, model = px.datasets.her2st(section), px.models.load("her2st")
    px.tl.predict(sdata, model)
    px.tl.aggregate(sdata, "spots")
    figure = plt.figure(figsize=(11.5, 5.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    px.pl.gene_map(sdata, SHOWN, show="cp10k", ax=list(top.subplots(1, 4)))
    measured, predicted, trusted = bottom.subplots(1, 3, width_ratios=[1, 1, 0.9])
    twice = bottom.add_axes((0, 0, 0.1, 0.1))  # takes the H&E, which is already shown above
    tables = {"table_key": "spots_genes", "reference_key": "spots_counts"}
    px.pl.compare(sdata, SHOWN[0], **tables, ax=[twice, measured, predicted], scalebar=False)
    twice.remove()
    px.pl.trust(model, ax=trusted)
    save(figure, "her2st_c5.png")


def lines() -> None:
    """The figure that the code on the landing page draws, nothing added."""
    sdata = px.datasets.her2st("C5")
    px.tl.predict(sdata)
    px.tl.aggregate(sdata, "spots")
    axes = px.pl.gene_map(sdata, ["CD24", "IGHA1"], shapes="spots", show="cp10k")
    save(axes[0].figure, "lines_c5.png")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["idea"]:
        {"idea": idea, "readme": readme, "lines": lines}[name]()
