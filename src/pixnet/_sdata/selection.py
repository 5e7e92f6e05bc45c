"""Some genes of a map: which channels they need, and how their values follow from what was read.

All of it is linear, so sums over shapes are turned into genes as pixels are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pixnet._core.zonal import Mean, Statistic, Sum


@dataclass(frozen=True)
class Selection(ABC):
    """Some genes of a map.

    Attributes
    ----------
    genes
        Names of the genes.
    channels
        Channels to read, by position. The last of them is NaN where there is no prediction.
    """

    genes: list[str]
    channels: list[int]
    unit: ClassVar[str] = "density"
    label: ClassVar[str] = "density of transcripts"
    needs: ClassVar[tuple[Statistic, ...]] = (Mean(),)
    """Statistics of the channels that CP10k is made of."""
    pixels_have_cp10k: ClassVar[bool] = True
    mixed: ClassVar[bool] = False
    """Whether a gene is a sum of several channels."""

    @abstractmethod
    def values(self, read: np.ndarray) -> np.ndarray:
        """Return the values of the genes ``(..., genes)`` from those of the channels ``(..., channels)``."""

    @abstractmethod
    def total(self, read: np.ndarray) -> np.ndarray:
        """Return the density of all transcripts ``(...)``."""

    def cp10k(self, found: dict[str, np.ndarray], pixel_um2: float) -> np.ndarray:
        """Return CP10k ``(shapes, genes)`` from statistics of the channels ``(shapes, channels)``, those of ``needs``."""
        return self.pixel_cp10k(found[Mean.name])

    def pixel_cp10k(self, read: np.ndarray) -> np.ndarray:
        """Return densities as parts of 10,000 of all transcripts; NaN where there are none."""
        total = self.total(read)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.values(read) / np.where(total > 0, total / 1e4, np.nan)[..., None].astype(np.float32)

    def check_pixels(self) -> None:
        """Refuse CP10k of pixels where a pixel by itself has none."""
        if not self.pixels_have_cp10k:
            raise ValueError(
                "the map holds 'log_sum' (log1p CP10k per µm²), which is CP10k only when summed over shapes: draw the map as it "
                "is (show='density'), or a table (pixnet.pl.scales(..., image_key=False))"
            )

    def check_statistic(self, statistic: Statistic) -> None:
        """Refuse a statistic that cannot be had from what is stored."""
        if self.mixed and not statistic.linear:
            raise ValueError(
                f"{statistic.name!r} of a gene cannot be had from that of programs: write the genes as channels first, with "
                "pixnet.tl.gene_channels(sdata, genes), and aggregate that map"
            )


@dataclass(frozen=True)
class GeneSelection(Selection):
    """Genes that have a channel each; the total is the last channel."""

    def values(self, read: np.ndarray) -> np.ndarray:
        """Return all channels but the last."""
        return read[..., :-1]

    def total(self, read: np.ndarray) -> np.ndarray:
        """Return the last channel."""
        return read[..., -1]


@dataclass(frozen=True)
class LogSumSelection(GeneSelection):
    """Genes whose sum over a shape is its log1p CP10k (the published quantity)."""

    unit: ClassVar[str] = "log1p CP10k / um^2"
    label: ClassVar[str] = "log1p CP10k / µm²"
    needs: ClassVar[tuple[Statistic, ...]] = (Mean(), Sum())
    pixels_have_cp10k: ClassVar[bool] = False

    def cp10k(self, found: dict[str, np.ndarray], pixel_um2: float) -> np.ndarray:
        """Undo the logarithm of sums."""
        return np.expm1(self.values(found[Sum.name]) * np.float32(pixel_um2))


@dataclass(frozen=True)
class ProgramSelection(Selection):
    """Genes of a program map: all programs are read. ``loadings`` is ``(channels, genes)``."""

    loadings: np.ndarray
    mixed: ClassVar[bool] = True

    def programs(self, read: np.ndarray) -> np.ndarray:
        """Return programs as parts of 10,000 of all transcripts."""
        total = self.total(read)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (read / np.where(total > 0, total / 1e4, np.nan)[..., None]).astype(np.float32)

    def values(self, read: np.ndarray) -> np.ndarray:
        """Multiply by the loadings."""
        return np.matmul(read, self.loadings, dtype=np.float32)

    def total(self, read: np.ndarray) -> np.ndarray:
        """Add the programs up."""
        return read.sum(axis=-1, dtype=np.float64)
