"""What a prediction is asked for: model, genes, grid, region and device, all resolved and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialdata.transformations import Scale, Translation
from spatialdata.transformations import Sequence as Chain

from pixnet._core.predict.map_grid import MapGrid, choose_map_grid
from pixnet._logging import logger
from pixnet._names import MOST_CHANNELS, check_genes
from pixnet._sdata.evidence import GeneEvidence
from pixnet._sdata.gene_map import TRUSTED
from pixnet._sdata.loadings import loadings_table
from pixnet._sdata.novelty import NoveltySpec
from pixnet._sdata.region import read_region
from pixnet._sdata.slide import Slide
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import fingerprint
from pixnet._settings import settings

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from pixnet._core.coverage import ShapeArrays
    from pixnet.models import PixNet

Store = Literal["genes", "programs"]


@dataclass(frozen=True)
class MapRequest:
    """A prediction with all names resolved and all arguments checked."""

    slide: Slide
    model: PixNet
    model_name: str | None
    genes: list[str]
    channels: list[int] | None
    names: list[str]
    store: Store
    grid: MapGrid
    region: ShapeArrays | None
    scale_factors: list[int]
    device: torch.device
    precision: str
    threads: int | None

    def loadings(self, key: str, prefix: str) -> dict[str, AnnData]:
        """Return the table of loadings by its name; empty for a map of genes."""
        found = self.model.loadings if self.store == "programs" else None
        if found is None:
            return {}
        return {f"{prefix}_loadings": loadings_table(found, key, self.model_name, self.evidence)}

    @property
    def evidence(self) -> GeneEvidence | None:
        """What held-out shapes showed of the genes."""
        found = self.model.evidence
        return None if found is None else GeneEvidence.of(found, self.model.genes).take(self.genes)

    def novelty(self, prefix: str) -> NoveltySpec | None:
        """Return the image of novelty that comes with the map; None for a model that does not know what is new to it."""
        if not self.model.novelty.known:
            return None
        grid, side = self.grid.model_grid, self.model.novelty.stride
        shape = -(-grid.shape[0] // side), -(-grid.shape[1] // side)
        return NoveltySpec(f"{prefix}_novelty", shape, self._transformations(grid.px[0] * side, grid.px[1] * side))

    @property
    def transformations(self) -> dict[str, Any]:
        """Transformations of the map to each coordinate system of the image."""
        return self._transformations(*self.grid.slide_px)

    def _transformations(self, y: float, x: float) -> dict[str, Any]:
        """Return transformations from pixels of ``(y, x)`` level-0 pixels to each coordinate system of the image."""
        to_image: list[Any] = [Scale([x, y], axes=("x", "y"))]
        margin, px = self.grid.model_grid.margin, self.grid.model_grid.px
        if any(margin):
            to_image.append(Translation([-margin[1] * px[1], -margin[0] * px[0]], axes=("x", "y")))
        return {name: Chain([*to_image, system]) for name, system in self.slide.transformations.items()}

    def spec(self, novelty: NoveltySpec | None) -> MapSpec:
        """Return the form of the stored element, and of the image of novelty that is written with it."""
        grid = self.grid
        return MapSpec(self.names, grid.shape, grid.chunk, self.scale_factors, self.transformations, novelty)

    def asked(self, model_hash: str) -> dict[str, Any]:
        """Return everything that determines the map, apart from pixels (JSON-plain)."""
        return {
            "image_key": self.slide.key,
            "image_mpp": self.slide.mpp,
            "mask_key": self.slide.mask_key,
            **({} if self.region is None else {"region": _described(self.region)}),
            "genes": self.genes if self.store == "genes" else [],
            "store": self.store,
            "model_hash": model_hash,
            "model_mpp": self.model.mpp,
            "mpp": self.grid.mpp,
            "shape": list(self.grid.shape),
            "tile_size": self.grid.tile_size,
            "scale_factors": self.scale_factors,
            "precision": self.precision,
            "device": self.device.type,
            "torch_threads": self.threads,
        }


def resolve_request(
    slide: Slide,
    model: PixNet | str | Path | None,
    genes: str | Sequence[str] | None,
    store: Store | None,
    region: Any,
    out_mpp: float | None,
    tile_size: int | None,
    scale_factors: Sequence[int],
    precision: str | None,
    device: str | None,
) -> MapRequest:
    """Resolve and check the model, the genes, the grid and where to run."""
    import torch

    from pixnet._core.predict.device import resolve_device, resolve_precision
    from pixnet.models._load import resolve_model

    on = resolve_device(settings.device if device is None else device)
    precision = resolve_precision(settings.precision if precision is None else precision, on)
    resolved, model_name = resolve_model(model)
    store = _resolve_store(resolved, genes, store)
    chosen, channels, names = _resolve_genes(resolved, genes, store)
    grid = slide.grid(resolved.mpp, resolved.stride, anchored=True)
    wide, reach = on.type == "cuda", resolved.reach
    tiles = choose_map_grid(grid, resolved.window, resolved.halo, out_mpp, tile_size, wide, reach)
    if grid.enlarged:
        logger.warning(
            "image %r has %.3g µm/px, coarser than the %.3g µm/px of the model: it is enlarged, and detail that the model "
            "was trained on is missing; expect worse maps",
            slide.key,
            slide.mpp,
            resolved.mpp,
        )
    factors = [int(factor) for factor in scale_factors]
    within = read_region(slide, region)
    threads = torch.get_num_threads() if on.type == "cpu" else None
    return MapRequest(
        slide, resolved, model_name, chosen, channels, names, store, tiles, within, factors, on, precision, threads
    )


def _described(region: ShapeArrays) -> dict[str, Any]:
    """Return the bounding box of a region in pixels of the slide, and a hash of its shapes (JSON-plain)."""
    box = [*region.bounds[:, :2].min(axis=0), *region.bounds[:, 2:].max(axis=0)]
    return {"box": [float(n) for n in box], "hash": fingerprint([region.coords, region.ring_offsets])}


def _resolve_store(model: PixNet, genes: str | Sequence[str] | None, store: Store | None) -> Store:
    """Return what the map stores."""
    if store not in (None, "genes", "programs"):
        raise ValueError(f"store is {store!r}; valid: 'genes', 'programs', None")
    has_programs = model.config.n_programs is not None
    if store == "programs":
        if not has_programs:
            raise ValueError(
                "store is 'programs', and this model has a channel for each gene; leave store= out, or train one with "
                "n_programs="
            )
        if genes is not None:
            raise ValueError(
                "a map of programs answers for all genes of the model; leave out genes=, or pass store='genes'"
            )
    if store is not None:
        return store
    return "programs" if has_programs and genes is None and len(model.genes) > MOST_CHANNELS else "genes"


def _resolve_genes(
    model: PixNet, genes: str | Sequence[str] | None, store: Store
) -> tuple[list[str], list[int] | None, list[str]]:
    """Return the genes of the map, what the model is asked for (None: all its channels), and the channels' names."""
    if store == "programs":
        return model.genes, None, model.channels
    if isinstance(genes, str) and genes == TRUSTED and TRUSTED not in model.genes:
        genes = _trusted(model)
    chosen = model.genes if genes is None else check_genes(genes, among=model.genes, where="the model")
    names = model.head.gene_channels(chosen)
    if names == model.channels:
        return chosen, None, names
    position = {gene: k for k, gene in enumerate(model.genes)}
    return chosen, [*(position[gene] for gene in chosen), len(model.genes)], names


def _trusted(model: PixNet) -> list[str]:
    """Return the genes that held-out shapes showed to be predicted, or refuse."""
    found = [] if model.evidence is None else GeneEvidence.of(model.evidence, model.genes).trusted()
    if not found:
        why = (
            "no evidence of its genes"
            if model.evidence is None
            else "no gene that held-out shapes showed to be predicted"
        )
        raise ValueError(f"genes is {TRUSTED!r}, and this model has {why}; name genes, or train with pixnet.tl.train")
    return found
