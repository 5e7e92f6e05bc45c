"""One gene at several scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from spatialdata import SpatialData

from pixnet._names import listed
from pixnet._sdata.gene_map import GeneMap, all_maps
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_shapes
from pixnet.pl._frame import draw_image, panel_pixels, read_pixels
from pixnet.pl._he import draw_he, shown_he
from pixnet.pl._panels import shapes_frame, table_panel, unit
from pixnet.pl._style import bare, colour_bar, colour_map, limits, panels, returned, scale_bar, style
from pixnet.pl._values import table_values


def scales(
    sdata: SpatialData,
    gene: str,
    shapes: str | Sequence[str],
    *,
    table_key: str | Sequence[str] | Mapping[str, str] | None = None,
    image_key: str | Literal[False] | None = None,
    he_key: str | Literal[False] | None = None,
    layer: str | None = None,
    total_key: str | None = None,
    log: bool = True,
    ncols: int = 3,
    cmap: str | Colormap | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    box: Sequence[float] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.0),
    shared_scale: bool = True,
    scalebar: bool = True,
) -> Axes | np.ndarray:
    """Show one gene at several scales: the map itself, then the map summed over each kind of shapes.

    All panels are in CP10k, which means the same at every scale, so they share their colours by default.

    Parameters
    ----------
    sdata
        Object with a table for each shapes element (:func:`pixnet.tl.aggregate`).
    gene
        The gene.
    shapes
        Shapes or labels elements, in the order of the panels.
    table_key
        Their tables: a name or list parallel to ``shapes``, or a dict by shapes name. ``None``: ``"{shapes}_genes"``.
    image_key
        The gene map for the first panel; ``None``: the only one of densities, if there is one. ``False``: no map.
    he_key
        The H&E image for a panel before the map; ``None``: the one that the map was made from. ``False``: none.
    layer, total_key
        Of measured tables, as for :func:`pixnet.pl.compare`.
    log
        Show log1p of CP10k; ``False``: CP10k.
    ncols
        Panels per row.
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
        Give all panels the same colour limits.
    scalebar
        Draw a scale bar (µm) below the first panel.

    Returns
    -------
    Axes or ndarray of Axes
        H&E and map where shown, then one for each shapes element; a single Axes where only one panel is drawn.

    Raises
    ------
    KeyError
        If an element, table or gene is not in the object; for a missing table the message says how to make it.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If ``table_key`` does not fit ``shapes``, or ``image_key`` is not a gene map of densities.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> px.tl.aggregate(sdata, ["spots", "cells"], image_key="truth")
    >>> gene = sdata["spots_counts"].var_names[0]
    >>> axes = px.pl.scales(sdata, gene, ["cells", "spots"], image_key="truth")
    >>> len(axes)  # the H&E, the map, cells, spots
    4
    """
    check_sdata(sdata)
    names = resolve_shapes(sdata, shapes)
    tables = _tables(sdata, names, table_key)
    columns = []
    for name, table in tables.items():
        region, values = table_values(sdata, table, gene, layer=layer, total_key=total_key, log=log)
        if region != name:
            raise ValueError(f"table {table!r} annotates {region!r}, not {name!r}")
        columns.append(values)
    gene_map = _map(sdata, image_key, gene)
    map_key = None if gene_map is None else gene_map.key
    he_key = shown_he(sdata, None if gene_map is None else gene_map.source, he_key)
    frame = shapes_frame(sdata, names[0], he_key or map_key, box)
    chosen = colour_map(cmap, "magma")

    with style():
        first = (he_key is not None) + (gene_map is not None)  # panel of the first shapes
        axes = panels(first + len(names), ax, ncols=ncols, aspect=frame.aspect)
        if he_key is not None:
            draw_he(axes[0], frame, he_key)
            axes[0].set_title("H&E")
        everything = [values.to_numpy() for values in columns]
        if gene_map is not None:
            selection = gene_map.select([gene])
            pixels = read_pixels(frame, gene_map.key, panel_pixels(axes[0]), selection.channels)
            picture = selection.pixel_cp10k(np.moveaxis(pixels.values, 0, -1))[..., 0]
            picture = np.log1p(picture) if log else picture
            everything.append(picture.ravel())
        # Each scale weighs the same in the shared limits, however many shapes it has.
        own = [limits(values, percentiles) for values in everything]
        shared = None
        if shared_scale:
            shared = limits(np.array([[norm.vmin, norm.vmax] for norm in own]), (0, 100))
        label = unit(log)
        if gene_map is not None:
            panel = axes[first - 1]
            norm = shared or own[-1]
            drawn = draw_image(panel, np.ma.masked_invalid(picture), pixels.affine, cmap=chosen, norm=norm)
            panel.set_title(f"{gene}, map" + (f" ({gene_map.mpp:.2g} µm/px)" if gene_map.mpp else ""))
            if shared is None:
                colour_bar(panel, drawn, picture, label)
            frame.show(panel)
            bare(panel)
        for panel, name, values, norm in zip(axes[first:], names, columns, own, strict=False):
            filled = table_panel(
                panel, frame, he_key, name, values,
                cmap=chosen, norm=shared or norm, title=f"{name}  (n = {len(values):,})",
                bar=None if shared else label,
            )  # fmt: skip
        if shared is not None:  # one bar is enough
            colour_bar(axes[-1], filled, np.concatenate(everything), label)
        if scalebar:
            scale_bar(axes[0], frame.size[0], frame.box[0], frame.unit)
    return returned(axes)


def _tables(
    sdata: SpatialData, names: list[str], table_key: str | Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Return the table of each shapes element."""
    if table_key is None:
        tables = {name: f"{name}_genes" for name in names}
    elif isinstance(table_key, Mapping):
        missing = [name for name in names if name not in table_key]
        if missing:
            raise ValueError(f"table_key has no entry for {listed(missing)}")
        tables = {name: table_key[name] for name in names}
    else:
        given = [table_key] if isinstance(table_key, str) else list(table_key)
        if len(given) != len(names):
            raise ValueError(
                f"table_key names {len(given)} tables, shapes {len(names)} elements; one for each is needed"
            )
        tables = dict(zip(names, given, strict=True))
    for name, table in tables.items():
        if table not in sdata.tables:
            raise KeyError(
                f"no table {table!r} in this object; make it with pixnet.tl.aggregate(sdata, {name!r}), or name another "
                f"with table_key=; it has: {listed(sdata.tables)}"
            )
    return tables


def _map(sdata: SpatialData, image_key: str | Literal[False] | None, gene: str) -> GeneMap | None:
    """Return the gene map to show: the one named, or the only one that has the gene."""
    if image_key is False:
        return None
    if image_key is None:
        maps = [found for found in all_maps(sdata) if gene in found.genes and found.only_total.pixels_have_cp10k]
        maps = [found for found in maps if found.made] or maps  # predicted ones, where there are any
        return maps[0] if len(maps) == 1 else None
    found = GeneMap.open(sdata, image_key)
    found.select(gene).check_pixels()
    return found
