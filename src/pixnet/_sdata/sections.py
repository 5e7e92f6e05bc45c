"""From SpatialData objects to the plain arrays that training works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from spatialdata import SpatialData

from pixnet._core.coverage.shapes import ShapeArrays
from pixnet._core.slide.grid import ModelGrid
from pixnet._core.train.crops import Section, Targets
from pixnet._logging import logger
from pixnet._names import listed
from pixnet._sdata.counts import annotated_regions, check_totals_alike, read_counts
from pixnet._sdata.keys import resolve_shapes, resolve_table
from pixnet._sdata.shapes import pixel_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import open_mask


@dataclass(frozen=True)
class Source:
    """One object to train on or to test: its slide, and shapes with the tables measured in them.

    Attributes
    ----------
    name
        The object's name.
    slide
        Its H&E image.
    pairs
        Table of each shapes element that the object has, by the element's name.
    """

    name: str
    slide: Slide
    pairs: dict[str, str]

    @property
    def sdata(self) -> SpatialData:
        """The object."""
        return self.slide.sdata


def resolve_sources(
    objects: dict[str, SpatialData],
    image_key: str | None,
    shapes: str | Sequence[str] | None,
    table_key: str | Sequence[str] | None,
    total_key: str | None,
    mask_key: str | Literal[False] | None = None,
) -> list[Source]:
    """Resolve names in every object, without reading a pixel; ``shapes[i]`` pairs with ``table_key[i]``.

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
    sources, columns = [], {}
    for name, sdata in objects.items():
        source = Source(name, Slide.open(sdata, image_key, mask_key), _pairs(sdata, name, shapes, table_key))
        sources.append(source)
        for table in source.pairs.values():
            columns[f"{table} of object {name}"] = sdata.tables[table].n_vars
    check_totals_alike(columns, total_key)
    return sources


def _pairs(
    sdata: SpatialData, name: str, shapes: Sequence[str] | None, table_key: Sequence[str] | None
) -> dict[str, str]:
    if shapes is None and table_key is None:
        only = resolve_shapes(sdata)[0]
        return {only: resolve_table(sdata, None, only)}
    if shapes is None:
        pairs = {}
        for key in table_key or ():
            regions = annotated_regions(sdata.tables[resolve_table(sdata, key)])
            if len(regions) != 1:
                raise ValueError(f"table {key!r} annotates {listed(regions)}; name the shapes with shapes=")
            pairs[resolve_shapes(sdata, regions[0])[0]] = key
        return pairs
    here = [*sdata.shapes, *sdata.labels]
    pairs = {}
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
    source: Source,
    genes: Sequence[str],
    model_mpp: float,
    stride: int,
    *,
    layer: str | None,
    total_key: str | None,
) -> Section:
    """Open one object for training: tables are read and shapes moved into the model's grid; pixels stay where they are."""
    slide, sdata = source.slide, source.sdata
    grid = slide.grid(model_mpp, stride)
    targets = []
    for shapes_key, table_key in source.pairs.items():
        found = read_counts(sdata, table_key, shapes_key, genes, layer=layer, total_key=total_key)
        geometries = pixel_shapes(sdata, shapes_key, slide.key).take(found.rows).transform(grid.to_out)
        targets.append(_usable(source.name, shapes_key, geometries, found.counts, found.total, grid))
    return Section(source.name, slide.reader(grid), open_mask(slide, grid.out_px), targets)


def _usable(
    name: str, key: str, geometries: ShapeArrays, counts: np.ndarray, total: np.ndarray, grid: ModelGrid
) -> Targets:
    """Leave out shapes that have no counts or reach over the image's edge, and say how many."""
    height, width = grid.out_shape
    x0, y0, x1, y1 = geometries.bounds.T if len(geometries) else np.zeros((4, 0))
    outside = (x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height)
    empty = total <= 0
    if outside.any():
        logger.info("%s/%s: %d shapes reach outside the image and train nothing", name, key, int(outside.sum()))
        if outside.mean() > 0.5:
            logger.warning(
                "%s/%s: most shapes lie outside the image; are the coordinates of the shapes and the image those of one frame?",
                name,
                key,
            )
    if (empty & ~outside).any():
        logger.info("%s/%s: %d shapes have no counts and train nothing", name, key, int((empty & ~outside).sum()))
    keep = np.flatnonzero(~outside & ~empty)
    depth = total[keep]
    cp10k = 1e4 * counts[keep] / depth[:, None].astype(np.float32)
    return Targets(key, geometries.take(keep), cp10k.astype(np.float32, copy=False), depth)


def split_block(section: Section, share: float = 0.2) -> tuple[Section, Section]:
    """Cut a section in two by a line across its longer axis; the far part holds ``share`` of its shapes.

    Shapes that straddle the line are in neither part.
    """
    first = section.targets[0].geometries.bounds
    if len(first) < 10:
        raise ValueError(
            f"section {section.name!r} has {len(first)} usable shapes; too few to hold some back for validation: "
            "pass other objects as validation="
        )
    centres = np.stack([first[:, [0, 2]].mean(axis=1), first[:, [1, 3]].mean(axis=1)])
    axis = int(np.argmax(np.ptp(centres, axis=1)))
    line = float(np.quantile(centres[axis], 1 - share))
    near, far = [], []
    for targets in section.targets:
        bounds = targets.geometries.bounds
        near.append(_take(targets, np.flatnonzero(bounds[:, axis + 2] <= line)))
        far.append(_take(targets, np.flatnonzero(bounds[:, axis] >= line)))
    return replace(section, targets=near), replace(section, targets=far)


def _take(targets: Targets, rows: np.ndarray) -> Targets:
    return Targets(targets.name, targets.geometries.take(rows), targets.cp10k[rows], targets.depth[rows])
