"""Tissue, zones and fibres as functions of the place in µm and the seed alone, so that any part can be evaluated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet._core.coverage.jit import jit

STROMA, GLAND, TUMOUR, LYMPHOID, FAT = range(5)
# Neighbouring zones take these in turn: any 3 x 3 of them holds every kind.
_TURNS = np.array([GLAND, TUMOUR, LYMPHOID, FAT, TUMOUR, STROMA, GLAND], dtype=np.int64)
ZONE_UM = 290.0
FAT_UM = 46.0
FAT_SEED = 71


@jit
def hashed(i: int, j: int, seed: int) -> float:
    """Map a lattice point to a number in [0, 1)."""
    h = (
        np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
        ^ np.uint64(j) * np.uint64(0xC2B2AE3D27D4EB4F)
        ^ np.uint64(seed) * np.uint64(0x165667B19E3779F9)
    )
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(29)
    return np.float64(h >> np.uint64(40)) / 16777216.0


@jit
def noise(x: float, y: float, seed: int) -> float:
    """Return smooth noise in [0, 1] with features of size 1."""
    i, j = math.floor(x), math.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = int(i), int(j)
    a, b = hashed(i, j, seed), hashed(i + 1, j, seed)
    c, d = hashed(i, j + 1, seed), hashed(i + 1, j + 1, seed)
    return (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v


@jit
def cellular(x: float, y: float, pitch: float, seed: int) -> tuple[float, int, int]:
    """Return half the difference of the distances to the two nearest jittered lattice points, and the nearest point."""
    i, j = int(math.floor(x / pitch)), int(math.floor(y / pitch))
    first, second, near_i, near_j = 1e9, 1e9, 0, 0
    for di in range(-1, 2):
        for dj in range(-1, 2):
            px = (i + di + 0.15 + 0.7 * hashed(i + di, j + dj, seed)) * pitch
            py = (j + dj + 0.15 + 0.7 * hashed(i + di, j + dj, seed + 1)) * pitch
            d = math.hypot(x - px, y - py)
            if d < first:
                second, first = first, d
                near_i, near_j = i + di, j + dj
            elif d < second:
                second = d
    return 0.5 * (second - first), near_i, near_j


@jit
def inside(x: float, y: float, size: float, seed: int) -> float:
    """Return the approximate distance (µm) to the outline of the tissue, positive inside."""
    dx, dy = x / size - 0.5, y / size - 0.5
    radius = (abs(dx) ** 3 + abs(dy) ** 3) ** (1 / 3)
    angle = math.atan2(dy, dx)
    wave = noise(3 + 1.6 * math.cos(angle), 3 + 1.6 * math.sin(angle), seed + 11) - 0.5
    edge = 0.445 + 0.09 * wave
    rough = 14 * (noise(x / 24, y / 24, seed + 12) - 0.5) + 7 * (noise(x / 8, y / 8, seed + 13) - 0.5)
    return (edge - radius) * size + rough


@jit
def zone(x: float, y: float, seed: int) -> tuple[int, float]:
    """Return the kind of tissue and the distance (µm) to the border of its zone."""
    wx = x + 110 * (noise(x / 130, y / 130, seed + 21) - 0.5) + 36 * (noise(x / 34, y / 34, seed + 22) - 0.5)
    wy = y + 110 * (noise(x / 130, y / 130, seed + 23) - 0.5) + 36 * (noise(x / 34, y / 34, seed + 24) - 0.5)
    wx += 9 * (noise(x / 8, y / 8, seed + 27) - 0.5)
    wy += 9 * (noise(x / 8, y / 8, seed + 28) - 0.5)
    edge, i, j = cellular(wx, wy, ZONE_UM, seed + 25)
    turn = (i + 2 * j + int(7 * hashed(0, 0, seed + 26))) % 7
    return _TURNS[turn], edge


@jit
def along(x: float, y: float, seed: int) -> tuple[float, float]:
    """Return coordinates (µm) along and across the wavy fibres of stroma."""
    u = x + 70 * (noise(x / 170, y / 170, seed + 31) - 0.5)
    v = y + 130 * (noise(x / 150, y / 150, seed + 32) - 0.5) + 8 * (noise(x / 25, y / 25, seed + 33) - 0.5)
    return u, v


@jit
def direction(x: float, y: float, seed: int) -> float:
    """Return the angle of the fibres."""
    v = along(x, y, seed)[1]
    return math.atan2(-(along(x + 2, y, seed)[1] - v), along(x, y + 2, seed)[1] - v)


@jit
def nest(x: float, y: float, seed: int) -> float:
    """Return the distance (µm) into a nest of tumour cells; below 0 in the septa between nests."""
    wx = x + 26 * (noise(x / 35, y / 35, seed + 41) - 0.5)
    wy = y + 26 * (noise(x / 35, y / 35, seed + 42) - 0.5)
    return cellular(wx, wy, 85.0, seed + 43)[0] - 1.5 - 7 * noise(x / 45, y / 45, seed + 45)


@jit
def hypoxia(x: float, y: float, seed: int) -> float:
    """Return the lack of oxygen, 0 to 1: in the middle of tumour zones, with patches."""
    kind, edge = zone(x, y, seed)
    if kind != TUMOUR:
        return 0.0
    level = (edge - 18) / 60 + 0.7 * (noise(x / 90, y / 90, seed + 51) - 0.5)
    return min(1.0, max(0.0, level))


# Fields at a place, as `describe` gives them.
PLACE = np.dtype(
    [
        ("inside", float),  # distance to the outline of the tissue (µm), positive inside
        ("zone", np.int64),
        ("edge", float),  # distance to the border of the zone (µm)
        ("nest", float),  # distance into a nest of tumour cells (µm)
        ("fibres", float),  # angle of the fibres
        ("hypoxia", float),
        ("fat_wall", float),  # distance to the border of a fat cell (µm)
    ]
)


@jit
def describe(x: NDArray, y: NDArray, size: float, seed: int) -> NDArray[Any]:
    """Evaluate all fields at many places: an array of ``PLACE``."""
    places = np.empty(len(x), PLACE)
    for k in range(len(x)):
        place = places[k]
        place.inside = inside(x[k], y[k], size, seed)
        place.zone, place.edge = zone(x[k], y[k], seed)
        place.nest = nest(x[k], y[k], seed)
        place.fibres = direction(x[k], y[k], seed)
        place.hypoxia = hypoxia(x[k], y[k], seed)
        place.fat_wall = cellular(x[k], y[k], FAT_UM, seed + FAT_SEED)[0]
    return places


@jit
def is_tissue(x: NDArray, y: NDArray, size: float, seed: int) -> NDArray[np.bool_]:
    """Return which places lie on tissue."""
    out = np.empty(len(x), dtype=np.bool_)
    for k in range(len(x)):
        out[k] = inside(x[k], y[k], size, seed) > 0
    return out
