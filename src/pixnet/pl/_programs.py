"""The programs of a map as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from spatialdata import SpatialData

from pixnet._names import listed
from pixnet._sdata.gene_map import ProgramMap, program_map
from pixnet.pl._frame import draw_image, make_frame, panel_pixels, predicted_box, read_pixels
from pixnet.pl._he import draw_he, shown_he
from pixnet.pl._style import ACCENT, bare, colour_bar, colour_map, limits, panels, returned, scale_bar, style

SHOWN = 12
"""Programs shown unless they are named."""


def programs(
    sdata: SpatialData,
    programs: Sequence[int | str] | None = None,
    *,
    image_key: str | None = None,
    he_key: str | Literal[False] | None = None,
    n_genes: int = 8,
    kind: Literal["maps", "genes"] = "maps",
    ncols: int = 4,
    cmap: str | Colormap | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    box: Sequence[float] | Literal["slide"] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.5),
    scalebar: bool = True,
) -> Axes | np.ndarray:
    """Show the maps of programs beside the H&E, each named by its top genes, or bars of these genes.

    Programs are the channels of a map that `pixnet.tl.predict` writes with ``store="programs"``. Each is drawn as its
    part of 10,000 transcripts. Its top genes are those of which it has most, relative to the mean over all programs
    (the lift).

    Parameters
    ----------
    sdata
        Object with a program map and the table of its loadings.
    programs
        Programs by number, from 1, or by name (``"P03"``), in the order of the panels. None: those that differ most
        from place to place, at most 12.
    image_key
        The program map. None: the only one.
    he_key
        The H&E image for the first panel. None: the one that the map was made from, or the object's only one. False:
        none.
    n_genes
        Genes in a bar list.
    kind
        ``"maps"``: a map for each program. ``"genes"``: a bar list of the lift of its top genes.
    ncols
        Panels per row.
    cmap
        Colour map. None: ``"magma"``.
    ax
        Axes to draw in: one, which is divided, or one for each panel. None: a new figure.
    box
        Part of the slide to show, ``(x0, y0, x1, y1)`` in µm from the upper left corner of the H&E (of the map where
        none is shown). None: the part with predictions; ``"slide"``: all.
    percentiles
        Lower and upper percentile of the shown pixels at which colours end.
    scalebar
        Draw a scale bar (µm) below the first panel.

    Returns
    -------
    Axes or ndarray of Axes
        The H&E where it is shown, then one for each program.

    Raises
    ------
    KeyError
        If the object has no such image, its loadings are missing, or there is no such program.
    ValueError
        If the image is not a program map, or a value is not one of those listed.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> model = px.models.PixNet(["GENE1", "GENE2", "GENE3"], n_programs=2, mpp=0.5, pretrained=False)
    >>> px.tl.predict(sdata, model, store="programs", mask_key=False)
    >>> axes = px.pl.programs(sdata)
    >>> len(axes)  # the H&E and two programs
    3
    """
    opened = program_map(sdata, image_key)
    if kind not in ("maps", "genes"):
        raise ValueError(f"kind is {kind!r}; valid: 'maps', 'genes'")
    if isinstance(box, str) and box != "slide":
        raise ValueError(f"box is {box!r}; valid: (x0, y0, x1, y1), 'slide', None")
    chosen = None if programs is None else _positions(opened, programs)
    if kind == "genes":
        return _bars(
            opened, list(range(min(SHOWN, len(opened.programs)))) if chosen is None else chosen, n_genes, ncols, ax
        )
    limits(np.zeros(1), percentiles)  # checks the numbers before any pixel is read
    he_key = shown_he(sdata, opened.source, he_key)
    frame = make_frame(sdata, he_key or opened.key, None if isinstance(box, str) else box)
    if box is None:
        frame = replace(frame, box=predicted_box(frame, opened.key))
    with style():
        n = min(SHOWN, len(opened.programs)) if chosen is None else len(chosen)
        axes = panels(n + (he_key is not None), ax, ncols=ncols, aspect=frame.aspect)
        pixels = read_pixels(frame, opened.key, panel_pixels(axes[-1]), list(range(len(opened.programs))))
        shares = np.moveaxis(opened.all_programs.programs(np.moveaxis(pixels.values, 0, -1)), -1, 0)
        if chosen is None:
            spread = np.nanstd(shares, axis=(1, 2))
            chosen = [int(i) for i in np.argsort(-spread, kind="stable")[:n]]
        if he_key is not None:
            draw_he(axes[0], frame, he_key)
            axes[0].set_title("H&E")
        for panel, i in zip(axes[he_key is not None :], chosen, strict=True):
            norm = limits(shares[i], percentiles)
            drawn = draw_image(
                panel, np.ma.masked_invalid(shares[i]), pixels.affine, cmap=colour_map(cmap, "magma"), norm=norm
            )
            panel.set_title(f"{opened.short_name(i)}: {opened.top_genes(i, 3)}", fontsize=8.5)
            frame.show(panel)
            bare(panel)
            colour_bar(panel, drawn, shares[i], "CP10k" if i == chosen[-1] else "")
        if scalebar:
            scale_bar(axes[0], frame.size[0], frame.box[0], frame.unit)
    return returned(axes)


def _positions(opened: ProgramMap, programs: Sequence[int | str]) -> list[int]:
    """Return the positions of programs that are given by number or by name."""
    wanted = [programs] if isinstance(programs, int | str) else list(programs)
    names = {opened.short_name(i): i for i in range(len(opened.programs))}
    names |= {name: i for i, name in enumerate(opened.programs)}
    names |= {str(int(opened.short_name(i)[1:])): i for i in range(len(opened.programs))}
    unknown = [str(one) for one in wanted if str(one) not in names]
    if unknown or not wanted:
        raise KeyError(
            f"program map {opened.key!r} has no program {listed(unknown[:5])}; it has {len(opened.programs)}, from "
            f"{opened.short_name(0)!r} on"
        )
    return [names[str(one)] for one in wanted]


def _bars(
    opened: ProgramMap, chosen: list[int], n_genes: int, ncols: int, ax: Axes | Sequence[Axes] | None
) -> Axes | np.ndarray:
    """Draw the lift of the top genes of each program."""
    with style():
        axes = panels(len(chosen), ax, ncols=ncols, aspect=1.0)
        for panel, i in zip(axes, chosen, strict=True):
            genes, lift = opened.lift(i, n_genes)
            panel.barh(np.arange(len(genes)), lift, color=ACCENT)
            panel.set_yticks(np.arange(len(genes)), genes, style="italic")
            panel.invert_yaxis()
            panel.set_title(opened.short_name(i))
            panel.set_xlabel("lift over the mean of all programs" if i == chosen[-1] else "")
    return returned(axes)
