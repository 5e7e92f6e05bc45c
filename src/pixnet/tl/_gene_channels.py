"""Genes of a program map as channels of an image."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from pixnet._core.parallel import run
from pixnet._logging import logger
from pixnet._sdata.gene_map import ProgramMap, program_map
from pixnet._sdata.record import identity
from pixnet._sdata.selection import Selection
from pixnet._sdata.store.bound import bound
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import MapWriter, store_level
from pixnet._sdata.target import check_target
from pixnet.tl._map_arguments import check_scale_factors

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

CHUNK_PX = 256
"""Side of the chunks of the new map, unless those of the program map are known."""


def gene_channels(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    image_key: str | None = None,
    key_added: str | None = None,
    scale_factors: Sequence[int] = (2, 2),
    overwrite: bool = False,
    inplace: bool = True,
) -> DataArray | None:
    """Write chosen genes of a program map as channels of an image, without running the model.

    Viewers such as napari show the channels of an image; programs have none for a gene. The new map is what
    `pixnet.tl.predict` with ``genes=`` would have written: a channel for each gene and the density of all transcripts.

    Parameters
    ----------
    sdata
        Object that holds a program map (`pixnet.tl.predict` with ``store="programs"``) and the table of its loadings.
    genes
        The genes, one name or several.
    image_key
        The program map. None: the only one.
    key_added
        Name of the new map. None: the name of the program map with ``"_genes"`` in place of ``"_programs"``.
    scale_factors
        How much coarser each level of its pyramid is than the one before.
    overwrite
        Replace an image of that name.
    inplace
        Store the map, add it to ``sdata`` and return None. False returns it as a lazy, single-scale DataArray and
        writes nothing.

    Returns
    -------
    DataArray or None
        ``(c, y, x)`` float32 with the names of the genes and ``__total__`` on ``c``; NaN where nothing was predicted.

    Raises
    ------
    KeyError
        If the object has no such map, its loadings are missing, or a gene is not in them.
    OSError
        If the disk is full. What was written is deleted.
    TypeError
        If an argument is of the wrong type.
    ValueError
        If the image is not a program map, its loadings were changed, ``scale_factors`` are not whole numbers from 2, or
        ``key_added`` exists.

    Examples
    --------
    >>> import pixnet as px
    >>> sdata = px.datasets.synthetic_tissue(size_um=300)
    >>> model = px.models.PixNet(["GENE1", "GENE2", "GENE3"], n_programs=2, mpp=0.5, pretrained=False)
    >>> px.tl.predict(sdata, model, store="programs", mask_key=False)
    >>> px.tl.gene_channels(sdata, "GENE2")
    >>> sdata["he_genes"]["scale0"]["image"].c.values.tolist()
    ['GENE2', '__total__']
    """
    check_scale_factors(scale_factors)
    opened = program_map(sdata, image_key)
    selection = opened.select(genes)
    key = _key(opened.key) if key_added is None else key_added
    if inplace:
        check_target(sdata, key, "images", overwrite=overwrite, source=opened.key)
    names = [*selection.genes, opened.total_name]
    transformations = get_transformation(sdata.images[opened.key], get_all=True)
    with bound(sdata.images[opened.key], f"image {opened.key!r}"):
        if not inplace:
            lazy = da.map_blocks(
                _genes_of, opened.data.data.rechunk({0: -1}), selection,
                chunks=((len(names),), *opened.data.data.chunks[1:]), dtype=np.float32, meta=np.empty((0, 0, 0), np.float32),
            )  # fmt: skip
            return Image2DModel.parse(lazy, dims=("c", "y", "x"), c_coords=names, transformations=transformations)
        _, height, width = opened.data.shape
        spec = MapSpec(names, (height, width), _chunk(opened), list(scale_factors), transformations)
        entry = {
            **(opened.made or {"kind": "gene_map"}),
            "store": "genes",
            "unit": "CP10k density",
            "from": opened.key,
            "genes": selection.genes,
            "identity": identity(names, (height, width)),
        }
        if opened.evidence is not None:
            entry["evidence"] = opened.evidence.take(selection.genes).as_entry()
        _write(sdata, key, opened, selection, spec, entry, overwrite)
    logger.info("added image sdata.images[%r]: %d genes of %r", key, len(selection.genes), opened.key)
    return None


def _key(program_key: str) -> str:
    return program_key.replace("_programs", "_genes") if "_programs" in program_key else f"{program_key}_genes"


def _chunk(opened: ProgramMap) -> int:
    """Return the side of a chunk: that of the program map, so that each is read and written once."""
    chunks = opened.data.data.chunks
    return max(int(chunks[1][0]), int(chunks[2][0])) if chunks is not None else CHUNK_PX


def _genes_of(programs: np.ndarray, selection: Selection) -> np.ndarray:
    """Return genes and total ``(c, y, x)`` of programs ``(c, y, x)``."""
    read = np.moveaxis(programs, 0, -1)
    total = selection.total(read)[..., None].astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(np.concatenate([selection.values(read), total], axis=-1), -1, 0))


def _write(
    sdata: SpatialData,
    key: str,
    opened: ProgramMap,
    selection: Selection,
    spec: MapSpec,
    entry: dict[str, Any],
    overwrite: bool,
) -> None:
    """Stream the map, chunk by chunk, and its pyramid; put it in its place."""
    writer = MapWriter.open(sdata, key, spec, {"run": uuid.uuid4().hex}, overwrite=overwrite)
    try:
        _, height, width = opened.data.shape
        side = spec.chunk
        places = list(np.ndindex(-(-height // side), -(-width // side)))
        source = opened.data.data
        items = ((source[:, i * side : (i + 1) * side, j * side : (j + 1) * side], i, j) for i, j in places)
        with closing(run(_write_chunk, [writer.arrays[0], selection, side], items)) as written:
            filled = [item[1:] for item, any_value in written if any_value]
        scale = 1
        for level, factor in enumerate(writer.factors, 1):
            scale *= factor
            tasks = writer.level_tasks(level, scale, filled, side)
            with closing(run(store_level, [*writer.arrays[level - 1 : level + 1], factor], tasks)) as chunks:
                for _ in chunks:
                    pass
        writer.finish(sdata, {"images": {key: entry}})
    except BaseException:
        if not writer.committed:
            writer.discard()
        raise


def _write_chunk(target: Any, selection: Selection, side: int, programs: np.ndarray, i: int, j: int) -> bool:
    """Write one chunk of the genes; False if it has no prediction."""
    programs = np.asarray(programs)
    if np.isnan(programs[-1]).all():
        return False
    target[:, i * side : (i + 1) * side, j * side : (j + 1) * side] = _genes_of(programs, selection)
    return True
