"""The cells of a synthetic tissue: what lies where, of which type, with which nucleus and outline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pixnet._core.coverage.jit import jit
from pixnet.datasets._synthetic.fields import FAT, GLAND, LYMPHOID, STROMA, TUMOUR, sample
from pixnet.datasets._synthetic.paint import Objects, place_in

TYPES = (
    "epithelial",
    "tumour",
    "fibroblast",
    "T cell",
    "B cell",
    "plasma cell",
    "macrophage",
    "endothelial",
    "smooth muscle",
    "adipocyte",
)
EPI, TUM, FIB, TCELL, BCELL, PLASMA, MACRO, ENDO, MUSCLE, ADIPO = range(10)

# By type: semi-axes of the nucleus (um), their spread, waves of its outline; semi-axes of the cell; room it claims.
_SIZE = np.array(
    [
        # a    b    sd    wave  cell a b   room
        [4.3, 2.7, 0.10, 0.04, 9.5, 4.2, 2.45],
        [5.0, 4.0, 0.20, 0.08, 8.0, 7.0, 3.6],
        [6.6, 1.6, 0.18, 0.06, 11.0, 3.6, 2.8],
        [2.9, 2.7, 0.07, 0.03, 3.8, 3.6, 2.4],
        [3.1, 2.9, 0.07, 0.03, 4.1, 3.9, 2.6],
        [3.0, 2.8, 0.08, 0.03, 6.4, 4.6, 3.6],
        [4.4, 2.9, 0.15, 0.10, 8.0, 6.5, 4.4],
        [5.2, 1.3, 0.15, 0.04, 7.5, 2.4, 2.0],
        [7.6, 1.5, 0.12, 0.03, 12.0, 3.0, 3.0],
        [4.2, 1.3, 0.15, 0.04, 7.0, 2.2, 3.0],
    ]
)
# By type: haematoxylin, eosin of the nucleus, contrast, rim, nucleoli, clump size; tint of the cytoplasm (h, e, border).
_LOOK = np.array(
    [
        [0.78, 0.20, 0.28, 0.30, 1, 1.5, 0.0, 0.0, 0.30],
        [0.62, 0.18, 0.38, 0.50, 2, 1.6, 0.02, 0.03, 0.35],
        [0.88, 0.22, 0.18, 0.10, 0, 1.2, 0.0, 0.04, 0.0],
        [1.25, 0.20, 0.22, 0.10, 0, 1.0, 0.03, 0.0, 0.20],
        [1.05, 0.20, 0.30, 0.18, 0, 1.2, 0.04, 0.0, 0.20],
        [1.10, 0.20, 0.42, 0.15, 0, 1.3, 0.20, 0.10, 0.25],
        [0.62, 0.18, 0.25, 0.35, 1, 1.4, -0.02, 0.06, 0.25],
        [1.00, 0.22, 0.15, 0.10, 0, 1.1, 0.0, 0.06, 0.0],
        [0.80, 0.24, 0.15, 0.12, 0, 1.3, 0.0, 0.08, 0.0],
        [0.95, 0.20, 0.15, 0.10, 0, 1.1, 0.0, 0.05, 0.0],
    ]
)
CANDIDATES = 80_000  # per mm^2, of which most find no room where cells are dense
ANGLES = 20  # corners of a cell's outline


@dataclass(frozen=True)
class Cells:
    """Cells and the structures they line.

    Attributes
    ----------
    kind
        Type of each cell, a position in ``TYPES``.
    nuclei
        What is painted of them.
    outline
        x, y of the cell's centre and its radii at ``ANGLES`` equal angles, um.
    tint
        Of the cytoplasm: haematoxylin, eosin, paleness of the border.
    hypoxia
        0 to 1 at the cell.
    glands, vessels
        Outlines, and in the last column where the lumen ends or the wall ends.
    red
        Red blood cells.
    """

    kind: NDArray[np.int64]
    nuclei: Objects
    outline: NDArray[np.float64]
    tint: NDArray[np.float64]
    hypoxia: NDArray[np.float64]
    glands: NDArray[np.float64]
    vessels: NDArray[np.float64]
    red: Objects


def build(size: float, seed: int) -> Cells:
    """Build the cells of a tissue of ``size`` um."""
    rng = np.random.default_rng([seed, 101])
    noise_seed = noise_seed_of(seed)
    glands = _glands(rng, size, noise_seed)
    vessels = _vessels(rng, size, noise_seed, glands)
    lining = _lining(rng, glands, vessels)
    loose = _loose(rng, size, noise_seed, glands, vessels)
    x, y, kind, angle = (np.concatenate(parts) for parts in zip(lining, loose))
    within = sample(0, x, y, size, noise_seed) > 4
    x, y, kind, angle = (values[within] for values in (x, y, kind, angle))
    kept = _apart(x, y, _SIZE[kind, 6], size)
    x, y, kind, angle = (values[kept] for values in (x, y, kind, angle))
    # By place, so that what is near in the picture is near in the tables.
    order = np.lexsort([x, np.floor(y / 64)])
    x, y, kind, angle = (values[order] for values in (x, y, kind, angle))

    lack = sample(5, x, y, size, noise_seed)
    n = len(x)
    size_of = _SIZE[kind]
    grow = np.exp(rng.normal(0, 1, n) * size_of[:, 2]) * (1 - 0.22 * lack)
    stretch = np.exp(rng.normal(0, 0.5, n) * size_of[:, 2])
    waves = np.abs(rng.normal(0, 1, (n, 3))) * size_of[:, 3, None] * [0.7, 1.0, 0.5]
    phases = rng.uniform(0, 2 * np.pi, (n, 3))
    shape = np.column_stack(
        [x, y, size_of[:, 0] * grow * stretch, size_of[:, 1] * grow / stretch, angle]
        + [part for i in range(3) for part in (waves[:, i], phases[:, i])]
    )
    look = _LOOK[kind, :6].copy()
    look[:, 0] *= np.exp(rng.normal(0, 0.14, n)) * (1 + 0.5 * lack)
    dividing = (kind == TUM) & (rng.random(n) < 0.012)
    look[dividing, 0], look[dividing, 4], look[dividing, 2] = 1.9, 0, 0.5
    shape[dividing, 3] *= 0.45
    tint = _LOOK[kind, 6:9] * np.exp(rng.normal(0, 0.3, n))[:, None]
    tint[:, 1] += rng.normal(0, 0.035, n) * np.isin(kind, [TUM, MACRO])
    outline = _outlines(x, y, kind, angle, rng)
    red = _red_cells(rng, vessels)
    nuclei = Objects(shape, look, np.arange(n))
    return Cells(kind, nuclei, outline, tint, lack, glands, vessels, red)


def noise_seed_of(seed: int) -> int:
    """Seed of the fields: their octaves use neighbouring numbers, so seeds are kept apart."""
    return (seed + 1) * 1009


def _lattice(rng: np.random.Generator, size: float, pitch: float, jitter: float) -> tuple[NDArray, NDArray]:
    n = int(size / pitch) + 1
    row, col = (index.ravel() for index in np.indices((n, n)))
    x = (col + 0.5 * (row % 2) + 0.3) * pitch + rng.uniform(-jitter, jitter, row.size)
    y = (row + 0.3) * pitch * 0.9 + rng.uniform(-jitter, jitter, row.size)
    return x, y


def _round(rng: np.random.Generator, x: NDArray, y: NDArray, radius: NDArray, flat: float, wave: float) -> NDArray:
    n = len(x)
    ratio = rng.uniform(flat, 1, n)
    columns = [x, y, radius / np.sqrt(ratio), radius * np.sqrt(ratio), rng.uniform(0, np.pi, n)]
    for part in (0.5, 1.0, 0.6):
        columns += [rng.uniform(0, wave * part, n), rng.uniform(0, 2 * np.pi, n)]
    return np.column_stack(columns)


def _glands(rng: np.random.Generator, size: float, seed: int) -> NDArray:
    x, y = _lattice(rng, size, 88.0, 10.0)
    radius, lumen = rng.uniform(22, 37, len(x)), rng.uniform(0.26, 0.52, len(x))
    shapes = np.column_stack([_round(rng, x, y, radius, 0.62, 0.10), lumen])
    kind, edge, within = (sample(what, x, y, size, seed) for what in (1, 2, 0))
    return shapes[(kind == GLAND) & (edge > 14) & (within > 50)]


def _vessels(rng: np.random.Generator, size: float, seed: int, glands: NDArray) -> NDArray:
    x, y = _lattice(rng, size, 170.0, 50.0)
    radius = np.exp(rng.uniform(np.log(4.5), np.log(24), len(x)))
    wall = 1 + np.clip(rng.uniform(3, 6, len(x)) / radius + rng.uniform(0, 0.25, len(x)), 0.25, 1.0)
    shapes = np.column_stack([_round(rng, x, y, radius, 0.5, 0.08), wall])
    kind, within = (sample(what, x, y, size, seed) for what in (1, 0))
    keep = (kind != FAT) & (within > 45)
    if len(glands):
        room = cKDTree(glands[:, :2]).query(shapes[:, :2])[0]
        keep &= room > 50 + 1.6 * radius
    return shapes[keep]


def _ring(
    rng: np.random.Generator, shapes: NDArray, at: float, spacing: float, radial: bool, wobble: float
) -> tuple[NDArray, NDArray, NDArray]:
    """Places along an outline at a share ``at`` of it, ``spacing`` um apart, and the angle across or along it."""
    xs, ys, angles = [], [], []
    for shape in shapes:
        turn = np.linspace(0, 2 * np.pi, 241)
        outline = sum(shape[5 + 2 * i] * np.cos(k * turn + shape[6 + 2 * i]) for i, k in enumerate((2, 3, 5)))
        u, v = (shape[2 + i] * (1 + outline) * at * f(turn) for i, f in enumerate((np.cos, np.sin)))
        c, s = math.cos(shape[4]), math.sin(shape[4])
        px, py = shape[0] + c * u - s * v, shape[1] + s * u + c * v
        length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(px), np.diff(py)))])
        n = max(3, int(length[-1] / spacing))
        wanted = (np.arange(n) + rng.uniform(-0.2, 0.2, n) + 0.5) / n * length[-1]
        tangent = np.arctan2(np.gradient(py), np.gradient(px))
        where = np.interp(wanted, length, np.arange(241))
        near = np.clip(np.rint(where).astype(int), 0, 240)
        normal = tangent[near] + np.pi / 2
        push = rng.normal(0, wobble, n)
        xs.append(np.interp(where, np.arange(241), px) + push * np.cos(normal))
        ys.append(np.interp(where, np.arange(241), py) + push * np.sin(normal))
        angles.append((normal if radial else tangent[near]) + rng.normal(0, 0.12, n))
    if not xs:
        return np.empty(0), np.empty(0), np.empty(0)
    return np.concatenate(xs), np.concatenate(ys), np.concatenate(angles)


def _lining(rng: np.random.Generator, glands: NDArray, vessels: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    rings = [(EPI, _ring(rng, glands, 0.83, 5.4, True, 0.9)), (ENDO, _ring(rng, vessels, 1.07, 15.0, False, 0.2))]
    thick = vessels[(vessels[:, 11] - 1) * np.minimum(vessels[:, 2], vessels[:, 3]) > 4.5]
    rings.append((MUSCLE, _ring(rng, thick, 1.32, 13.0, False, 0.8)))
    x, y, angle = (np.concatenate([ring[i] for _, ring in rings]) for i in range(3))
    kind = np.concatenate([np.full(len(ring[0]), name) for name, ring in rings])
    return x, y, kind, angle


def _loose(
    rng: np.random.Generator, size: float, seed: int, glands: NDArray, vessels: NDArray
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Candidates everywhere, more than there is room for, each of a type that its place decides."""
    n = rng.poisson(CANDIDATES * (size / 1000) ** 2)
    x, y = rng.uniform(0, size, n), rng.uniform(0, size, n)
    take = sample(0, x, y, size, seed) > 4
    take &= _outside(x, y, glands, 1.10, False) & _outside(x, y, vessels, 1.0, True)
    x, y = x[take], y[take]
    n = len(x)
    kind_of_zone, edge, nest = (sample(what, x, y, size, seed) for what in (1, 2, 3))
    chance, kind = rng.random(n), np.full(n, -1)

    def settle(where: NDArray, densities: dict[int, float]) -> None:
        low = np.zeros(n)
        for name, density in densities.items():
            high = low + density / CANDIDATES
            kind[where & (chance >= low) & (chance < high)] = name
            low = high

    septum = edge < 9
    stroma = (kind_of_zone == STROMA) | septum
    settle(stroma, {FIB: 2900, TCELL: 480, MACRO: 260, PLASMA: 140})
    settle((kind_of_zone == GLAND) & ~septum, {FIB: 3000, PLASMA: 1500, TCELL: 1300, MACRO: 450})
    tumour = (kind_of_zone == TUMOUR) & ~septum
    settle(tumour & (nest > 1), {TUM: 45_000, TCELL: 700, MACRO: 300})
    settle(tumour & (nest <= 1), {FIB: 4200, TCELL: 1900, MACRO: 500})
    lymphoid = (kind_of_zone == LYMPHOID) & ~septum
    core = np.clip((edge - 45) / 12, 0, 1) > rng.random(n)
    settle(lymphoid & core, {BCELL: 70_000, MACRO: 1500, TCELL: 3500})
    settle(lymphoid & ~core, {TCELL: 62_000, BCELL: 6000, PLASMA: 2000, MACRO: 900, FIB: 1500})
    wall = sample(6, x, y, size, seed)
    settle((kind_of_zone == FAT) & ~septum & (wall < 1.6), {ADIPO: 5_000, MACRO: 900, ENDO: 1500})
    # Lymphocytes leave their aggregates.
    stray = stroma & (kind_of_zone == LYMPHOID) & (rng.random(n) < 0.06)
    kind[stray] = TCELL
    keep = kind >= 0
    x, y, kind = x[keep], y[keep], kind[keep]
    angle = rng.uniform(0, np.pi, len(x))
    lies = np.isin(kind, [FIB, MUSCLE, ADIPO, ENDO])
    angle[lies] = sample(4, x[lies], y[lies], size, seed) + rng.normal(0, 0.22, int(lies.sum()))
    return x, y, kind, angle


def _outside(x: NDArray, y: NDArray, shapes: NDArray, factor: float, times_wall: bool) -> NDArray[np.bool_]:
    free = np.ones(len(x), dtype=bool)
    if not len(shapes) or not len(x):
        return free
    limit = factor * (shapes[:, 11] if times_wall else np.ones(len(shapes)))
    reach = 1.35 * np.maximum(shapes[:, 2], shapes[:, 3]) * limit
    order = np.argsort(y, kind="stable")
    low, high = (np.searchsorted(y, shapes[:, 1] + side * reach, sorter=order) for side in (-1, 1))
    for shape, far, within, start, stop in zip(shapes, reach, limit, low, high):
        _mark(shape, far, within, order[start:stop], x, y, free)
    return free


@jit
def _mark(shape, far, within, index, x, y, free):
    """Mark the points that lie in a round thing."""
    for i in index:
        if abs(x[i] - shape[0]) < far and place_in(shape, x[i], y[i]) < within:
            free[i] = False


@jit
def _accept(x, y, room, size, kept):
    """Take candidates in order wherever there is room left."""
    bucket = 10.0
    n = int(size / bucket) + 2
    head = np.full((n, n), -1, dtype=np.int64)
    link = np.full(len(x), -1, dtype=np.int64)
    for k in range(len(x)):
        i, j = int(y[k] / bucket), int(x[k] / bucket)
        free = True
        for di in range(max(0, i - 1), min(n, i + 2)):
            for dj in range(max(0, j - 1), min(n, j + 2)):
                other = head[di, dj]
                while other >= 0:
                    if math.hypot(x[k] - x[other], y[k] - y[other]) < room[k] + room[other]:
                        free = False
                        break
                    other = link[other]
                if not free:
                    break
            if not free:
                break
        if free:
            kept[k] = True
            link[k] = head[i, j]
            head[i, j] = k


def _apart(x: NDArray, y: NDArray, room: NDArray, size: float) -> NDArray[np.bool_]:
    kept = np.zeros(len(x), dtype=bool)
    _accept(np.clip(x, 0, size), np.clip(y, 0, size), room, size, kept)
    return kept


def _outlines(x: NDArray, y: NDArray, kind: NDArray, angle: NDArray, rng: np.random.Generator) -> NDArray:
    """Cell outlines: an ellipse by type, cut where the neighbour is nearer, so that cells never overlap."""
    n = len(x)
    turn = 2 * np.pi * np.arange(ANGLES) / ANGLES
    c, s = np.cos(turn), np.sin(turn)
    if n == 0:
        return np.empty((0, 2 + ANGLES))
    a, b = (_SIZE[kind, 4 + i, None] * np.exp(rng.normal(0, 0.1, n))[:, None] for i in range(2))
    local = turn[None, :] - angle[:, None]
    radii = 1 / np.sqrt((np.cos(local) / a) ** 2 + (np.sin(local) / b) ** 2)
    points = np.column_stack([x, y])
    tree = cKDTree(points)
    k = min(13, n)
    for start in range(0, n, 50_000):
        part = slice(start, min(start + 50_000, n))
        _, index = tree.query(points[part], k=k)
        for neighbour in range(1, k):
            d = points[index[:, neighbour]] - points[part]
            # The bisector lies at half the distance; along a direction it is met at |d|^2 / 2 / (d . direction).
            ahead = d[:, :1] * c + d[:, 1:] * s
            with np.errstate(divide="ignore"):
                meets = np.where(
                    ahead > 1e-9, 0.5 * (d**2).sum(axis=1, keepdims=True) / np.maximum(ahead, 1e-9), np.inf
                )
            radii[part] = np.minimum(radii[part], meets)
    return np.column_stack([x, y, np.maximum(radii, 0.5)])


def _red_cells(rng: np.random.Generator, vessels: NDArray) -> Objects:
    rows = []
    for shape in vessels:
        if rng.random() < 0.35:
            continue
        fill = rng.uniform(0.2, 0.8)
        n = int(fill * np.pi * shape[2] * shape[3] / 40)
        r, turn = np.sqrt(rng.random(n)) * 0.82, rng.uniform(0, 2 * np.pi, n)
        u, v = shape[2] * r * np.cos(turn), shape[3] * r * np.sin(turn)
        c, s = math.cos(shape[4]), math.sin(shape[4])
        rows.append(np.column_stack([shape[0] + c * u - s * v, shape[1] + s * u + c * v]))
    places = np.concatenate(rows) if rows else np.empty((0, 2))
    n = len(places)
    shapes = _round(rng, places[:, 0], places[:, 1], rng.uniform(2.4, 3.2, n), 0.75, 0.05)
    look = np.tile([0.03, 0.85, 0.1, 0.0, 0.0, 1.5], (n, 1))
    return Objects(shapes, look, np.arange(n))
