"""A map opened once, of genes or of programs: it answers for genes, whatever is stored.

What a map holds is told by the names of its channels, which travel with the image. `Selection` says which channels some
genes need, and turns what was read into values of the genes. All of it is linear, so sums over shapes are turned as
pixels are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from xarray import DataArray

from pixnet._core.zonal import Mean, Statistic, Sum
from pixnet._names import TOTAL, TOTALS, check_genes, is_total, listed
from pixnet._programs import fingerprint, fingerprint_in, is_program
from pixnet._sdata.counts import dense
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.keys import resolve_any_image
from pixnet._sdata.loadings import is_loadings, lift
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names, full_resolution, is_gene_map

TRUSTED = "trusted"
"""In place of names: the genes that held-out shapes showed to be predicted."""


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


@dataclass(frozen=True)
class GeneMap(ABC):
    """A map of genes or of programs.

    Attributes
    ----------
    key
        Name of the image.
    data
        Full-resolution level, ``(c, y, x)``.
    genes
        Names of the genes that it answers for.
    mpp
        Pixel size (µm/px); None if it is unknown.
    evidence
        What held-out shapes showed of the genes; None if it is unknown.
    """

    key: str
    data: DataArray
    genes: list[str]
    mpp: float | None
    evidence: GeneEvidence | None
    total_name: ClassVar[str] = TOTAL
    quantity: ClassVar[str] = "density"

    @staticmethod
    def open(sdata: SpatialData, image_key: str) -> GeneMap:
        """Read what a map says of itself; reads no pixel.

        Raises
        ------
        ValueError
            If the image is not a map of pixnet's, what it holds is unknown, or its loadings are not those it was made with.
        KeyError
            If the loadings of a program map are missing.
        """
        image = sdata.images[image_key]
        if not is_gene_map(image):
            raise ValueError(
                f"image {image_key!r} is not a gene map (it has neither a channel {listed(TOTALS.values())} nor programs); "
                "make one with pixnet.tl.predict"
            )
        names, mpp, data = channel_names(image), find_mpp(sdata, image_key), full_resolution(image)
        if any(map(is_program, names)):
            return _open_programs(sdata, image_key, data, names, mpp)
        totals = [name for name in names if is_total(name)]
        if len(totals) > 1:
            raise ValueError(
                f"gene map {image_key!r} has several totals ({listed(totals)}), so that it is not clear what its genes are; "
                "keep the one that belongs to them"
            )
        kinds = {kind.total_name: kind for kind in (ChannelMap, LogSumMap)}
        if totals[0] not in kinds:
            raise ValueError(
                f"gene map {image_key!r} has the total {totals[0]!r}, of a quantity that this version of pixnet does not know; "
                f"it knows {listed(TOTALS.values())}"
            )
        genes = [name for name in names if name != totals[0]]
        evidence = GeneEvidence.of_record(sdata, image_key)
        return kinds[totals[0]](image_key, data, genes, mpp, evidence, names)

    def select(self, genes: str | Sequence[str] | None = None) -> Selection:
        """Choose genes; None: all, ``"trusted"``: those that held-out shapes showed to be predicted.

        Raises
        ------
        KeyError
            If the map does not have one of them.
        ValueError
            If the trusted genes are asked for and nothing, or nothing good, is known of them.
        """
        if isinstance(genes, str) and genes == TRUSTED and TRUSTED not in self.genes:
            return self._selection(self._trusted())
        chosen = list(self.genes) if genes is None else check_genes(genes, among=self.genes, where=self._where)
        return self._selection(chosen)

    def _trusted(self) -> list[str]:
        if self.evidence is None:
            raise ValueError(
                f"genes='{TRUSTED}' needs what held-out shapes showed of each gene, and {self._where} has none: its model was "
                "trained by an earlier version, or the record of the map was lost. Predict again with a model that "
                "pixnet.tl.train made"
            )
        found = [gene for gene in self.evidence.trusted() if gene in set(self.genes)]
        if not found:
            raise ValueError(
                f"{self._where} has no gene that held-out shapes showed to be predicted; name genes instead"
            )
        return found

    @property
    def _where(self) -> str:
        return f"gene map {self.key!r}"

    @abstractmethod
    def _selection(self, genes: list[str]) -> Selection: ...

    @property
    def validity(self) -> int:
        """Position of a channel that is NaN where there is no prediction."""
        return self.only_total.channels[-1]

    @property
    def only_total(self) -> Selection:
        """No gene, only the density of all transcripts."""
        return self._selection([])

    @property
    def pixel_um2(self) -> float:
        """Area of a pixel (µm²); NaN if it is unknown."""
        return float("nan") if self.mpp is None else self.mpp**2


@dataclass(frozen=True)
class ChannelMap(GeneMap):
    """A map with a channel for each gene. ``channels`` are the names of all channels."""

    channels: list[str]
    _kind: ClassVar[type[GeneSelection]] = GeneSelection

    def _selection(self, genes: list[str]) -> Selection:
        position = {name: i for i, name in enumerate(self.channels)}
        return self._kind(genes, [*(position[gene] for gene in genes), position[self.total_name]])


@dataclass(frozen=True)
class LogSumMap(ChannelMap):
    """A map of the published quantity."""

    total_name: ClassVar[str] = TOTALS["log_sum"]
    quantity: ClassVar[str] = "log_sum"
    _kind: ClassVar[type[GeneSelection]] = LogSumSelection


@dataclass(frozen=True)
class ProgramMap(GeneMap):
    """A map of programs, with the loadings that it was made with, programs by genes, in the order of the channels.

    Attributes
    ----------
    programs
        Names of the channels.
    table_key
        Name of the table of loadings.
    loadings
        ``(programs, genes)`` float32.
    """

    programs: list[str]
    table_key: str
    loadings: np.ndarray

    def _selection(self, genes: list[str]) -> Selection:
        position = {name: i for i, name in enumerate(self.genes)}
        columns = self.loadings if genes == self.genes else self.loadings[:, [position[gene] for gene in genes]]
        return ProgramSelection(genes, list(range(len(self.programs))), columns)

    @property
    def all_programs(self) -> ProgramSelection:
        """The programs themselves, without a gene."""
        return ProgramSelection([], list(range(len(self.programs))), self.loadings[:, :0])

    def short_name(self, i: int) -> str:
        """Return the name of a program without its fingerprint."""
        return self.programs[i].split(".")[0]

    def lift(self, i: int, n: int) -> tuple[list[str], np.ndarray]:
        """Return the top genes of a program, and their share over the mean of all programs."""
        found = lift(self.loadings)[i]
        order = np.argsort(-found, kind="stable")[:n]
        return [self.genes[j] for j in order], found[order]

    def top_genes(self, i: int, n: int) -> str:
        """Return the names of the top genes of a program, as one string."""
        return " ".join(self.lift(i, n)[0])


def program_map(sdata: SpatialData, image_key: str | None = None) -> ProgramMap:
    """Return the program map that a call means: the one named, or the only one.

    Raises
    ------
    KeyError
        If there is no such image, or its loadings are missing.
    ValueError
        If it is not a program map, or if none is named and none or several could be meant.
    """
    if image_key is not None:
        found = GeneMap.open(sdata, resolve_any_image(sdata, image_key))
        if not isinstance(found, ProgramMap):
            raise ValueError(f"gene map {image_key!r} has a channel for each gene already; a program map is needed")
        return found
    opened = [GeneMap.open(sdata, key) for key in sdata.images if is_gene_map(sdata.images[key])]
    maps = [one for one in opened if isinstance(one, ProgramMap)]
    if len(maps) == 1:
        return maps[0]
    if maps:
        raise ValueError(f"several images are program maps: {listed(m.key for m in maps)}; name one with image_key=")
    have = f" (its gene maps {listed(m.key for m in opened)} have a channel for each gene)" if opened else ""
    raise ValueError(f"this object has no program map{have}; make one with pixnet.tl.predict(..., store='programs')")


def _open_programs(sdata: SpatialData, key: str, data: DataArray, names: list[str], mpp: float | None) -> GeneMap:
    """Find the loadings of a program map among the tables, by their names: they may have been renamed or reordered."""
    others = [name for name in names if not is_program(name)]
    if others:
        raise ValueError(
            f"program map {key!r} has other channels beside its programs: {listed(others[:5])}; take them out"
        )
    marks = {fingerprint_in(name) for name in names}
    if len(marks) > 1:
        raise ValueError(f"image {key!r} has programs of several models, so that it is not clear what their sum is")
    candidates = {k: t for k, t in sdata.tables.items() if marks & {fingerprint_in(n) for n in _programs_of(t)}}
    if not candidates:
        others = [k for k, table in sdata.tables.items() if is_loadings(table)]
        have = f" (the loadings in {listed(others)} are those of another model)" if others else ""
        raise KeyError(
            f"the loadings of program map {key!r} are missing{have}: without them its programs say nothing of genes. Copy "
            "the table from the object that the map came from (a crop keeps it with filter_table=False), or predict again"
        )
    table_key, table = next(iter(candidates.items()))
    programs, genes = [str(n) for n in table.obs_names], [str(n) for n in table.var_names]
    if sorted(programs) != sorted(names):
        raise ValueError(
            f"program map {key!r} has {len(names)} programs and its loadings, table {table_key!r}, {len(programs)}: "
            "both are needed whole; copy the table again, or predict again"
        )
    order = [programs.index(name) for name in sorted(names)]
    matrix = dense(table.X).astype(np.float32, copy=False)
    if fingerprint(matrix[order], genes) not in marks:
        raise ValueError(
            f"table {table_key!r} was changed since program map {key!r} was made: its values or its genes are not those "
            "that the programs' names stand for. Copy the table again, or predict again"
        )
    loadings = matrix[[programs.index(name) for name in names]]
    return ProgramMap(key, data, genes, mpp, GeneEvidence.of_table(table), names, table_key, loadings)


def _programs_of(table: AnnData) -> list[str]:
    return [str(name) for name in table.obs_names] if is_loadings(table) else []
