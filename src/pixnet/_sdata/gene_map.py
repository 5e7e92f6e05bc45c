"""A map opened once, of genes or of programs: it answers for genes, whatever is stored.

What a map holds is told by the names of its channels, which travel with the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from xarray import DataArray

from pixnet._names import TOTAL, TOTALS, check_genes, is_total, listed
from pixnet._programs import fingerprint, fingerprint_in, is_program
from pixnet._sdata.counts import dense
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.inputs import check_sdata
from pixnet._sdata.keys import resolve_any_image
from pixnet._sdata.loadings import is_loadings, lift
from pixnet._sdata.pixel_size import find_mpp
from pixnet._sdata.rasters import channel_names, full_resolution, is_gene_map
from pixnet._sdata.record import find_entry
from pixnet._sdata.selection import GeneSelection, LogSumSelection, ProgramSelection, Selection

TRUSTED = "trusted"
"""In place of names: the genes that held-out shapes showed to be predicted."""


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
    made
        What is recorded of how it was made: its model, the image that it was predicted from; empty if nothing is.
    evidence
        What held-out shapes showed of the genes; None if it is unknown.
    """

    key: str
    data: DataArray
    genes: list[str]
    mpp: float | None
    made: Mapping[str, Any]
    evidence: GeneEvidence | None
    total_name: ClassVar[str] = TOTAL
    quantity: ClassVar[str] = "density"

    @staticmethod
    def open(sdata: SpatialData, image_key: str | None = None) -> GeneMap:
        """Check an object, resolve a map, and read what it says of itself; reads no pixel.

        Raises
        ------
        KeyError
            If there is no such image, or the loadings of a program map are missing.
        TypeError
            If it is not a SpatialData object.
        ValueError
            If the image is not a map of pixnet's, what it holds is unknown, or its loadings are not those it was made
            with; or if none is named and none or several could be meant.
        """
        check_sdata(sdata)
        image_key = resolve_any_image(sdata, image_key)
        image = sdata.images[image_key]
        if not is_gene_map(image):
            raise ValueError(
                f"image {image_key!r} is not a gene map (it has neither a channel {listed(TOTALS.values())} nor programs); "
                "make one with pixnet.tl.predict"
            )
        names, mpp, data = channel_names(image), find_mpp(sdata, image_key), full_resolution(image)
        made = find_entry(sdata, "images", image_key) or {}
        if any(map(is_program, names)):
            return _open_programs(sdata, image_key, data, names, mpp, made)
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
        evidence = GeneEvidence.of_record(made)
        return kinds[totals[0]](image_key, data, genes, mpp, made, evidence, names)

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
                f"held-out shapes did not show any gene of {self._where} to be predicted; name genes instead"
            )
        return found

    @property
    def source(self) -> str | None:
        """The image that the map was predicted from, if it is recorded."""
        return self.made.get("image_key")

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

    @cached_property
    def _lift(self) -> np.ndarray:
        return lift(self.loadings)

    def lift(self, i: int, n: int) -> tuple[list[str], np.ndarray]:
        """Return the top genes of a program, and their share over the mean of all programs."""
        found = self._lift[i]
        order = np.argsort(-found, kind="stable")[:n]
        return [self.genes[j] for j in order], found[order]

    def top_genes(self, i: int, n: int) -> str:
        """Return the names of the top genes of a program, as one string."""
        return " ".join(self.lift(i, n)[0])


def all_maps(sdata: SpatialData) -> list[GeneMap]:
    """Open every map of an object."""
    return [GeneMap.open(sdata, key) for key in sdata.images if is_gene_map(sdata.images[key])]


def program_map(sdata: SpatialData, image_key: str | None = None) -> ProgramMap:
    """Return the program map that a call means: the one named, or the only one.

    Raises
    ------
    KeyError
        If there is no such image, or its loadings are missing.
    ValueError
        If it is not a program map, or if none is named and none or several could be meant.
    """
    check_sdata(sdata)
    if image_key is not None:
        found = GeneMap.open(sdata, image_key)
        if not isinstance(found, ProgramMap):
            raise ValueError(f"gene map {image_key!r} has a channel for each gene already; a program map is needed")
        return found
    opened = all_maps(sdata)
    maps = [one for one in opened if isinstance(one, ProgramMap)]
    if len(maps) == 1:
        return maps[0]
    if maps:
        raise ValueError(f"several images are program maps: {listed(m.key for m in maps)}; name one with image_key=")
    have = f" (its gene maps {listed(m.key for m in opened)} have a channel for each gene)" if opened else ""
    raise ValueError(f"this object has no program map{have}; make one with pixnet.tl.predict(..., store='programs')")


def _open_programs(
    sdata: SpatialData, key: str, data: DataArray, names: list[str], mpp: float | None, made: Mapping[str, Any]
) -> GeneMap:
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
            "the table from the object that the map came from (SpatialData's query keeps it with filter_table=False, and "
            "filter_by_coordinate_system with filter_tables=False), or predict again"
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
    return ProgramMap(key, data, genes, mpp, made, GeneEvidence.of_table(table), names, table_key, loadings)


def _programs_of(table: AnnData) -> list[str]:
    return [str(name) for name in table.obs_names] if is_loadings(table) else []
