"""The stain and sharpness of a slide, compared with those of the slides that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixnet._core.slide.mask import TissueMask
from pixnet._core.slide.reader import SlideReader

WINDOWS, WINDOW_PX = 16, 256
CELLS_PX = (256, 64, 16)
"""Tissue is looked for in cells of this many model pixels, the largest first."""

Samples = Sequence[tuple[np.ndarray, np.ndarray]]

# Measured at 0.69 µm/px. Sections of one laboratory (her2st C and B): means 0.2 of a training slide's own sd apart, sd
# 1.3-fold, shares 0.02, detail 1.05-fold. H&E of other laboratories: 0.4, 2-fold, 0.10 to 0.12, 1.3 to 1.6-fold. Kidney
# with pale haematoxylin, and a faint, blurred brain: 0.9 and more, 4-fold and more, 0.3. A slide whose pixel size is
# stated twice too high: 1.9-fold. An optical density of a third: 0.85. Hues turned by 60 degrees: 0.09 to 0.11; by 120:
# 0.19.
FAR_MEAN, FAR_SD, FAR_SHARE, FAR_DETAIL = 0.75, 2.5, 0.08, 1.75
DETAIL_PX = 4
CHANNELS = ("red", "green", "blue")


def sample(reader: SlideReader, mask: TissueMask) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read small windows spread evenly over the tissue of a slide.

    Parameters
    ----------
    reader
        Reads the slide in model pixels.
    mask
        Tissue, asked per model output pixel.

    Returns
    -------
    list of tuple
        Pixels ``(3, n, n)`` uint8 at the model's pixel size, and the tissue among them, ``(n, n)`` bool. Empty if no
        window contains tissue.
    """
    stride, (rows, cols) = reader.grid.stride, reader.grid.shape
    out = []
    for size in CELLS_PX:
        cells = np.argwhere(mask.coarser(size / stride).window(0, 0, -(-rows // size), -(-cols // size)))
        if len(cells) == 0:
            continue
        side = WINDOW_PX // stride
        for y, x in cells[np.linspace(0, len(cells) - 1, min(WINDOWS, len(cells))).round().astype(int)]:
            # centred on the cell, at a map pixel
            y, x = (max(int(n) * size + (size - WINDOW_PX) // 2, 0) // stride for n in (y, x))
            tissue = mask.window(y, x, side, side).repeat(stride, axis=0).repeat(stride, axis=1)
            out.append((reader.read(y * stride, x * stride, WINDOW_PX, WINDOW_PX), tissue))
        break
    return out


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """Return the optical density, base 10, of uint8 light."""
    return -np.log10(np.maximum(pixels, 1).astype(np.float32) / 255)


def statistics(samples: Samples, masked: bool = True) -> dict[str, Any] | None:
    """Return statistics of a slide's stain and sharpness; None if there is no tissue.

    Parameters
    ----------
    samples
        Windows of the slide, from :func:`sample`.
    masked
        Whether the samples tell tissue from glass.

    Returns
    -------
    dict or None
        JSON-plain: ``od_mean`` and ``od_sd`` of the optical density of tissue in R, G and B; ``detail``, the share of
        its sd that lies within squares of 4 model pixels; ``masked``.
    """
    samples = [(optical_density(pixels), tissue) for pixels, tissue in samples if tissue.any()]
    if not samples:
        return None
    density = np.concatenate([values[:, tissue] for values, tissue in samples], axis=1).astype(float)
    fine = np.concatenate([_fine(values.mean(axis=0))[tissue] for values, tissue in samples]).astype(float)
    return {
        "od_mean": density.mean(axis=1).round(4).tolist(),
        "od_sd": density.std(axis=1).round(4).tolist(),
        "detail": round(float(np.sqrt((fine**2).mean()) / max(density.mean(axis=0).std(), 1e-6)), 4),
        "masked": masked,
    }


def slide_statistics(reader: SlideReader, mask: TissueMask) -> dict[str, Any] | None:
    """Return the :func:`statistics` of a slide's tissue, from samples of it."""
    return statistics(sample(reader, mask), masked=mask.masked)


def comparable(found: Mapping[str, Any], training: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """Return the training slides that a slide can be compared with: without a mask, glass counts as tissue."""
    return [slide for slide in training or () if slide.get("masked", True) == found["masked"]]


def _fine(values: np.ndarray) -> np.ndarray:
    """Subtract the mean of each small square."""
    n, k = WINDOW_PX // DETAIL_PX, DETAIL_PX
    squares = values.reshape(n, k, n, k)
    return (squares - squares.mean(axis=(1, 3), keepdims=True)).reshape(values.shape)


def matching_table(found: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the table of new values of R, G and B that gives tissue the optical density of the training slides.

    Parameters
    ----------
    found
        The slide's :func:`statistics`.
    training
        Those of the training slides (`comparable`); the table aims at their average.

    Returns
    -------
    numpy.ndarray
        ``(3, 256)`` uint8.
    """
    mean, sd = (np.array(found[name])[:, None] for name in ("od_mean", "od_sd"))
    aim, spread = (np.mean([slide[name] for slide in training], axis=0)[:, None] for name in ("od_mean", "od_sd"))
    density = (optical_density(np.arange(256)[None, :]) - mean) * (spread / np.maximum(sd, 1e-6)) + aim
    return (255 * np.power(10.0, -density)).clip(0, 255).round().astype(np.uint8)


def apply_table(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look each value of ``(3, y, x)`` up in the table of its channel."""
    return np.stack([values[channel] for values, channel in zip(table, pixels)])


def differences(found: Mapping[str, Any] | None, training: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return the differences between a slide and all of the training slides, in words; empty if they are small.

    Parameters
    ----------
    found
        The slide's :func:`statistics`.
    training
        The statistics of each training slide.
    """
    if found is None or not (training := comparable(found, training)):
        return []
    mean, sd = np.array(found["od_mean"]), np.array(found["od_sd"])
    means, sds = (np.array([slide[name] for slide in training], dtype=float) for name in ("od_mean", "od_sd"))
    share, shares = mean / mean.sum().clip(1e-6), means / means.sum(axis=1, keepdims=True).clip(1e-6)
    out = []
    for c, name in enumerate(CHANNELS):
        if (np.abs(mean[c] - means[:, c]) / sds[:, c].clip(1e-6)).min() > FAR_MEAN:
            out.append(f"its mean optical density in {name} is {mean[c]:.2f}, {_range(means[:, c])} in training")
        if not sds[:, c].min() / FAR_SD <= sd[c] <= sds[:, c].max() * FAR_SD:
            out.append(f"its optical density in {name} varies by {sd[c]:.2f} (sd), {_range(sds[:, c])} in training")
        if np.abs(share[c] - shares[:, c]).min() > FAR_SHARE:
            out.append(
                f"{name} makes up {share[c]:.0%} of its optical density, {_range(shares[:, c], '.0%')} in training"
            )
    details = np.array([slide["detail"] for slide in training if "detail" in slide])
    if details.size and not details.min() / FAR_DETAIL <= found["detail"] <= details.max() * FAR_DETAIL:
        what = "less" if found["detail"] < details.min() else "more"
        out.append(
            f"it has {what} fine detail ({found['detail']:.2f} of its contrast, {_range(details)} in training), as if blurred, "
            "noisy, or recorded with a wrong pixel size (pixnet.pp.set_mpp)"
        )
    return out


def _range(values: np.ndarray, form: str = ".2f") -> str:
    low, high = f"{values.min():{form}}", f"{values.max():{form}}"
    return low if low == high else f"{low} to {high}"
