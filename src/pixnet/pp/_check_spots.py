"""Alignment of spots and tissue: mirrored, turned, swapped, scaled or shifted coordinates are found before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pixnet._logging import logger
from pixnet._sdata.counts import annotated_regions, counts_matrix, is_predicted_table, match_rows, totals
from pixnet._sdata.keys import resolve_shapes, resolve_table
from pixnet._sdata.placement import centres, score_placements, warn_of_placement
from pixnet._sdata.shapes import read_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import on_tissue

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from spatialdata import SpatialData


def check_spots(
    sdata: SpatialData,
    shapes: str | None = None,
    *,
    image_key: str | None = None,
    table_key: str | Literal[False] | None = None,
    total_key: str | None = None,
    mask_key: str | Literal[False] | None = None,
    coordinate_system: str | None = None,
    plot: bool = False,
    ax: Axes | None = None,
) -> pd.DataFrame:
    """Check that spots, bins or cells lie on the slide where they were measured.

    Coordinates that are mirrored, turned, in µm, or whose x and y are exchanged, train a model on the wrong pixels
    without any error. Where tissue is round, most of them still lie on it. So two things are compared for the eight
    orientations and for small shifts: how many shapes are on tissue, and how well the transcripts that were measured in
    each, per area, follow the haematoxylin under it, which is high where cells are dense. The placement as given should
    fit best. A warning is logged where another fits clearly better, or where few shapes are on tissue. Look at the
    picture as well.

    Parameters
    ----------
    sdata
        Object that holds shapes and image.
    shapes
        The shapes element; ``None``: the recorded one, else the only one.
    image_key
        The H&E image; ``None``: the recorded one, else the only one.
    table_key
        Table of measured counts of the shapes. ``None``: the recorded one, else the only one that annotates them;
        without any, only tissue is compared. ``False``: only tissue.
    total_key
        Column of the table's ``obs`` that holds all transcripts of each shape; ``None``: the sum over its genes.
    mask_key
        Labels that mark tissue; ``None`` takes ``"{image_key}_tissue"``, else computes it; ``False`` takes the whole
        image for tissue, so that only shapes outside the image are found.
    coordinate_system
        The coordinate system that shapes and image share; ``None`` takes "global" if shared, else the first shared one.
    plot
        Draw the image with the shapes' centres, coloured by whether they are on tissue.
    ax
        Axes to draw on (implies ``plot``).

    Returns
    -------
    DataFrame
        Index ``placement``: ``"as given"`` first, then the others, the best first, and of the shifts only the best.
        Column ``on_tissue``: share of the shapes whose centre is on tissue. Column ``correlation``: of transcripts per
        area and haematoxylin (Spearman; NaN without counts, or with fewer than 30 shapes).

    Raises
    ------
    KeyError
        If an element is missing.
    ValueError
        If the element is empty, several are named, or the pixel size of the image is unknown.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=600)
    >>> px.pp.check_spots(sdata, "spots").index[0]
    'as given'
    """
    slide = Slide.open(sdata, image_key, mask_key)
    names = resolve_shapes(sdata, shapes)
    if len(names) > 1:
        raise ValueError(f"shapes names {len(names)} elements; check them one by one")
    geometries = read_shapes(sdata, names[0], slide.key, coordinate_system).geometries
    if len(geometries) == 0:
        raise ValueError(f"{names[0]!r} is empty: there is nothing to check")
    total = _total(sdata, names[0], table_key, total_key, len(geometries))
    scores = score_placements(slide, geometries, total)
    warn_of_placement(scores, slide, names[0], geometries, 0 if total is None else int(np.isfinite(total).sum()))
    if plot or ax is not None:
        from pixnet.pl._alignment import draw_alignment

        x, y = centres(geometries)
        title = f"{scores.loc['as given', 'on_tissue']:.0%} of {names[0]} on tissue"
        draw_alignment(slide, x, y, on_tissue(slide, x, y), title, ax)
    return scores


def _total(
    sdata: SpatialData, shapes: str, table_key: str | Literal[False] | None, total_key: str | None, n: int
) -> NDArray[np.float64] | None:
    """Return the transcripts of each shape, NaN where they are unknown; None if nothing was measured."""
    if table_key is False:
        return None
    if table_key is None:
        found = [
            key
            for key, table in sdata.tables.items()
            if shapes in annotated_regions(table) and not is_predicted_table(table)
        ]
        if not found:
            return None
    key = resolve_table(sdata, table_key, shapes)
    table = sdata.tables[key]
    try:
        total = totals(table, key, counts_matrix(table, key), total_key)
    except (TypeError, ValueError) as error:
        if table_key is not None:
            raise
        logger.info("only tissue is compared, not transcripts: %s", error)
        return None
    rows = match_rows(sdata, key, shapes)
    out = np.full(n, np.nan)
    out[rows[rows >= 0]] = total[rows >= 0]
    return out
