"""Measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from spatialdata import SpatialData

from pixnet._correlation import pearson
from pixnet._sdata.inputs import check_sdata
from pixnet.pl._he import draw_he, shown_he
from pixnet.pl._panels import shapes_frame, table_panel, unit
from pixnet.pl._style import colour_map, limits, panels, returned, scale_bar, style
from pixnet.pl._values import table_values


def compare(
    sdata: SpatialData,
    gene: str,
    *,
    table_key: str,
    reference_key: str,
    he_key: str | Literal[False] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    log: bool = True,
    cmap: str | Colormap | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    box: Sequence[float] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.0),
    shared_scale: bool = False,
    scalebar: bool = True,
) -> Axes | np.ndarray:
    """Show one gene as measured and as predicted, shape by shape, beside the H&E.

    Parameters
    ----------
    sdata
        Object with both tables.
    gene
        The gene.
    table_key
        The predicted table (:func:`pixnet.tl.aggregate`).
    reference_key
        The table of measured counts, of the same shapes.
    he_key
        The H&E image; ``None``: the object's only one. ``False``: no H&E panel.
    layer
        Layer of the measured table that holds the counts; ``None``: ``X``.
    total_key
        Column of the measured table's ``obs`` with all counts of each shape; ``None``: the sum over its columns.
    log
        Show log1p of CP10k, the scale on which :func:`pixnet.tl.evaluate` scores; ``False``: CP10k.
    cmap
        Colour map; ``None``: ``"magma"``.
    ax
        Axes to draw in: one, which is divided, or one for each panel. ``None``: a new figure.
    box
        Part of the slide to show, ``(x0, y0, x1, y1)`` in µm from the upper left corner of the H&E; ``None``: the
        part that has shapes.
    percentiles
        Lower and upper percentile at which colours end.
    shared_scale
        Give both the same colour limits. By default each has its own, since predictions vary less than counts.
    scalebar
        Draw a scale bar (µm) below the first panel.

    Returns
    -------
    ndarray of Axes
        H&E (where shown), measured, predicted. The title of the last gives Pearson's r over the shapes.

    Raises
    ------
    KeyError
        If a table, image, gene, layer or column is not in the object.
    TypeError
        If ``sdata`` or ``ax`` is of the wrong type.
    ValueError
        If the tables annotate different shapes, share no instance, or the object has no image to place them on.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.tl.aggregate(sdata, "spots", image_key="truth")
    >>> gene = sdata["spots_counts"].var_names[0]
    >>> axes = px.pl.compare(sdata, gene, table_key="spots_genes", reference_key="spots_counts")
    """
    check_sdata(sdata)
    shapes, predicted = table_values(sdata, table_key, gene, log=log)
    reference_shapes, measured = table_values(sdata, reference_key, gene, layer=layer, total_key=total_key, log=log)
    if shapes != reference_shapes:
        raise ValueError(
            f"table {table_key!r} is of shapes {shapes!r}, but {reference_key!r} of {reference_shapes!r}; aggregate the "
            f"same shapes: pixnet.tl.aggregate(sdata, {reference_shapes!r})"
        )
    both = measured.index.intersection(predicted.index)
    if len(both) == 0:
        raise ValueError(f"tables {table_key!r} and {reference_key!r} have no instance of {shapes!r} in common")
    he_key = shown_he(sdata, None, he_key)
    frame = shapes_frame(sdata, shapes, he_key, box)
    chosen = colour_map(cmap, "magma")
    own = [limits(v.to_numpy(), percentiles) for v in (measured, predicted)]
    pooled = limits(np.concatenate([measured.to_numpy(), predicted.to_numpy()]), percentiles)
    pairs = np.column_stack([measured.loc[both], predicted.loc[both]])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    r = pearson(*pairs.T)

    with style():
        axes = panels(2 + (he_key is not None), ax, ncols=3, aspect=frame.aspect)
        if he_key is not None:
            draw_he(axes[0], frame, he_key)
            axes[0].set_title("H&E")
        titles = (f"{gene}, measured", f"predicted  (r = {r:.2f}, n = {len(pairs):,})")
        for panel, values, norm, title in zip(axes[-2:], (measured, predicted), own, titles, strict=True):
            table_panel(
                panel, frame, he_key, shapes, values,
                cmap=chosen, norm=pooled if shared_scale else norm, title=title, bar=unit(log),
            )  # fmt: skip
        if scalebar:
            scale_bar(axes[0], frame.size[0], frame.box[0], frame.unit)
    return returned(axes)
