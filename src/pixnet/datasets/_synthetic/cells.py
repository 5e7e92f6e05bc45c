"""The cells of a synthetic tissue: their places, types, nuclei and outlines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pixnet._core.coverage.jit import jit
from pixnet.datasets._synthetic.fields import FAT, GLAND, LYMPHOID, STROMA, TUMOUR, describe
from pixnet.datasets._synthetic.rounds import ROUND, Rounds, make_rounds, outlines, place_in

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

# Look of a nucleus and its cytoplasm: stain of the nucleus, contrast of its texture, darkness of its rim; stain that
# the cytoplasm adds to the ground, paleness of its border.
_LOOK = [(name, float) for name in ("h", "e", "contrast", "rim", "tint_h", "tint_e", "border")]
LOOK = np.dtype(_LOOK)
# Semi-axes of the nucleus (µm), their spread, waves of its outline; semi-axes of the cell (µm); radius that the cell
# keeps clear (µm); RNA content; look.
_TRAITS = np.array(
    [
        # a    b    spread wave  cell_a cell_b room  rna   h     e     contr rim   tint_h tint_e border
        (4.3, 2.7, 0.10, 0.04, 9.5, 4.2, 2.45, 1.30, 0.78, 0.20, 0.28, 0.30, 0.0, 0.0, 0.30),
        (5.0, 4.0, 0.20, 0.08, 8.0, 7.0, 3.60, 1.90, 0.62, 0.18, 0.38, 0.50, 0.02, 0.03, 0.35),
        (6.6, 1.6, 0.18, 0.06, 11.0, 3.6, 2.80, 0.80, 0.88, 0.22, 0.18, 0.10, 0.0, 0.04, 0.0),
        (2.9, 2.7, 0.07, 0.03, 3.8, 3.6, 2.40, 0.45, 1.25, 0.20, 0.22, 0.10, 0.03, 0.0, 0.20),
        (3.1, 2.9, 0.07, 0.03, 4.1, 3.9, 2.60, 0.50, 1.05, 0.20, 0.30, 0.18, 0.04, 0.0, 0.20),
        (3.0, 2.8, 0.08, 0.03, 6.4, 4.6, 3.60, 1.20, 1.10, 0.20, 0.42, 0.15, 0.20, 0.10, 0.25),
        (4.4, 2.9, 0.15, 0.10, 8.0, 6.5, 4.40, 1.10, 0.62, 0.18, 0.25, 0.35, -0.02, 0.06, 0.25),
        (5.2, 1.3, 0.15, 0.04, 7.5, 2.4, 2.00, 0.70, 1.00, 0.22, 0.15, 0.10, 0.0, 0.06, 0.0),
        (7.6, 1.5, 0.12, 0.03, 12.0, 3.0, 3.00, 0.80, 0.80, 0.24, 0.15, 0.12, 0.0, 0.08, 0.0),
        (4.2, 1.3, 0.15, 0.04, 7.0, 2.2, 3.00, 0.70, 0.95, 0.20, 0.15, 0.10, 0.0, 0.05, 0.0),
    ],
    dtype=[(name, float) for name in ("a", "b", "spread", "wave", "cell_a", "cell_b", "room", "rna")] + _LOOK,
)
RNA_CONTENT = _TRAITS["rna"]
# Epithelium of a gland, wall of a vessel.
GLAND_LOOK, VESSEL_LOOK = np.array(
    [(0.12, 0.38, 0.4, 0.0, 0.0, 0.0, 0.0), (0.06, 0.6, 0.3, 0.0, 0.0, 0.0, 0.0)], dtype=LOOK
)
CANDIDATES = 80_000  # per mm^2, of which most find no room where cells are dense
CORNERS = 20  # of a cell's outline
DIVIDING = 0.012  # share of tumour cells


@dataclass(frozen=True)
class Cells:
    """Cells and the structures they line.

    Attributes
    ----------
    kind
        Type of each cell, a position in ``TYPES``.
    nuclei
        Their outlines; cells are centred on them.
    look
        Their stain, an array of ``LOOK``.
    radii
        ``(cells, CORNERS)``: radii of each cell's outline at equal angles (µm).
    hypoxia
        0 to 1 at the cell.
    glands, vessels
        Outlines.
    """

    kind: NDArray[np.int64]
    nuclei: Rounds
    look: NDArray[Any]
    radii: NDArray[np.float64]
    hypoxia: NDArray[np.float64]
    glands: Rounds
    vessels: Rounds


def build(size: float, seed: int) -> Cells:
    """Build the cells of a tissue of ``size`` µm."""
    rng = np.random.default_rng([seed, 101])
    noise_seed = noise_seed_of(seed)
    glands = _glands(rng, size, noise_seed)
    vessels = _vessels(rng, size, noise_seed, glands)
    lining = _lining(rng, glands, vessels)
    loose = _loose(rng, size, noise_seed, glands, vessels)
    x, y, kind, angle = (np.concatenate(parts) for parts in zip(lining, loose))
    within = describe(x, y, size, noise_seed)["inside"] > 4
    x, y, kind, angle = (values[within] for values in (x, y, kind, angle))
    kept = np.zeros(len(x), dtype=bool)
    _accept(np.clip(x, 0, size), np.clip(y, 0, size), _TRAITS["room"][kind], size, kept)
    x, y, kind, angle = (values[kept] for values in (x, y, kind, angle))
    # By place, so that what is near in the picture is near in the tables.
    order = np.lexsort([x, np.floor(y / 64)])
    x, y, kind, angle = (values[order] for values in (x, y, kind, angle))

    hypoxia = describe(x, y, size, noise_seed)["hypoxia"]
    n, traits = len(x), _TRAITS[kind]
    grow = np.exp(rng.normal(0, 1, n) * traits["spread"]) * (1 - 0.22 * hypoxia)
    stretch = np.exp(rng.normal(0, 0.5, n) * traits["spread"])
    nuclei = np.zeros(n, ROUND)
    nuclei["x"], nuclei["y"], nuclei["angle"], nuclei["wall"] = x, y, angle, 1
    nuclei["a"], nuclei["b"] = traits["a"] * grow * stretch, traits["b"] * grow / stretch
    nuclei["wave"] = np.abs(rng.normal(0, 1, (n, 3))) * traits["wave"][:, None] * [0.7, 1.0, 0.5]
    nuclei["phase"] = rng.uniform(0, 2 * np.pi, (n, 3))
    look = traits[list(LOOK.names or ())].astype(LOOK)
    look["h"] *= np.exp(rng.normal(0, 0.14, n)) * (1 + 0.5 * hypoxia)
    dividing = (kind == TUM) & (rng.random(n) < DIVIDING)
    look["h"][dividing], look["contrast"][dividing] = 1.9, 0.5
    nuclei["b"][dividing] *= 0.45
    strength = np.exp(rng.normal(0, 0.3, n))
    for name in ("tint_h", "tint_e", "border"):
        look[name] *= strength
    look["tint_e"] += rng.normal(0, 0.035, n) * np.isin(kind, [TUM, MACRO])
    return Cells(kind, nuclei, look, _radii(x, y, kind, angle, rng), hypoxia, glands, vessels)


def noise_seed_of(seed: int) -> int:
    """Return the seed of the fields: their octaves use neighbouring numbers, so seeds are kept apart."""
    return (seed + 1) * 1009


def _lattice(rng: np.random.Generator, size: float, pitch: float, jitter: float) -> tuple[NDArray, NDArray]:
    """Return the points of a jittered hexagonal lattice."""
    n = int(size / pitch) + 1
    row, col = (index.ravel() for index in np.indices((n, n)))
    x = (col + 0.5 * (row % 2) + 0.3) * pitch + rng.uniform(-jitter, jitter, row.size)
    y = (row + 0.3) * pitch * 0.9 + rng.uniform(-jitter, jitter, row.size)
    return x, y


def _glands(rng: np.random.Generator, size: float, seed: int) -> Rounds:
    """Draw glands in the glandular zones."""
    x, y = _lattice(rng, size, 88.0, 10.0)
    radius, lumen = rng.uniform(22, 37, len(x)), rng.uniform(0.26, 0.52, len(x))
    glands = make_rounds(rng, x, y, radius, 0.62, 0.10)
    glands["lumen"], glands["wall"] = lumen, 1.06
    place = describe(x, y, size, seed)
    return glands[(place["zone"] == GLAND) & (place["edge"] > 14) & (place["inside"] > 50)]


def _vessels(rng: np.random.Generator, size: float, seed: int, glands: Rounds) -> Rounds:
    """Draw vessels everywhere but in fat, clear of the glands."""
    x, y = _lattice(rng, size, 170.0, 50.0)
    radius = np.exp(rng.uniform(np.log(4.5), np.log(24), len(x)))
    wall = 1 + np.clip(rng.uniform(3, 6, len(x)) / radius + rng.uniform(0, 0.25, len(x)), 0.25, 1.0)
    vessels = make_rounds(rng, x, y, radius, 0.5, 0.08)
    vessels["lumen"], vessels["wall"] = 1, wall
    place = describe(x, y, size, seed)
    keep = (place["zone"] != FAT) & (place["inside"] > 45)
    if len(glands):
        distance = cKDTree(np.column_stack([glands["x"], glands["y"]])).query(np.column_stack([x, y]))[0]
        keep &= distance > 50 + 1.6 * radius
    return vessels[keep]


Placed = tuple[NDArray, NDArray, NDArray, NDArray]  # x, y, type and angle of cells


def _lining(rng: np.random.Generator, glands: Rounds, vessels: Rounds) -> Placed:
    """Place the cells that line glands and vessels."""
    thick = (vessels["wall"] - 1) * np.minimum(vessels["a"], vessels["b"]) > 4.5
    rings = [
        _ring(rng, EPI, glands, at=0.83, spacing=5.4, across=True, wobble=0.9),
        _ring(rng, ENDO, vessels, at=1.07, spacing=15.0, across=False, wobble=0.2),
        _ring(rng, MUSCLE, vessels[thick], at=1.32, spacing=13.0, across=False, wobble=0.8),
    ]
    x, y, kind, angle = (np.concatenate(parts) for parts in zip(*rings))
    return x, y, kind, angle


def _ring(
    rng: np.random.Generator, kind: int, shapes: Rounds, *, at: float, spacing: float, across: bool, wobble: float
) -> Placed:
    """Place cells ``spacing`` µm apart along outlines, at a share ``at`` of them, lying along or across."""
    xs, ys, angles = [np.empty(0)], [np.empty(0)], [np.empty(0)]
    turn = np.linspace(0, 2 * np.pi, 241)
    for px, py in zip(*outlines(shapes, turn, at)):
        length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(px), np.diff(py)))])
        n = max(3, int(length[-1] / spacing))
        wanted = (np.arange(n) + rng.uniform(-0.2, 0.2, n) + 0.5) / n * length[-1]
        where = np.interp(wanted, length, np.arange(241))
        tangent = np.arctan2(np.gradient(py), np.gradient(px))[np.clip(np.rint(where).astype(int), 0, 240)]
        normal = tangent + np.pi / 2
        push = rng.normal(0, wobble, n)
        xs.append(np.interp(where, np.arange(241), px) + push * np.cos(normal))
        ys.append(np.interp(where, np.arange(241), py) + push * np.sin(normal))
        angles.append((normal if across else tangent) + rng.normal(0, 0.12, n))
    x = np.concatenate(xs)
    return x, np.concatenate(ys), np.full(len(x), kind), np.concatenate(angles)


def _loose(rng: np.random.Generator, size: float, seed: int, glands: Rounds, vessels: Rounds) -> Placed:
    """Draw candidates everywhere, more than there is room for, each of a type that its place decides."""
    n = rng.poisson(CANDIDATES * (size / 1000) ** 2)
    x, y = rng.uniform(0, size, n), rng.uniform(0, size, n)
    place = describe(x, y, size, seed)
    take = place["inside"] > 4
    take &= _outside(x, y, glands, np.full(len(glands), 1.10)) & _outside(x, y, vessels, vessels["wall"])
    x, y, place = x[take], y[take], place[take]
    n = len(x)
    chance, kind = rng.random(n), np.full(n, -1)

    def settle(where: NDArray[np.bool_], densities: dict[int, float]) -> None:
        low = np.zeros(n)
        for name, density in densities.items():
            high = low + density / CANDIDATES
            kind[where & (chance >= low) & (chance < high)] = name
            low = high

    zone, edge, nest = place["zone"], place["edge"], place["nest"]
    septum = edge < 9
    stroma = (zone == STROMA) | septum
    settle(stroma, {FIB: 2900, TCELL: 480, MACRO: 260, PLASMA: 140})
    settle((zone == GLAND) & ~septum, {FIB: 3000, PLASMA: 1500, TCELL: 1300, MACRO: 450})
    tumour = (zone == TUMOUR) & ~septum
    settle(tumour & (nest > 1), {TUM: 45_000, TCELL: 700, MACRO: 300})
    settle(tumour & (nest <= 1), {FIB: 4200, TCELL: 1900, MACRO: 500})
    lymphoid = (zone == LYMPHOID) & ~septum
    core = np.clip((edge - 45) / 12, 0, 1) > rng.random(n)
    settle(lymphoid & core, {BCELL: 70_000, MACRO: 1500, TCELL: 3500})
    settle(lymphoid & ~core, {TCELL: 62_000, BCELL: 6000, PLASMA: 2000, MACRO: 900, FIB: 1500})
    settle((zone == FAT) & ~septum & (place["fat_wall"] < 1.6), {ADIPO: 5_000, MACRO: 900, ENDO: 1500})
    # Lymphocytes leave their aggregates.
    stray = stroma & (zone == LYMPHOID) & (rng.random(n) < 0.06)
    kind[stray] = TCELL
    keep = kind >= 0
    x, y, kind, place = x[keep], y[keep], kind[keep], place[keep]
    angle = rng.uniform(0, np.pi, len(x))
    follows = np.isin(kind, [FIB, MUSCLE, ADIPO, ENDO])
    angle[follows] = place["fibres"][follows] + rng.normal(0, 0.22, int(follows.sum()))
    return x, y, kind, angle


def _outside(x: NDArray, y: NDArray, shapes: Rounds, limit: NDArray) -> NDArray[np.bool_]:
    """Return which points lie outside all shapes, each grown by its limit."""
    free = np.ones(len(x), dtype=bool)
    far = 1.35 * np.maximum(shapes["a"], shapes["b"]) * limit
    order = np.argsort(y, kind="stable")
    low, high = (np.searchsorted(y, shapes["y"] + side * far, sorter=order) for side in (-1, 1))
    _mark(shapes, limit, far, low, high, order, x, y, free)
    return free


@jit
def _mark(
    shapes: Rounds, limit: NDArray, far: NDArray, low: NDArray, high: NDArray, order: NDArray,
    x: NDArray, y: NDArray, free: NDArray[np.bool_],
) -> None:  # fmt: skip
    """Mark the points that lie in a shape; those near each shape are ``order[low:high]``."""
    for k in range(len(shapes)):
        for i in order[low[k] : high[k]]:
            if abs(x[i] - shapes[k].x) < far[k] and place_in(shapes[k], x[i], y[i]) < limit[k]:
                free[i] = False


@jit
def _accept(x: NDArray, y: NDArray, room: NDArray, size: float, kept: NDArray[np.bool_]) -> None:
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
                while free and other >= 0:
                    free = math.hypot(x[k] - x[other], y[k] - y[other]) >= room[k] + room[other]
                    other = link[other]
        if free:
            kept[k] = True
            link[k] = head[i, j]
            head[i, j] = k


def _radii(x: NDArray, y: NDArray, kind: NDArray, angle: NDArray, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw cell outlines: an ellipse by type, cut where the neighbour is nearer, so that cells never overlap."""
    n = len(x)
    if n == 0:
        return np.empty((0, CORNERS))
    turn = 2 * np.pi * np.arange(CORNERS) / CORNERS
    c, s = np.cos(turn), np.sin(turn)
    a, b = (_TRAITS[axis][kind, None] * np.exp(rng.normal(0, 0.1, n))[:, None] for axis in ("cell_a", "cell_b"))
    local = turn[None, :] - angle[:, None]
    radii = 1 / np.sqrt((np.cos(local) / a) ** 2 + (np.sin(local) / b) ** 2)
    points = np.column_stack([x, y])
    tree = cKDTree(points)
    for start in range(0, n, 50_000):
        part = slice(start, start + 50_000)
        _, neighbours = tree.query(points[part], k=np.arange(2, min(13, n) + 1))
        for index in neighbours.T:
            d = points[index] - points[part]
            # The bisector lies at half the distance; along a direction it is met at |d|^2 / 2 / (d . direction).
            ahead = d[:, :1] * c + d[:, 1:] * s
            meets = 0.5 * (d**2).sum(axis=1, keepdims=True) / np.maximum(ahead, 1e-9)
            radii[part] = np.where(ahead > 1e-9, np.minimum(radii[part], meets), radii[part])
    return np.maximum(radii, 0.5)
