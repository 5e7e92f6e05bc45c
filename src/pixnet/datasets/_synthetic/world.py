"""One synthetic tissue: its picture and its expression, any part of either."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet.datasets._synthetic import paint
from pixnet.datasets._synthetic.cells import CORNERS, GLAND_LOOK, TYPES, VESSEL_LOOK, build, noise_seed_of
from pixnet.datasets._synthetic.fields import is_tissue
from pixnet.datasets._synthetic.genes import Panel
from pixnet.datasets._synthetic.rounds import Rounds, outlines, reach

TRUTH_UM = 2.0
# Expression is computed in squares of this many truth pixels, always the same ones: sums never depend on the part.
SQUARE = 128
_KEPT_SQUARES = 48
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TissueSpec:
    """The arguments that a tissue is made from; equal specifications make equal tissues."""

    size_um: float
    mpp: float
    n_genes: int
    seed: int
    stain_seed: int
    panel_seed: int = 0


@lru_cache(maxsize=2)
def world(spec: TissueSpec) -> World:
    """Build the tissue of a specification, once per process."""
    return World(spec)


class World:
    """A tissue. It pickles as its specification, so that workers of a cluster build their own instead of receiving it."""

    def __init__(self, spec: TissueSpec) -> None:
        self.spec = spec
        self.size = float(spec.size_um)
        self.noise = noise_seed_of(spec.seed)
        self.cells = build(self.size, spec.seed)
        self.stain = paint.Stain.draw(spec.stain_seed)
        self.panel = Panel.draw(spec.n_genes, spec.panel_seed)
        self.image_shape = (round(self.size / spec.mpp),) * 2
        self.truth_shape = (int(self.size / TRUTH_UM + 1e-9),) * 2
        self.amounts = self.panel.amounts(self.cells, spec.seed)
        self.scale = self._scale()
        self.square = lru_cache(maxsize=_KEPT_SQUARES)(self._square)
        self._reach = np.maximum(self.cells.radii.max(axis=1, initial=0), reach(self.cells.nuclei))

    def __reduce__(self) -> tuple[Any, tuple[TissueSpec]]:
        return world, (self.spec,)

    def render(self, y: slice, x: slice) -> NDArray[np.uint8]:
        """Render a part of the picture, ``uint8 (3, y, x)``; the same pixels whatever the part."""
        mpp, cells, seed = self.spec.mpp, self.cells, self.noise
        margin = int(np.ceil(paint.REACH_UM / mpp)) + 1
        x0, y0 = x.start - margin, y.start - margin
        shape = (y.stop - y.start + 2 * margin, x.stop - x.start + 2 * margin)
        h, e = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
        paint.ground(x0, y0, mpp, self.size, seed, h, e)
        box = (x0 * mpp - 2, y0 * mpp - 2, (x0 + shape[1]) * mpp + 2, (y0 + shape[0]) * mpp + 2)
        for structures, look in ((cells.glands, GLAND_LOOK), (cells.vessels, VESSEL_LOOK)):
            shapes = structures[_near(structures, reach(structures), box)]
            paint.rounds(x0, y0, mpp, seed, shapes, np.full(len(shapes), look), h, e)
        near = _near(cells.nuclei, self._reach, box)
        nuclei, looks = cells.nuclei[near], cells.look[near]
        paint.cytoplasm(x0, y0, mpp, nuclei, cells.radii[near], looks, h, e)
        paint.rounds(x0, y0, mpp, seed, nuclei, looks, h, e)
        pixels = paint.expose(h, e, self.stain, mpp)[margin:-margin, margin:-margin]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def truth(self, y: slice, x: slice) -> NDArray[np.float32]:
        """Compute a part of the dense map, ``(genes + 1, y, x)``: densities, ``__total__`` last, NaN off tissue."""
        out = np.empty((len(self.panel.names) + 1, y.stop - y.start, x.stop - x.start), dtype=np.float32)
        loadings = self.panel.loadings * self.scale
        loadings = np.concatenate([loadings, loadings.sum(axis=0, keepdims=True)]).astype(np.float32)
        for row in range(y.start // SQUARE, -(-y.stop // SQUARE)):
            for col in range(x.start // SQUARE, -(-x.stop // SQUARE)):
                # Whole squares only: a matrix product rounds differently when its size differs.
                values = np.tensordot(loadings, self.square(row, col), axes=1)
                top, left = row * SQUARE, col * SQUARE
                ys = slice(max(y.start, top), min(y.stop, top + SQUARE))
                xs = slice(max(x.start, left), min(x.stop, left + SQUARE))
                part = values[:, ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]
                out[:, ys.start - y.start : ys.stop - y.start, xs.start - x.start : xs.stop - x.start] = part
        return out

    def _square(self, row: int, col: int) -> NDArray[np.float32]:
        """Compute the sources per µm² on one square of truth pixels, ``(sources, SQUARE, SQUARE)``; NaN off tissue."""
        step = SQUARE * TRUTH_UM
        near = _near(self.cells.nuclei, self._reach, (col * step, row * step, (col + 1) * step, (row + 1) * step))
        amounts = self.amounts[near]
        parts = []
        for polygons in (self.nuclei(near), self.outlines(near)):
            shapes = ShapeArrays.from_geometries(polygons).transform(np.diag([1 / TRUTH_UM, 1 / TRUTH_UM, 1.0]))
            weights = coverage(shapes, (row * SQUARE, col * SQUARE, SQUARE, SQUARE))
            # A cell's amount is spread evenly: per µm² of its own area.
            density = amounts / (shapes.area * TRUTH_UM**2)[:, None] if len(near) else amounts
            parts.append(np.asarray(weights.T @ density).T)
        sources = np.concatenate([*parts, np.ones((1, SQUARE * SQUARE))]).reshape(-1, SQUARE, SQUARE)
        y, x = (np.arange(at * SQUARE, (at + 1) * SQUARE) * TRUTH_UM + TRUTH_UM / 2 for at in (row, col))
        x, y = np.meshgrid(x, y)
        tissue = is_tissue(x.ravel(), y.ravel(), self.size, self.noise).reshape(SQUARE, SQUARE)
        tissue &= (x < self.size) & (y < self.size)
        sources = sources.astype(np.float32)
        sources[:, ~tissue] = np.nan
        return sources

    def _scale(self) -> float:
        """Return the factor by which densities average 10,000 over the tissue."""
        step = 8.0
        places = (np.arange(int(self.size / step)) + 0.5) * step
        x, y = (part.ravel() for part in np.meshgrid(places, places))
        area = float(is_tissue(x, y, self.size, self.noise).sum()) * step**2
        amounts = self.amounts.sum(axis=0)
        whole = float((self.panel.loadings @ np.concatenate([amounts, amounts, [area]])).sum())
        return 1e4 * max(area, step**2) / max(whole, 1e-9)

    def nuclei(self, which: NDArray[np.int64]) -> NDArray[np.object_]:
        """Return nuclei as polygons, in µm."""
        x, y = outlines(self.cells.nuclei[which], 2 * np.pi * np.arange(24) / 24)
        return shapely.polygons(np.stack([x, y], axis=-1))

    def outlines(self, which: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.object_]:
        """Return cells as polygons that do not overlap, in µm."""
        centres, radii = self.cells.nuclei[which], self.cells.radii[which]
        turn = 2 * np.pi * np.arange(CORNERS) / CORNERS
        x, y = centres["x"][:, None] + radii * np.cos(turn), centres["y"][:, None] + radii * np.sin(turn)
        return shapely.polygons(np.stack([x, y], axis=-1))

    def cell_types(self) -> NDArray[np.str_]:
        """Return the name of the type of each cell."""
        return np.array(TYPES)[self.cells.kind]


def _near(rounds: Rounds, far: NDArray[np.float64], box: Box) -> NDArray[np.int64]:
    """Return the positions of what may reach into a box (µm)."""
    x, y = rounds["x"], rounds["y"]
    return np.flatnonzero((x + far > box[0]) & (x - far < box[2]) & (y + far > box[1]) & (y - far < box[3]))


class WorldArray:
    """The picture or the map as an array-like, for dask."""

    ndim = 3

    def __init__(self, source: World, what: str) -> None:
        self.source = source
        self.what = what
        rows, cols = source.image_shape if what == "render" else source.truth_shape
        self.shape = (3 if what == "render" else len(source.panel.names) + 1, rows, cols)
        self.dtype = np.dtype(np.uint8 if what == "render" else np.float32)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> NDArray[Any]:
        c, y, x = index
        y, x = (slice(*part.indices(size)[:2]) for part, size in zip((y, x), self.shape[1:]))
        return getattr(self.source, self.what)(y, x)[c]
