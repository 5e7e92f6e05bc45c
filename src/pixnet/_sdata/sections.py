"""From SpatialData objects to the plain arrays that training works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from spatialdata import SpatialData

from pixnet._core.train.crops import Section, Targets
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.counts import annotated_regions, check_totals_alike, match_rows
from pixnet._sdata.keys import resolve_shapes, resolve_table
from pixnet._sdata.measured import MeasuredTable
from pixnet._sdata.shapes import pixel_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import open_mask

Total = Literal["all", "panel"]
Totals = Total | Mapping[str, Total]
"""Whether totals are of all transcripts or of a table's own genes: of all tables, or by object or table."""


@dataclass(frozen=True)
class MeasuredSlide:
    """A slide of an object to train on or to test, and the shapes that were measured on it.

    Attributes
    ----------
    name
        Name of the object.
    slide
        Its H&E image.
    pairs
        Table of each shapes element, by the element's name.
    panels
        The tables whose totals are those of their own genes.
    """

    name: str
    slide: Slide
    pairs: dict[str, str]
    panels: frozenset[str] = frozenset()

    @property
    def sdata(self) -> SpatialData:
        """The object."""
        return self.slide.sdata

    def tables(
        self, genes: Sequence[str] | None = None, *, layer: str | None = None, total_key: str | None = None
    ) -> dict[str, MeasuredTable]:
        """Read and validate the table of each shapes element, once each; of some genes, or of all."""
        sdata = self.slide.sdata
        found = {
            key: MeasuredTable.read(sdata.tables[key], key, layer, total_key, key in self.panels)
            for key in dict.fromkeys(self.pairs.values())
        }
        if genes is not None:
            found = {key: table.select(genes) for key, table in found.items()}
        return {shapes: found[key] for shapes, key in self.pairs.items()}


def open_measured(
    objects: Mapping[str, SpatialData],
    image_key: str | None = None,
    shapes: str | Sequence[str] | None = None,
    table_key: str | Sequence[str] | None = None,
    total_key: str | None = None,
    mask_key: str | Literal[False] | None = None,
    totals: Totals | None = None,
) -> list[MeasuredSlide]:
    """Resolve names in every object, without reading a pixel; ``shapes[i]`` pairs with ``table_key[i]``.

    ``totals`` says of which tables the totals are those of their own genes (see `pixnet.tl.train`).

    Raises
    ------
    KeyError
        If an image, or every one of the shapes or tables named, is missing in an object.
    ValueError
        If a pixel size is unknown, a name is ambiguous, or totals could not be compared.
    """
    shapes = [shapes] if isinstance(shapes, str) else shapes
    table_key = [table_key] if isinstance(table_key, str) else table_key
    if shapes is not None and table_key is not None and len(shapes) != len(table_key):
        raise ValueError(
            f"shapes has {len(shapes)} names and table_key {len(table_key)}; shapes[i] pairs with table_key[i]"
        )
    found = []
    for name, sdata in objects.items():
        pairs = _pairs(sdata, name, shapes, table_key)
        panels = frozenset(table for table in pairs.values() if _is_panel(totals, name, table))
        found.append(MeasuredSlide(name, Slide.open(sdata, image_key, mask_key), pairs, panels))
    _check_totals_known(totals, found)
    columns = {
        f"{table} of object {m.name}": m.sdata.tables[table].n_vars
        for m in found
        for table in m.pairs.values()
        if table not in m.panels
    }
    check_totals_alike(columns, total_key)
    return found


def _is_panel(totals: Totals | None, name: str, table: str) -> bool:
    """Whether the total of a table is that of its own genes, as it or its object is named in ``totals``."""
    if isinstance(totals, Mapping):
        totals = totals.get(name, totals.get(table, "all"))
    if totals not in (None, "all", "panel"):
        raise ValueError(f"totals has {totals!r}; valid: 'all', 'panel', or a dict of these by object or table")
    return totals == "panel"


def _check_totals_known(totals: Totals | None, found: Sequence[MeasuredSlide]) -> None:
    """Refuse names that are neither an object nor a table."""
    if isinstance(totals, Mapping):
        known = {*(m.name for m in found), *(table for m in found for table in m.pairs.values())}
        unknown = [key for key in totals if key not in known]
        if unknown:
            raise KeyError(
                f"totals names {unknown[0]!r}, which is neither an object nor a table: {listed(sorted(known))}"
            )


def _pairs(
    sdata: SpatialData, name: str, shapes: Sequence[str] | None, table_key: Sequence[str] | None
) -> dict[str, str]:
    """Return the table of each shapes element of an object."""
    pairs: dict[str, str] = {}
    if shapes is None and table_key is None:
        only = resolve_shapes(sdata)[0]
        return {only: resolve_table(sdata, None, only)}
    if shapes is None:
        for key in table_key or ():
            regions = annotated_regions(sdata.tables[resolve_table(sdata, key)])
            if len(regions) != 1:
                raise ValueError(f"table {key!r} annotates {listed(regions)}; name the shapes with shapes=")
            pairs[resolve_shapes(sdata, regions[0])[0]] = key
        return pairs
    here = [*sdata.shapes, *sdata.labels]
    for i, key in enumerate(shapes):
        table = None if table_key is None else table_key[i]
        # With several scales, an object takes part with those that it has.
        if len(shapes) > 1 and (key not in here or (table is not None and table not in sdata.tables)):
            continue
        resolve_shapes(sdata, [key])
        pairs[key] = resolve_table(sdata, table, key)
    if not pairs:
        raise KeyError(f"object {name!r} has none of shapes={listed(shapes)} with a table; it has: {listed(here)}")
    return pairs


def open_section(
    measured: MeasuredSlide, tables: Mapping[str, MeasuredTable], model_mpp: float, stride: int
) -> Section:
    """Open a slide for training: its shapes are moved into the model's grid; pixels stay where they are."""
    slide = measured.slide
    grid = slide.grid(model_mpp, stride)
    targets = []
    for shapes_key, table in tables.items():
        rows = match_rows(slide.sdata, measured.pairs[shapes_key], shapes_key)
        here = np.flatnonzero(rows >= 0)
        shapes = pixel_shapes(slide.sdata, shapes_key, slide.key).take(rows[here]).transform(grid.to_out)
        umi = table.total[here]
        keep = _usable(f"{measured.name}/{shapes_key}", shapes.bounds, umi, grid.out_shape)
        counts = sparse.csr_array(table.counts[here[keep]])
        targets.append(
            Targets(
                shapes_key, shapes.take(keep), counts, umi[keep], panel=table.panel, within_panel=table.within_panel
            )
        )
    return Section(measured.name, slide.reader(grid), open_mask(slide, grid.out_px), targets)


def _usable(label: str, bounds: np.ndarray, umi: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Leave out shapes that have no counts or reach over the image's edge, and say how many."""
    x0, y0, x1, y1 = bounds.T if len(bounds) else np.zeros((4, 0))
    outside = (x0 < 0) | (y0 < 0) | (x1 > size[1]) | (y1 > size[0])
    empty = umi <= 0
    if outside.any():
        logger.info("%s: %d shapes reach outside the image and are left out", label, int(outside.sum()))
        if outside.mean() > 0.5:
            logger.warning(
                "%s: most shapes lie outside the image; do the shapes and the image share one coordinate system?", label
            )
    if (empty & ~outside).any():
        logger.info("%s: %d shapes have no counts and are left out", label, int((empty & ~outside).sum()))
    return np.flatnonzero(~outside & ~empty)
