"""Round things with a wavy outline: nuclei, glands and vessels are all made of these."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet._core.coverage.jit import jit

Rounds = NDArray[Any]  # of dtype ROUND
ORDERS = (2, 3, 5)  # of the waves on an outline
ROUND = np.dtype(
    [
        ("x", float),  # centre, µm
        ("y", float),
        ("a", float),  # semi-axes, µm
        ("b", float),
        ("angle", float),
        ("wave", float, 3),  # amplitude, as a share of the radius, and phase of the wave of each order
        ("phase", float, 3),
        ("lumen", float),  # where the lumen ends and where the wall ends, as shares of the outline
        ("wall", float),
    ]
)


def make_rounds(rng: np.random.Generator, x: NDArray, y: NDArray, radius: NDArray, flat: float, wave: float) -> Rounds:
    """Draw shapes of a mean radius, with semi-axes in a ratio of at least ``flat`` and waves of at most ``wave``."""
    n = len(x)
    rounds = np.zeros(n, ROUND)
    ratio = rng.uniform(flat, 1, n)
    rounds["x"], rounds["y"] = x, y
    rounds["a"], rounds["b"] = radius / np.sqrt(ratio), radius * np.sqrt(ratio)
    rounds["angle"] = rng.uniform(0, np.pi, n)
    for i, share in enumerate((0.5, 1.0, 0.6)):
        rounds["wave"][:, i] = rng.uniform(0, wave * share, n)
        rounds["phase"][:, i] = rng.uniform(0, 2 * np.pi, n)
    return rounds


def outlines(rounds: Rounds, turn: NDArray, at: float = 1.0) -> tuple[NDArray, NDArray]:
    """Return x and y, ``(rounds, turns)``, of the points at a share ``at`` of the outlines."""
    waves = (
        rounds["wave"][:, i, None] * np.cos(order * turn + rounds["phase"][:, i, None])
        for i, order in enumerate(ORDERS)
    )
    radius = 1 + sum(waves)
    u, v = rounds["a"][:, None] * radius * at * np.cos(turn), rounds["b"][:, None] * radius * at * np.sin(turn)
    c, s = np.cos(rounds["angle"])[:, None], np.sin(rounds["angle"])[:, None]
    return rounds["x"][:, None] + c * u - s * v, rounds["y"][:, None] + s * u + c * v


def reach(rounds: Rounds) -> NDArray[np.float64]:
    """Return the radius (µm) of a circle that holds each shape."""
    return 1.35 * rounds["wall"] * np.maximum(rounds["a"], rounds["b"])


@jit
def place_in(shape: Any, x: float, y: float) -> float:
    """Return where a point lies in a round thing: 0 in its middle, 1 on its outline."""
    c, s = math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = x - shape.x, y - shape.y
    u, v = (c * dx + s * dy) / shape.a, (c * dy - s * dx) / shape.b
    angle = math.atan2(v, u)
    outline = (
        1
        + shape.wave[0] * math.cos(2 * angle + shape.phase[0])
        + shape.wave[1] * math.cos(3 * angle + shape.phase[1])
        + shape.wave[2] * math.cos(5 * angle + shape.phase[2])
    )
    return math.hypot(u, v) / outline
