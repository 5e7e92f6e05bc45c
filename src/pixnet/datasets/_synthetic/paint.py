"""The picture: stain amounts painted pixel by pixel, then light, optics, camera and JPEG."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pixnet._core.coverage.jit import jit
from pixnet.datasets._synthetic.fields import (
    FAT,
    FAT_UM,
    GLAND,
    LYMPHOID,
    TUMOUR,
    along,
    cellular,
    fold,
    hashed,
    hypoxia,
    inside,
    nest,
    noise,
    zone,
)

BLOCK = 8  # of JPEG: parts are rendered in whole blocks, so that a pixel never depends on the part it was asked in


@dataclass(frozen=True)
class Objects:
    """Round things to paint, one row each, in um.

    ``shape``: x, y, semi-axes a and b, angle, and amplitude and phase of waves of order 2, 3 and 5 on the outline.
    ``look``: haematoxylin, eosin, contrast of the texture, darkness of the rim, nucleoli, size of the texture in um.
    """

    shape: NDArray[np.float64]
    look: NDArray[np.float64]
    tags: NDArray[np.int64]

    def near(self, x0: float, y0: float, x1: float, y1: float) -> Objects:
        """Those that may reach into a rectangle, in order."""
        reach = 1.35 * np.maximum(self.shape[:, 2], self.shape[:, 3])
        x, y = self.shape[:, 0], self.shape[:, 1]
        return self.take(np.flatnonzero((x + reach > x0) & (x - reach < x1) & (y + reach > y0) & (y - reach < y1)))

    def take(self, index: NDArray[np.int64]) -> Objects:
        """Those at some positions."""
        return Objects(self.shape[index], self.look[index], self.tags[index])


@jit
def place_in(shape, x, y):
    """Where a point lies in a round thing: 0 in its middle, 1 on its outline."""
    c, s = math.cos(shape[4]), math.sin(shape[4])
    dx, dy = x - shape[0], y - shape[1]
    u, v = (c * dx + s * dy) / shape[2], (c * dy - s * dx) / shape[3]
    angle = math.atan2(v, u)
    outline = (
        1
        + shape[5] * math.cos(2 * angle + shape[6])
        + shape[7] * math.cos(3 * angle + shape[8])
        + shape[9] * math.cos(5 * angle + shape[10])
    )
    return math.hypot(u, v) / outline


@jit
def ground(x0, y0, height, width, mpp, size, seed, h, e, light):
    """Amounts of haematoxylin and eosin between the cells."""
    for row in range(height):
        y = (y0 + row + 0.5) * mpp
        for col in range(width):
            x = (x0 + col + 0.5) * mpp
            t = inside(x, y, size, seed) / 2.5 + 0.5
            if t <= 0:
                h[row, col] = 0.0
                e[row, col] = 0.0
                light[row, col] = 1.0
                continue
            t = min(1.0, t)
            kind, edge = zone(x, y, seed)
            septum = edge < 5 + 9 * noise(x / 50, y / 50, seed + 81)
            grain = noise(x / 1.1, y / 1.1, seed + 82)
            patch = noise(x / 60, y / 60, seed + 83)
            ha, ea = 0.02, 0.0
            if kind == TUMOUR and not septum and nest(x, y, seed) > 0:
                lack = hypoxia(x, y, seed)
                ea = 0.25 + 0.14 * patch + 0.20 * (grain - 0.5) + 0.20 * lack
                ha = 0.14 + 0.14 * (noise(x / 3, y / 3, seed + 84) - 0.5) - 0.06 * lack
            elif kind == LYMPHOID and not septum:
                ea = 0.10 + 0.30 * noise(x / 3.5, y / 3.5, seed + 85) ** 2 + 0.14 * (grain - 0.5)
                ha = 0.04 + 0.20 * noise(x / 5, y / 5, seed + 89) * patch
            elif kind == FAT and not septum:
                wx = x + 5 * (noise(x / 14, y / 14, seed + 86) - 0.5)
                wy = y + 5 * (noise(x / 14, y / 14, seed + 87) - 0.5)
                wall = cellular(wx, wy, FAT_UM, seed + 71)[0]
                thick = 0.7 + 0.8 * noise(x / 30, y / 30, seed + 88)
                ea = 0.42 / (1 + math.exp((wall - thick) / 0.25))
                ha = 0.05 * ea
            else:
                u, v = along(x, y, seed)
                w = v + 5 * (noise(x / 11, y / 11, seed + 90) - 0.5)
                fibre = 0.5 * noise(u / 20, w / 2.8, seed + 91) + 0.3 * noise(u / 8, w / 1.3, seed + 92) + 0.2 * grain
                bundle = noise(u / 70, w / 13, seed + 93)
                cleft = 0.75 * noise(u / 26, w / 5, seed + 94) + 0.25 * noise(x / 4, y / 4, seed + 96)
                ea = 0.10 + 0.62 * fibre * fibre + 0.26 * bundle + 0.16 * (patch - 0.5)
                if kind == GLAND:
                    ea *= 0.8
                gap = min(1.0, max(0.0, (0.24 + 0.14 * patch - cleft) / 0.12))
                ea *= 1 - 0.88 * gap
                ha = 0.03 + 0.05 * noise(x / 5, y / 5, seed + 95)
                ha *= 1 - 0.8 * gap
            h[row, col] = t * max(0.0, ha)
            e[row, col] = t * max(0.0, ea)
            light[row, col] = fold(x, y, size, seed)


@jit
def glands(x0, y0, mpp, seed, shapes, h, e):
    """Lumen, mucus and the epithelium's cytoplasm, which is paler towards the lumen."""
    height, width = h.shape
    for k in range(len(shapes)):
        shape = shapes[k]
        reach = 1.35 * max(shape[2], shape[3])
        lumen = shape[11]
        for row in range(
            max(0, int((shape[1] - reach) / mpp) - y0), min(height, int((shape[1] + reach) / mpp) + 2 - y0)
        ):
            y = (y0 + row + 0.5) * mpp
            for col in range(
                max(0, int((shape[0] - reach) / mpp) - x0), min(width, int((shape[0] + reach) / mpp) + 2 - x0)
            ):
                x = (x0 + col + 0.5) * mpp
                s = place_in(shape, x, y)
                if s > 1.06:
                    continue
                ragged = lumen + 0.10 * (noise(x / 6, y / 6, seed + 101) - 0.5)
                if s < ragged:
                    debris = noise(x / 9, y / 9, seed + 102)
                    ha, ea = 0.02, 0.03
                    if debris > 0.72:
                        ha, ea = 0.10, 0.16 * (debris - 0.5) * 2
                elif s > 1.0:
                    ha, ea = 0.05, 0.42  # basement membrane
                else:
                    depth = (s - ragged) / (1 - ragged)
                    mucus = noise(x / 4.5, y / 4.5, seed + 103)
                    ea = 0.40 + 0.12 * (noise(x / 1.2, y / 1.2, seed + 104) - 0.5)
                    ha = 0.12
                    if depth < 0.45 and mucus > 0.55:
                        ea, ha = 0.14, 0.10
                    if depth < 0.06:
                        ea += 0.15  # brush border
                soft = min(1.0, max(0.0, (1.06 - s) * min(shape[2], shape[3]) / 0.8))
                h[row, col] += soft * (ha - h[row, col])
                e[row, col] += soft * (ea - e[row, col])


@jit
def vessels(x0, y0, mpp, seed, shapes, h, e):
    """Paint an empty lumen in a wall of smooth muscle."""
    height, width = h.shape
    for k in range(len(shapes)):
        shape = shapes[k]
        wall = shape[11]
        reach = 1.35 * wall * max(shape[2], shape[3])
        for row in range(
            max(0, int((shape[1] - reach) / mpp) - y0), min(height, int((shape[1] + reach) / mpp) + 2 - y0)
        ):
            y = (y0 + row + 0.5) * mpp
            for col in range(
                max(0, int((shape[0] - reach) / mpp) - x0), min(width, int((shape[0] + reach) / mpp) + 2 - x0)
            ):
                x = (x0 + col + 0.5) * mpp
                s = place_in(shape, x, y)
                if s > wall:
                    continue
                small = min(shape[2], shape[3])
                if s < 1:
                    soft = min(1.0, (1 - s) * small / 0.8)
                    ha, ea = 0.01, 0.03
                else:
                    soft = min(1.0, (wall - s) * small / 1.5)
                    ring = 0.5 + 0.5 * math.sin(s * small * 2.2 + 3 * noise(x / 8, y / 8, seed + 111))
                    ha, ea = 0.06, 0.52 + 0.18 * ring
                h[row, col] += soft * (ha - h[row, col])
                e[row, col] += soft * (ea - e[row, col])


@jit
def blobs(x0, y0, mpp, seed, shapes, looks, tags, h, e):
    """Nuclei (and red blood cells): outline, chromatin, rim, nucleoli."""
    height, width = h.shape
    for k in range(len(shapes)):
        shape, look, tag = shapes[k], looks[k], tags[k]
        reach = 1.35 * max(shape[2], shape[3]) + mpp
        small = min(shape[2], shape[3])
        soft = max(0.35, 0.6 * mpp)
        for row in range(
            max(0, int((shape[1] - reach) / mpp) - y0), min(height, int((shape[1] + reach) / mpp) + 2 - y0)
        ):
            y = (y0 + row + 0.5) * mpp
            for col in range(
                max(0, int((shape[0] - reach) / mpp) - x0), min(width, int((shape[0] + reach) / mpp) + 2 - x0)
            ):
                x = (x0 + col + 0.5) * mpp
                s = place_in(shape, x, y)
                cover = min(1.0, (1 - s) * small / soft + 0.5)
                if cover <= 0:
                    continue
                clump = noise(x / look[5] + 7.3 * (tag % 911), y / look[5], seed + 121)
                ha = look[0] * (1 + look[2] * (clump - 0.5) * 2)
                if s > 0.72:
                    ha += look[0] * look[3] * (s - 0.72) / 0.28
                for spot in range(int(look[4])):
                    angle = 6.283 * hashed(tag, spot, seed + 122)
                    r = 0.5 * hashed(tag, spot, seed + 123)
                    c, n = math.cos(shape[4]), math.sin(shape[4])
                    u, v = shape[2] * r * math.cos(angle), shape[3] * r * math.sin(angle)
                    d = math.hypot(x - shape[0] - c * u + n * v, y - shape[1] - n * u - c * v)
                    ha += 0.55 * math.exp(-((d / 0.75) ** 2))
                h[row, col] += cover * (max(0.0, ha) - h[row, col])
                e[row, col] += cover * (look[1] - e[row, col])


@jit
def cytoplasm(x0, y0, mpp, polygons, tints, h, e):
    """Tint each cell, with a paler border; ``polygons`` are x, y and the radii at equal angles."""
    height, width = h.shape
    n = polygons.shape[1] - 2
    for k in range(len(polygons)):
        cx, cy = polygons[k, 0], polygons[k, 1]
        if tints[k, 0] == 0 and tints[k, 1] == 0 and tints[k, 2] == 0:
            continue
        reach = 0.0
        for i in range(n):
            reach = max(reach, polygons[k, 2 + i])
        for row in range(max(0, int((cy - reach) / mpp) - y0), min(height, int((cy + reach) / mpp) + 2 - y0)):
            dy = (y0 + row + 0.5) * mpp - cy
            for col in range(max(0, int((cx - reach) / mpp) - x0), min(width, int((cx + reach) / mpp) + 2 - x0)):
                dx = (x0 + col + 0.5) * mpp - cx
                turn = (math.atan2(dy, dx) / (2 * math.pi)) % 1.0 * n
                i = int(turn) % n
                part = turn - int(turn)
                limit = polygons[k, 2 + i] * (1 - part) + polygons[k, 2 + (i + 1) % n] * part
                into = limit - math.hypot(dx, dy)
                if into <= 0:
                    continue
                soft = min(1.0, into / 1.0)
                h[row, col] = max(0.0, h[row, col] + soft * tints[k, 0])
                e[row, col] = max(0.0, e[row, col] + soft * tints[k, 1])
                if into < 0.9:
                    e[row, col] *= 1 - tints[k, 2] * (0.9 - into) / 0.9


@jit
def grain(x0, y0, height, width, seed):
    """Camera noise, by pixel and channel: about normal with unit variance."""
    out = np.empty((height, width, 3), dtype=np.float32)
    for row in range(height):
        for col in range(width):
            for c in range(3):
                a = hashed(x0 + col, y0 + row, seed + 131 + 4 * c)
                b = hashed(x0 + col, y0 + row, seed + 132 + 4 * c)
                d = hashed(x0 + col, y0 + row, seed + 133 + 4 * c)
                out[row, col, c] = 2.0 * (a + b + d - 1.5)
    return out


@dataclass(frozen=True)
class Stain:
    """Colours of the stains and of the light, of one staining run."""

    matrix: NDArray[np.float64]
    white: NDArray[np.float64]
    vignette: tuple[float, float, float]

    @classmethod
    def draw(cls, seed: int) -> Stain:
        """Draw a staining run; seed 0 is the middle of the road."""
        rng = np.random.default_rng([seed, 401])
        spread = 0.0 if seed == 0 else 1.0
        blue = np.array([0.63, 0.70, 0.33]) + spread * rng.normal(0, [0.05, 0.03, 0.05])
        pink = np.array([0.12, 0.87, 0.47]) + spread * rng.normal(0, [0.05, 0.03, 0.08])
        strength = np.exp(spread * rng.normal(0, 0.16, 2))
        matrix = np.stack([strength[0] * blue / np.linalg.norm(blue), strength[1] * pink / np.linalg.norm(pink)])
        white = np.array([243.0, 241.0, 244.0]) - spread * rng.uniform(0, 14, 3)
        return cls(np.maximum(matrix, 0), white, (0.035, float(rng.uniform(0, 6.28)), float(rng.uniform(700, 1500))))


def expose(
    h: NDArray,
    e: NDArray,
    light: NDArray,
    stain: Stain,
    x0: int,
    y0: int,
    mpp: float,
    seed: int,
    inner: tuple[slice, slice],
) -> NDArray[np.uint8]:
    """From amounts of stain to the pixels of a camera, ``uint8 (y, x, 3)``, for the inner part."""
    density = (h * light)[..., None] * stain.matrix[0] + (e * light)[..., None] * stain.matrix[1]
    through = np.exp(-2.05 * density).astype(np.float32)
    blur = 0.32 / mpp
    for c, wider in enumerate((1.0, 1.0, 1.15)):  # blue light is focused a little elsewhere
        through[..., c] = ndimage.gaussian_filter(through[..., c], blur * wider, truncate=3)
    through = through[inner]
    rows, columns = inner
    y = (y0 + np.arange(rows.start, rows.stop) + 0.5) * mpp
    x = (x0 + np.arange(columns.start, columns.stop) + 0.5) * mpp
    depth, angle, length = stain.vignette
    wave = np.cos(2 * np.pi * (np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]) / length)
    pixels = through * stain.white * (1 - depth * (0.5 - 0.5 * wave))[..., None]
    noise_of_camera = grain(x0 + columns.start, y0 + rows.start, len(y), len(x), seed)
    pixels += noise_of_camera * (0.6 + 0.10 * np.sqrt(pixels))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def compress(pixels: NDArray[np.uint8], quality: int = 88) -> NDArray[np.uint8]:
    """There and back through JPEG. Without chroma subsampling its blocks are independent of one another."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="jpeg", quality=quality, subsampling=0)
    buffer.seek(0)
    return np.asarray(Image.open(buffer).convert("RGB"))
