"""One synthetic tissue: its picture and its expression, any part of either when asked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pixnet._core.coverage import ShapeArrays, coverage
from pixnet.datasets._synthetic import paint
from pixnet.datasets._synthetic.cells import ANGLES, TYPES, Cells, build, noise_seed_of
from pixnet.datasets._synthetic.fields import sample
from pixnet.datasets._synthetic.genes import Panel

TRUTH_UM = 2.0
# Expression is worked out in squares of this many truth pixels, always the same ones: sums then never depend on the part.
SQUARE = 128
_KEPT_SQUARES = 48


@dataclass(frozen=True)
class Recipe:
    """What a tissue is made from; two equal recipes make equal tissues."""

    size_um: float
    mpp: float
    n_genes: int
    seed: int
    stain_seed: int
    panel_seed: int = 0


@lru_cache(maxsize=2)
def world(recipe: Recipe) -> World:
    """Build the tissue of a recipe, once a process."""
    return World(recipe)


class World:
    """A tissue. It pickles as its recipe, so that workers of a cluster build their own instead of receiving it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.size = float(recipe.size_um)
        self.noise = noise_seed_of(recipe.seed)
        self.cells: Cells = build(self.size, recipe.seed)
        self.stain = paint.Stain.draw(recipe.stain_seed)
        self.panel = Panel.draw(recipe.n_genes, recipe.panel_seed)
        self.image_shape = (round(self.size / recipe.mpp),) * 2
        self.truth_shape = (int(self.size / TRUTH_UM + 1e-9),) * 2
        self.amounts = self.panel.amounts(self.cells, recipe.seed)
        self._squares: OrderedDict[tuple[int, int], NDArray] = OrderedDict()
        self._lock = threading.Lock()
        reach = np.concatenate([self.cells.outline[:, 2:], self.cells.nuclei.shape[:, 2:4] * 1.35], axis=1).max(
            axis=1, initial=0
        )
        place = self.cells.outline[:, :2]
        self._bounds = np.column_stack([place - reach[:, None], place + reach[:, None]])
        self.scale = self._scale()

    def __reduce__(self) -> tuple[Any, tuple[Recipe]]:
        return world, (self.recipe,)

    # the picture -------------------------------------------------------------------------------------------------

    def render(self, y: slice, x: slice) -> NDArray[np.uint8]:
        """Render a part of the picture, ``uint8 (3, y, x)``; the same pixels whatever the part."""
        mpp, cells = self.recipe.mpp, self.cells
        top, left = (part.start // paint.BLOCK * paint.BLOCK for part in (y, x))
        bottom, right = (-(-part.stop // paint.BLOCK) * paint.BLOCK for part in (y, x))
        margin = -(-max(16, int(np.ceil(3 / mpp))) // paint.BLOCK) * paint.BLOCK
        y0, x0 = top - margin, left - margin
        height, width = bottom - top + 2 * margin, right - left + 2 * margin
        h, e, light = (np.empty((height, width), dtype=np.float32) for _ in range(3))
        paint.ground(x0, y0, height, width, mpp, self.size, self.noise, h, e, light)
        box = (x0 * mpp - 2, y0 * mpp - 2, (x0 + width) * mpp + 2, (y0 + height) * mpp + 2)
        paint.glands(x0, y0, mpp, self.noise, _near(cells.glands, box, 1.0), h, e)
        paint.vessels(x0, y0, mpp, self.noise, _near(cells.vessels, box, 2.0), h, e)
        near = self._near(box)
        paint.cytoplasm(x0, y0, mpp, cells.outline[near], cells.tint[near], h, e)
        for things in (cells.red.near(*box), cells.nuclei.take(near)):
            paint.blobs(x0, y0, mpp, self.noise, things.shape, things.look, things.tags, h, e)
        inner = (slice(margin, margin + bottom - top), slice(margin, margin + right - left))
        pixels = paint.expose(h, e, light, self.stain, x0, y0, mpp, self.noise, inner)
        pixels = paint.compress(pixels)
        return np.ascontiguousarray(
            pixels[y.start - top : y.stop - top, x.start - left : x.stop - left].transpose(2, 0, 1)
        )

    # the expression ----------------------------------------------------------------------------------------------

    def tissue(self, row: int, col: int) -> NDArray[np.bool_]:
        """Whether the truth pixels of one square are tissue."""
        rows, cols = (np.arange(at * SQUARE, (at + 1) * SQUARE) * TRUTH_UM + TRUTH_UM / 2 for at in (row, col))
        places = np.meshgrid(cols, rows)
        found = sample(0, places[0].ravel(), places[1].ravel(), self.size, self.noise) > 0
        found &= (places[0].ravel() < self.size) & (places[1].ravel() < self.size)
        return found.reshape(SQUARE, SQUARE)

    def square(self, row: int, col: int) -> NDArray[np.float32]:
        """Compute the sources per um^2 on one square of truth pixels, ``(sources, SQUARE, SQUARE)``; NaN off tissue."""
        with self._lock:
            if (row, col) in self._squares:
                self._squares.move_to_end((row, col))
                return self._squares[row, col]
        step = SQUARE * TRUTH_UM
        near = self._near((col * step, row * step, (col + 1) * step, (row + 1) * step))
        window = (row * SQUARE, col * SQUARE, SQUARE, SQUARE)
        parts = []
        for polygons, amounts in zip((self.nuclei(near), self.outlines(near)), self.amounts):
            shapes = ShapeArrays.from_geometries(polygons).transform(np.diag([1 / TRUTH_UM, 1 / TRUTH_UM, 1.0]))
            weights = coverage(shapes, window)
            # A cell's amount is spread evenly: per um^2 of its own area.
            density = amounts[near] / (shapes.area * TRUTH_UM**2)[:, None] if len(near) else amounts[near]
            parts.append(np.asarray(weights.T @ density).T)
        sources = np.concatenate([*parts, np.ones((1, SQUARE * SQUARE))]).reshape(-1, SQUARE, SQUARE)
        sources = sources.astype(np.float32)
        sources[:, ~self.tissue(row, col)] = np.nan
        with self._lock:
            self._squares[row, col] = sources
            while len(self._squares) > _KEPT_SQUARES:
                self._squares.popitem(last=False)
        return sources

    def truth(self, y: slice, x: slice) -> NDArray[np.float32]:
        """Compute a part of the dense map, ``(genes + 1, y, x)``: densities, ``__total__`` last, NaN off tissue."""
        out = np.empty((len(self.panel.names) + 1, y.stop - y.start, x.stop - x.start), dtype=np.float32)
        loadings = self.loadings
        for row in range(y.start // SQUARE, -(-y.stop // SQUARE)):
            for col in range(x.start // SQUARE, -(-x.stop // SQUARE)):
                square = self.square(row, col)
                top, left = row * SQUARE, col * SQUARE
                ys = slice(max(y.start, top), min(y.stop, top + SQUARE))
                xs = slice(max(x.start, left), min(x.stop, left + SQUARE))
                part = square[:, ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]
                values = np.tensordot(loadings, part, axes=1)
                out[:, ys.start - y.start : ys.stop - y.start, xs.start - x.start : xs.stop - x.start] = values
        return out

    @property
    def loadings(self) -> NDArray[np.float32]:
        """Densities of genes, and of all of them, per unit of each source: ``(genes + 1, sources)``."""
        loadings = self.panel.loadings * self.scale
        return np.concatenate([loadings, loadings.sum(axis=0, keepdims=True)]).astype(np.float32)

    def _scale(self) -> float:
        """Densities average 10,000 over the tissue."""
        step = 8.0
        places = (np.arange(int(self.size / step)) + 0.5) * step
        x, y = (part.ravel() for part in np.meshgrid(places, places))
        area = float((sample(0, x, y, self.size, self.noise) > 0).sum()) * step**2
        sources = np.concatenate([*(amounts.sum(axis=0) for amounts in self.amounts), [area]])
        whole = float((self.panel.loadings @ sources).sum())
        return 1e4 * max(area, step**2) / max(whole, 1e-9)

    # shapes ------------------------------------------------------------------------------------------------------

    def nuclei(self, which: NDArray[np.int64] | slice = slice(None)) -> NDArray:
        """Nuclei as polygons, in um."""
        shape = self.cells.nuclei.shape[which]
        turn = 2 * np.pi * np.arange(24) / 24
        outline = 1 + sum(
            shape[:, 5 + 2 * i, None] * np.cos(k * turn + shape[:, 6 + 2 * i, None]) for i, k in enumerate((2, 3, 5))
        )
        u, v = shape[:, 2, None] * outline * np.cos(turn), shape[:, 3, None] * outline * np.sin(turn)
        c, s = np.cos(shape[:, 4, None]), np.sin(shape[:, 4, None])
        return shapely.polygons(np.stack([shape[:, :1] + c * u - s * v, shape[:, 1:2] + s * u + c * v], axis=-1))

    def outlines(self, which: NDArray[np.int64] | slice = slice(None)) -> NDArray:
        """Cells as polygons that do not overlap, in um."""
        outline = self.cells.outline[which]
        turn = 2 * np.pi * np.arange(ANGLES) / ANGLES
        x, y = (outline[:, i, None] + outline[:, 2:] * f(turn) for i, f in enumerate((np.cos, np.sin)))
        return shapely.polygons(np.stack([x, y], axis=-1))

    def cell_types(self) -> NDArray[np.str_]:
        """Name of the type of each cell."""
        return np.array(TYPES)[self.cells.kind]

    def _near(self, box: tuple[float, float, float, float]) -> NDArray[np.int64]:
        b = self._bounds
        return np.flatnonzero((b[:, 2] > box[0]) & (b[:, 0] < box[2]) & (b[:, 3] > box[1]) & (b[:, 1] < box[3]))


def _near(shapes: NDArray, box: tuple[float, float, float, float], factor: float) -> NDArray:
    reach = 1.35 * factor * np.maximum(shapes[:, 2], shapes[:, 3])
    x, y = shapes[:, 0], shapes[:, 1]
    return shapes[(x + reach > box[0]) & (x - reach < box[2]) & (y + reach > box[1]) & (y - reach < box[3])]


class WorldArray:
    """The picture or the map as an array-like, for dask."""

    ndim = 3

    def __init__(self, source: World, what: str) -> None:
        self.source = source
        self.what = what
        rows, cols = source.image_shape if what == "render" else source.truth_shape
        self.shape = (3 if what == "render" else len(source.panel.names) + 1, rows, cols)
        self.dtype = np.dtype(np.uint8 if what == "render" else np.float32)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> NDArray:
        c, y, x = index
        y, x = (slice(*part.indices(size)[:2]) for part, size in zip((y, x), self.shape[1:]))
        return getattr(self.source, self.what)(y, x)[c]
