"""The picture: amounts of stain painted pixel by pixel, then the light that they let through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pixnet._core.coverage.jit import jit
from pixnet.datasets._synthetic.fields import (
    FAT,
    FAT_SEED,
    FAT_UM,
    GLAND,
    LYMPHOID,
    TUMOUR,
    along,
    cellular,
    hypoxia,
    inside,
    nest,
    noise,
    zone,
)
from pixnet.datasets._synthetic.rounds import Rounds, place_in

BLUR_UM = 0.32  # of the optics (standard deviation); `REACH_UM` is how far it reaches
REACH_UM = 1.0
Amounts = NDArray[np.float32]  # of one stain, (y, x); painted in place


@jit
def ground(x0: int, y0: int, mpp: float, size: float, seed: int, h: Amounts, e: Amounts) -> None:
    """Paint what lies between the cells: glass, fibres, fat and the ground of tumour and lymphoid tissue."""
    for row in range(h.shape[0]):
        y = (y0 + row + 0.5) * mpp
        for col in range(h.shape[1]):
            x = (x0 + col + 0.5) * mpp
            share = min(1.0, inside(x, y, size, seed) / 2.5 + 0.5)
            if share <= 0:
                h[row, col] = e[row, col] = 0.0
                continue
            kind, edge = zone(x, y, seed)
            septum = edge < 5 + 9 * noise(x / 50, y / 50, seed + 81)
            grain = noise(x / 1.1, y / 1.1, seed + 82)
            patch = noise(x / 60, y / 60, seed + 83)
            if kind == TUMOUR and not septum and nest(x, y, seed) > 0:
                lack = hypoxia(x, y, seed)
                ha = 0.14 + 0.14 * (noise(x / 3, y / 3, seed + 84) - 0.5) - 0.06 * lack
                ea = 0.25 + 0.14 * patch + 0.20 * (grain - 0.5) + 0.20 * lack
            elif kind == LYMPHOID and not septum:
                ha = 0.04 + 0.20 * noise(x / 5, y / 5, seed + 89) * patch
                ea = 0.10 + 0.30 * noise(x / 3.5, y / 3.5, seed + 85) ** 2 + 0.14 * (grain - 0.5)
            elif kind == FAT and not septum:
                wall = cellular(x, y, FAT_UM, seed + FAT_SEED)[0]
                ea = 0.42 / (1 + math.exp((wall - 1.1) / 0.25))
                ha = 0.02
            else:
                u, v = along(x, y, seed)
                v += 5 * (noise(x / 11, y / 11, seed + 90) - 0.5)
                fibre = 0.5 * noise(u / 20, v / 2.8, seed + 91) + 0.3 * noise(u / 8, v / 1.3, seed + 92) + 0.2 * grain
                bundle = noise(u / 70, v / 13, seed + 93)
                cleft = min(1.0, max(0.0, (0.24 + 0.14 * patch - noise(u / 26, v / 5, seed + 94)) / 0.12))
                ha = 0.05 * (1 - 0.8 * cleft)
                ea = (0.10 + 0.62 * fibre * fibre + 0.26 * bundle + 0.16 * (patch - 0.5)) * (1 - 0.88 * cleft)
                if kind == GLAND:
                    ea *= 0.8
            h[row, col] = share * max(0.0, ha)
            e[row, col] = share * max(0.0, ea)


@jit
def _span(centre: float, reach: float, mpp: float, start: int, length: int) -> tuple[int, int]:
    """Return the rows (or columns) of the picture that a thing may reach."""
    return max(0, int((centre - reach) / mpp) - start), min(length, int((centre + reach) / mpp) + 2 - start)


@jit
def cytoplasm(
    x0: int, y0: int, mpp: float, cells: Rounds, radii: NDArray, looks: NDArray[Any], h: Amounts, e: Amounts
) -> None:
    """Tint cells within their outlines, with a paler border; ``radii`` are those at equal angles."""
    n = radii.shape[1]
    for k in range(len(cells)):
        look, cell, reach = looks[k], cells[k], radii[k].max()
        if look.tint_h == 0 and look.tint_e == 0 and look.border == 0:
            continue
        left, right = _span(cell.x, reach, mpp, x0, h.shape[1])
        top, bottom = _span(cell.y, reach, mpp, y0, h.shape[0])
        for row in range(top, bottom):
            dy = (y0 + row + 0.5) * mpp - cell.y
            for col in range(left, right):
                dx = (x0 + col + 0.5) * mpp - cell.x
                turn = (math.atan2(dy, dx) / (2 * math.pi)) % 1.0 * n
                i, part = int(turn) % n, turn - int(turn)
                depth = radii[k, i] * (1 - part) + radii[k, (i + 1) % n] * part - math.hypot(dx, dy)
                if depth > 0:
                    soft = min(1.0, depth)
                    h[row, col] = max(0.0, h[row, col] + soft * look.tint_h)
                    e[row, col] = max(0.0, e[row, col] + soft * look.tint_e)
                    e[row, col] *= 1 - look.border * max(0.0, 0.9 - depth) / 0.9


@jit
def rounds(
    x0: int, y0: int, mpp: float, seed: int, shapes: Rounds, looks: NDArray[Any], h: Amounts, e: Amounts
) -> None:
    """Paint nuclei, glands and vessels: an empty lumen, if any, in stain with clumps and a darker rim."""
    for k in range(len(shapes)):
        shape, look = shapes[k], looks[k]
        reach, small = 1.35 * shape.wall * max(shape.a, shape.b) + mpp, min(shape.a, shape.b)
        left, right = _span(shape.x, reach, mpp, x0, h.shape[1])
        top, bottom = _span(shape.y, reach, mpp, y0, h.shape[0])
        for row in range(top, bottom):
            y = (y0 + row + 0.5) * mpp
            for col in range(left, right):
                x = (x0 + col + 0.5) * mpp
                s = place_in(shape, x, y)
                cover = min(1.0, (shape.wall - s) * small / max(0.35, 0.6 * mpp) + 0.5)
                if cover <= 0:
                    continue
                ha, ea = 0.01, 0.03
                if s >= shape.lumen:
                    clump = look.contrast * (2 * noise(x / 1.3, y / 1.3, seed + 121) - 1)
                    rim = look.rim * max(0.0, s / shape.wall - 0.72) / 0.28
                    ha, ea = look.h * max(0.0, 1 + clump + rim), look.e
                h[row, col] += cover * (ha - h[row, col])
                e[row, col] += cover * (ea - e[row, col])


@dataclass(frozen=True)
class Stain:
    """Optical densities of the two stains, ``(2, RGB)``, and the colour of the glass, of one staining run."""

    matrix: NDArray[np.float64]
    white: NDArray[np.float64]

    @classmethod
    def draw(cls, seed: int) -> Stain:
        """Draw a staining run; seed 0 is an average one."""
        rng = np.random.default_rng([seed, 401])
        spread = 0.0 if seed == 0 else 1.0
        blue = np.array([0.63, 0.70, 0.33]) + spread * rng.normal(0, [0.05, 0.03, 0.05])
        pink = np.array([0.12, 0.87, 0.47]) + spread * rng.normal(0, [0.05, 0.03, 0.08])
        strength = np.exp(spread * rng.normal(0, 0.16, 2))
        matrix = np.stack([strength[0] * blue / np.linalg.norm(blue), strength[1] * pink / np.linalg.norm(pink)])
        white = np.array([243.0, 241.0, 244.0]) - spread * rng.uniform(0, 14, 3)
        return cls(np.maximum(matrix, 0), white)


def expose(h: Amounts, e: Amounts, stain: Stain, mpp: float) -> NDArray[np.uint8]:
    """Turn amounts of stain into the pixels of a camera, ``uint8 (y, x, 3)``."""
    density = h[..., None] * stain.matrix[0] + e[..., None] * stain.matrix[1]
    light = np.exp(-2.05 * density).astype(np.float32)
    blurred = ndimage.gaussian_filter(light, (BLUR_UM / mpp, BLUR_UM / mpp, 0), truncate=3)
    return np.clip(np.rint(blurred * stain.white), 0, 255).astype(np.uint8)
