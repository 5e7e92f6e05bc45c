"""Gene maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from spatialdata import SpatialData

from pixnet._evidence import LOW, PEARSON
from pixnet._names import check_genes, is_total
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.gene_map import GeneMap
from pixnet._sdata.keys import resolve_shapes
from pixnet._sdata.selection import Selection
from pixnet.pl._frame import Frame, draw_image, make_frame, panel_pixels, predicted_box, read_pixels
from pixnet.pl._he import draw_he, shown_he
from pixnet.pl._shapes import draw_outlines
from pixnet.pl._style import MUTED, SECOND, bare, colour_bar, colour_map, limits, panels, returned, scale_bar, style


def gene_map(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    image_key: str | None = None,
    he_key: str | Literal[False] | None = None,
    shapes: str | Sequence[str] | None = None,
    ncols: int = 4,
    cmap: str | Colormap | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    he: Literal["beside", "under"] = "beside",
    show: Literal["density", "cp10k"] = "density",
    box: Sequence[float] | Literal["slide"] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.0),
    vmin: float | None = None,
    vmax: float | None = None,
    shared_scale: bool = False,
    outline_color: str | None = None,
    outline_width: float = 0.8,
    scalebar: bool = True,
) -> Axes | np.ndarray:
    """Show the map of one or several genes, with the H&E beside or under it.

    The picture is read from the pyramid level that fits the figure, so that slides of any size show at once. Pixels
    without a prediction (background) are transparent. Where the map knows it, the title tells Pearson's r of the gene
    on held-out shapes, in another colour where its 95 % interval reaches 0: such a map says nothing, however crisp it
    looks.

    Parameters
    ----------
    sdata
        Object with a gene map (:func:`pixnet.tl.predict`).
    genes
        Gene or genes; ``"__total__"`` is the density of all transcripts.
    image_key
        The gene map; ``None``: the only one.
    he_key
        The H&E image; ``None``: the one that the map was predicted from, or the object's only one. ``False``: none.
    shapes
        Shapes or labels elements to outline.
    ncols
        Panels per row.
    cmap
        Colour map; ``None``: ``"magma"``, or ``"viridis"`` over H&E. Both are perceptually uniform and safe for any
        colour vision.
    ax
        Axes to draw in: one (divided when several panels are needed), or one for each panel. ``None``: a new figure.
    he
        ``"beside"``: the H&E is the first panel. ``"under"``: the map lies over the H&E, clearer where expression is
        low.
    show
        ``"density"``: the density of transcripts that the map holds, bright where a gene is a large share of the
        transcripts or where tissue is rich in them (of the published model's maps: log1p of CP10k per µm²).
        ``"cp10k"``: the gene's part of 10,000 transcripts at each pixel, as in :func:`pixnet.pl.compare`
        (``"__total__"`` stays a density).
    box
        Part of the slide to show, ``(x0, y0, x1, y1)`` in µm from the upper left corner of the H&E (of the map where
        no H&E is shown), in pixels where the pixel size is unknown. ``None``: the part with predictions; ``"slide"``:
        all.
    percentiles
        Lower and upper percentile of the shown pixels at which colours end.
    vmin, vmax
        Ends of the colours, in place of the percentiles.
    shared_scale
        Give all genes the same colour limits.
    outline_color
        Colour of the outlines; ``None``: white on maps, black on H&E.
    outline_width
        Line width of the outlines, in points.
    scalebar
        Draw a scale bar (µm) below the first panel.

    Returns
    -------
    Axes or ndarray of Axes
        The Axes where one panel is drawn, else an array of them: the H&E first where it is beside, then the genes.

    Raises
    ------
    KeyError
        If an element or gene is not in the object.
    TypeError
        If ``sdata``, ``genes`` or ``ax`` is of the wrong type.
    ValueError
        If the image is not a gene map, a value is not one of those listed, or CP10k is asked of a "log_sum" map.

    See Also
    --------
    pixnet.pl.compare : A predicted table beside the measured one.
    pixnet.pl.scales : One gene at several scales.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> genes = px.pp.select_genes(sdata, table_key="spots_counts", n_top=2)
    >>> axes = px.pl.gene_map(sdata, genes, image_key="truth", shapes="spots")
    >>> len(axes)  # the H&E and two genes
    3
    """
    gene_map = GeneMap.open(sdata, image_key)
    image_key = gene_map.key
    genes = check_genes(genes, among=[*gene_map.genes, gene_map.total_name], where=f"gene map {image_key!r}")
    if show not in ("density", "cp10k"):
        raise ValueError(f"show is {show!r}; valid: 'density', 'cp10k'")
    of_genes = [gene for gene in genes if not is_total(gene)]
    selection = gene_map.select(of_genes) if of_genes else gene_map.only_total
    if show == "cp10k":
        selection.check_pixels()
    if he not in ("beside", "under"):
        raise ValueError(f"he is {he!r}; valid: 'beside', 'under' (he_key=False shows none)")
    outlined = resolve_shapes(sdata, shapes) if shapes is not None else []
    he_key = shown_he(sdata, gene_map.source, he_key)
    under = he_key if he == "under" else None
    # One Axes for one gene holds the map alone; the slide can only lie under it.
    beside = he_key if he == "beside" and not (isinstance(ax, Axes) and len(genes) == 1) else None
    if isinstance(box, str) and box != "slide":
        raise ValueError(f"box is {box!r}; valid: (x0, y0, x1, y1), 'slide', None")
    chosen = colour_map(cmap, "viridis" if under else "magma")
    limits(np.zeros(1), percentiles, vmin, vmax)  # checks the numbers before any pixel is read
    frame = make_frame(sdata, he_key or image_key, None if isinstance(box, str) else box)
    if box is None:
        frame = replace(frame, box=predicted_box(frame, image_key))

    with style():
        axes = panels(len(genes) + bool(beside), ax, ncols=ncols, aspect=frame.aspect)
        if beside:
            draw_he(axes[0], frame, beside)
            axes[0].set_title("H&E")
        values, affine = _read(frame, gene_map.key, selection, genes, show, panel_pixels(axes[-1]))
        shared = limits(values, percentiles, vmin, vmax) if shared_scale else None
        # The unit of the genes is written once, beside the last of them.
        last = next((g for g in reversed(genes) if not is_total(g)), None)
        units = {
            last: "CP10k" if show == "cp10k" else selection.label,
            gene_map.total_name: "density of all transcripts",
        }
        for panel, gene, picture in zip(axes[bool(beside) :], genes, values, strict=True):
            if under:
                draw_he(panel, frame, under)
            norm = shared or limits(picture, percentiles, vmin, vmax)
            # Over H&E, low values let the tissue through.
            alpha = np.nan_to_num(np.clip(0.25 + 0.6 * norm(picture).filled(0), 0, 0.85)) if under else None
            image = draw_image(panel, np.ma.masked_invalid(picture), affine, cmap=chosen, norm=norm, alpha=alpha)
            if is_total(gene):
                panel.set_title("all transcripts")
            else:
                panel.set_title(gene, style="italic")
                if gene_map.evidence is not None:
                    _show_evidence(panel, gene_map.evidence, gene)
            frame.show(panel)
            bare(panel)
            if shared is None or gene == genes[-1]:  # one bar is enough for all that share it
                bar = colour_bar(panel, image, picture if shared is None else values, units.get(gene, ""))
                bar.solids.set_alpha(1)
        for i, panel in enumerate(axes):
            on_he = under is not None or (beside is not None and i == 0)
            for key in outlined:
                draw_outlines(
                    panel, frame, key, color=outline_color or ("black" if on_he else "white"), linewidth=outline_width
                )
        if scalebar:
            scale_bar(axes[0], frame.size[0], frame.box[0], frame.unit)
    return returned(axes)


def _show_evidence(panel: Axes, evidence: GeneEvidence, gene: str) -> None:
    """Write the held-out correlation of a gene above its map; in another colour where it may be 0."""
    if gene not in evidence.frame.index:
        return
    r, low = evidence.frame.loc[gene, [PEARSON, LOW]]
    if np.isfinite(r):
        text = f"r {r:.2f}" if low > 0 else f"r {r:.2f}, may be 0"
        panel.set_title(text, loc="right", fontsize=8, color=MUTED if low > 0 else SECOND)


def _read(
    frame: Frame, image_key: str, selection: Selection, genes: list[str], show: str, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values ``(gene, y, x)`` and the matrix that places them."""
    pixels = read_pixels(frame, image_key, width, selection.channels)
    read = np.moveaxis(pixels.values, 0, -1)
    of_genes = np.moveaxis(selection.pixel_cp10k(read) if show == "cp10k" else selection.values(read), -1, 0)
    found = dict(zip(selection.genes, of_genes))
    return np.stack([selection.total(read) if is_total(gene) else found[gene] for gene in genes]), pixels.affine
