"""A slide in the pixels of a model: the level to read and the factor to resize it by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SNAP = 0.02
"""Factors this close to a whole number are rounded: pixels are then used as they are, and positions stay exact."""

BLOCK_PX = 64
"""Model pixels to which windows and the maps of encoders are aligned."""

MAX_ENLARGE = 2.0
"""A slide may be this many times coarser than the model."""


@dataclass(frozen=True)
class ModelGrid:
    """A slide as a model sees it: a grid of model pixels over one level of the pyramid, anchored at the origin.

    Attributes
    ----------
    level
        The level that is read.
    factor
        Pixels of that level per model pixel, ``(y, x)``; below 1 the slide is enlarged.
    px
        Level-0 pixels per model pixel, ``(y, x)``.
    shape
        Size in model pixels, ``(y, x)``; the last row and column may reach over the slide's edge.
    stride
        Model pixels per output pixel.
    mpp
        Size of a model pixel on this slide (µm).
    margin
        Model pixels above and to the left of the slide, ``(y, x)``, which belong to the grid and are white. A crop has
        as many as bring its blocks to where they lie on the slide that it was cut from.
    """

    level: int
    factor: tuple[float, float]
    px: tuple[float, float]
    shape: tuple[int, int]
    stride: int
    mpp: float
    margin: tuple[int, int] = (0, 0)

    @property
    def enlarged(self) -> bool:
        """Whether the slide is coarser than the model."""
        return min(self.factor) < 1

    @property
    def out_shape(self) -> tuple[int, int]:
        """Size in output pixels, ``(y, x)``."""
        return math.ceil(self.shape[0] / self.stride), math.ceil(self.shape[1] / self.stride)

    @property
    def out_px(self) -> tuple[float, float]:
        """Level-0 pixels per output pixel, ``(y, x)``."""
        return self.px[0] * self.stride, self.px[1] * self.stride

    @property
    def to_out(self) -> np.ndarray:
        """Matrix ``(3, 3)`` that takes ``(x, y, 1)`` from level-0 to output pixels."""
        matrix = np.diag([1 / self.out_px[1], 1 / self.out_px[0], 1.0])
        matrix[:2, 2] = self.out_margin[::-1]
        return matrix

    @property
    def out_margin(self) -> tuple[float, float]:
        """Output pixels above and to the left of the slide, ``(y, x)``."""
        return self.margin[0] / self.stride, self.margin[1] / self.stride


def snap(factor: float) -> float:
    """Round a factor that is close to a whole number."""
    whole = round(factor)
    return float(whole) if whole >= 1 and abs(factor / whole - 1) <= SNAP else factor


def choose_grid(
    scales: Sequence[tuple[float, float]],
    shapes: Sequence[tuple[int, int]],
    slide_mpp: float,
    model_mpp: float,
    stride: int,
    origin: tuple[float, float] = (0.0, 0.0),
) -> ModelGrid:
    """Return the grid on which a model of ``model_mpp`` sees a slide.

    The coarsest level that is at least as fine as the model is read and reduced by area; where the slide itself is
    coarser, level 0 is enlarged.

    Parameters
    ----------
    scales
        Level-0 pixels per pixel of each level, ``(y, x)``, finest first.
    shapes
        Size of each level in its pixels, ``(y, x)``.
    slide_mpp, model_mpp
        Pixel size of level 0, and of the model's input (µm/px).
    stride
        Model pixels per output pixel.
    origin
        Where the slide begins on the one that it was cut from, in level-0 pixels ``(y, x)``: blocks lie as they do
        there, to the next model pixel.

    Raises
    ------
    ValueError
        If the slide is more than 2 times coarser than the model.
    """
    if slide_mpp / model_mpp > MAX_ENLARGE * (1 + SNAP):
        raise ValueError(
            f"the slide has {slide_mpp:g} µm/px, more than {MAX_ENLARGE:g} times coarser than the {model_mpp:g} µm/px of the "
            "model: it lacks detail that the model needs. Use a finer image of the slide, or a model trained at a coarser "
            "pixel size (pixnet.tl.train(..., mpp=...)); if the slide's pixel size is wrong, fix it with pixnet.pp.set_mpp"
        )
    level = 0
    for i, scale in enumerate(scales):
        if max(scale) * slide_mpp <= model_mpp * (1 + SNAP):
            level = i
    fy, fx = (snap(model_mpp / (slide_mpp * s)) for s in scales[level])
    sy, sx = scales[level]
    height, width = shapes[level]
    px = (fy * sy, fx * sx)
    top, left = (round(start / size) % BLOCK_PX for start, size in zip(origin, px))
    shape = (math.ceil(height / fy - 1e-6) + top, math.ceil(width / fx - 1e-6) + left)
    return ModelGrid(level, (fy, fx), px, shape, stride, fx * sx * slide_mpp, (top, left))
