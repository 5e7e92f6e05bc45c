"""Predict a map into its writer: tiles, pyramid, progress, and what an interruption leaves."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pixnet._logging import logger
from pixnet._sdata.store.map_spec import MapSpec
from pixnet._sdata.store.map_writer import MapWriter, store_level
from pixnet._settings import settings

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from pixnet._core.predict.tile_runner import TileRunner


def write_map(
    sdata: SpatialData,
    key: str,
    runner: TileRunner,
    spec: MapSpec,
    job: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    *,
    tables: Mapping[str, AnnData] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Run all tiles of a map and its pyramid, put it in its place, and record what is known of it.

    Parameters
    ----------
    sdata
        The object that gets the map.
    key
        Its name.
    runner
        Predicts the tiles; those that an earlier run wrote are left out.
    spec, job, resume, overwrite
        See :meth:`MapWriter.open`.
    entries
        What is recorded of the map, and of its novelty, by name.
    tables
        Tables that belong to it, by name: they are put in place with it.

    Raises
    ------
    OSError
        If the disk is full; what was written is deleted. After any other error, and Ctrl-C, it is kept for a call with
        ``resume=True``.
    """
    writer = MapWriter.open(sdata, key, spec, job, resume=resume, overwrite=overwrite)
    try:
        _run_tiles(writer, runner)
        writer.finish(sdata, {"images": entries}, tables)
    except BaseException as error:
        if writer.committed:
            raise
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            writer.discard()
            raise OSError(
                error.errno,
                f"the disk of {writer.root} is full; the unfinished map {key!r} was deleted, and the store is as it was. "
                "Make room, ask for fewer genes (genes=) or a coarser map (out_mpp=)",
            ) from error
        if writer.interrupt():
            logger.warning("the map %r is unfinished; the same call with resume=True continues it", key)
        raise


def _run_tiles(writer: MapWriter, runner: TileRunner) -> None:
    """Predict the tiles that are missing, then the coarser levels."""
    from pixnet._core.parallel import run
    from pixnet._core.predict.tile_runner import TileCost, store_tiles

    started, total, grid = time.perf_counter(), TileCost(), runner.grid
    tiles, pixel_area = runner.tiles(), (grid.model_grid.stride * grid.ratio) ** 2
    todo = [tile for tile in tiles if tile not in writer.done]
    if writer.done:
        logger.info("resuming %r: %d of %d tiles are done", writer.key, len(tiles) - len(todo), len(tiles))
    _warn_if_full(writer, len(todo))
    progress = tqdm(
        total=len(tiles),
        initial=len(tiles) - len(todo),
        desc=f"predict {writer.key}",
        unit="tile",
        file=sys.stderr,
        disable=not settings.progress,
    )
    # levels that tiles hold whole blocks of are made from pixels in memory, others from those in the store
    n = writer.levels_of_tiles(grid.tile)
    coarser = list(zip(writer.arrays[1 : n + 1], writer.factors))
    # closing: whatever happens, no task writes any more when the writer is dealt with
    with closing(store_tiles(runner, writer.arrays[0], todo, coarser)) as results, progress as bar:
        for place, cost, novelty in results:
            writer.mark(*place, novelty)
            total.add(cost)
            speed = total.pixels * pixel_area / 1e6 / (time.perf_counter() - started)
            bar.set_postfix_str(f"{speed:.2f} Mpx/s", refresh=False)
            bar.update()
    scale = 1
    for level, factor in enumerate(writer.factors, 1):
        scale *= factor
        if level <= n:
            continue
        tasks = writer.level_tasks(level, scale, tiles, grid.tile)
        with closing(run(store_level, [*writer.arrays[level - 1 : level + 1], factor], tasks)) as chunks:
            for _ in chunks:
                pass
    wall = time.perf_counter() - started
    logger.info(
        "%r: %d channels, %d x %d px at %.3g µm/px, %.3g M px predicted, in %.1f s (%.2f Mpx/s; %.1f s in the "
        "model); %.2f GB in %s",
        writer.key,
        runner.n_channels,
        *grid.shape,
        grid.mpp,
        total.pixels / 1e6,
        wall,
        total.pixels * pixel_area / 1e6 / wall,
        total.forward,
        writer.size / 1e9,
        writer.root,
    )


def _warn_if_full(writer: MapWriter, n_tiles: int) -> None:
    """Say early that the disk will not do; what compression saves is not known, so this is not an error."""
    array = writer.arrays[0]
    needed = 1.3 * n_tiles * array.shape[0] * array.chunks[1] * array.chunks[2] * np.dtype(array.dtype).itemsize
    free = shutil.disk_usage(writer.root).free
    if needed > free:
        logger.warning(
            "the map may take %.1f GB and %s has %.1f GB free: ask for fewer genes (genes=), a coarser map (out_mpp=), "
            "or make room",
            needed / 1e9,
            writer.root,
            free / 1e9,
        )
