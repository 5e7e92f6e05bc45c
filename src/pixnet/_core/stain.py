"""Whether a slide looks like those that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixnet._core.inference import TileRunner

WINDOWS, WINDOW_PX = 16, 256

# Measured, in units of a training slide's own sd: sections of one study (her2st C and B) differ by up to 0.2 in the mean and
# 1.3-fold in the sd, H&E of other laboratories by 0.4 to 0.6 and 2-fold; kidney with pale haematoxylin and a faint, blurred
# brain by 0.9 to 1.2 and 4-fold or more.
FAR_MEAN, FAR_SD = 0.75, 2.5


def sample(runner: TileRunner) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read small windows spread evenly over the tissue of a slide.

    Parameters
    ----------
    runner
        A runner over the slide.

    Returns
    -------
    list of tuple
        Pixels ``(3, n, n)`` uint8 at the model's um/px, and which of them are tissue, ``(n, n)`` bool.
    """
    layout, stride = runner.layout, runner.layout.grid.stride
    tiles = runner.tiles()
    side = WINDOW_PX // stride
    out = []
    for k in np.unique(np.linspace(0, len(tiles) - 1, WINDOWS).round().astype(int)) if tiles else []:
        fine = layout.fine(layout.box(*tiles[k]))
        found = np.argwhere(runner.mask.window(fine.y, fine.x, fine.height, fine.width))
        if len(found) == 0:
            continue
        y, x = found[len(found) // 2]
        y, x = max(fine.y + int(y) - side // 2, 0), max(fine.x + int(x) - side // 2, 0)
        tissue = runner.mask.window(y, x, side, side).repeat(stride, axis=0).repeat(stride, axis=1)
        out.append((runner.read(y * stride, x * stride, side * stride), tissue))
    return out


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """Return the optical density, base 10, of uint8 light."""
    return -np.log10(np.maximum(pixels, 1).astype(np.float32) / 255)


def differences(
    samples: Sequence[tuple[np.ndarray, np.ndarray]], training: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    """Return what differs between a slide's stain and that of the training slides, in words; empty: nothing much.

    Parameters
    ----------
    samples
        What :func:`sample` returned.
    training
        Each training slide's ``od_mean`` and ``od_sd``: of the optical density of its tissue in R, G and B.
    """
    density = [optical_density(pixels[:, tissue]) for pixels, tissue in samples if tissue.any()]
    if not training or not density:
        return []
    density = np.concatenate(density, axis=1)
    mean, sd = density.mean(axis=1), density.std(axis=1)
    means = np.array([slide["od_mean"] for slide in training], dtype=float)
    sds = np.array([slide["od_sd"] for slide in training], dtype=float)
    out = []
    for c, name in enumerate(("red", "green", "blue")):
        away = np.abs(mean[c] - means[:, c]) / np.maximum(sds[:, c], 1e-6)
        if away.min() > FAR_MEAN:
            out.append(
                f"its mean optical density in {name} is {mean[c]:.2f}, {means[:, c].min():.2f} to {means[:, c].max():.2f} "
                "in training"
            )
        if not sds[:, c].min() / FAR_SD <= sd[c] <= sds[:, c].max() * FAR_SD:
            out.append(
                f"its optical density in {name} varies by {sd[c]:.2f} (sd), {sds[:, c].min():.2f} to {sds[:, c].max():.2f} "
                "in training"
            )
    return out
