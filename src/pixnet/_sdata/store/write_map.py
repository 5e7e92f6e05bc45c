"""Run a map into its stream: tiles, pyramid, progress, and what an interruption leaves."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pixnet._logging import logger
from pixnet._sdata.record import recording
from pixnet._sdata.store.map_writer import store_level
from pixnet._settings import settings

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from pixnet._core.predict.tile_runner import TileRunner
    from pixnet._sdata.store.map_writer import MapWriter


def store_map(runner: TileRunner, stream: MapWriter, sdata: SpatialData, key: str, entry: dict[str, Any]) -> None:
    """Run all tiles of a map and its pyramid into a stream, put it in its place, and record what is known of it.

    Parameters
    ----------
    runner
        Predicts the tiles.
    stream
        Where they go; tiles that an earlier run wrote are left out.
    sdata
        The object that gets the map.
    key
        Its name.
    entry
        What is recorded of it.

    Raises
    ------
    OSError
        If the disk is full; what was written is deleted. After any other error, and Ctrl-C, it is kept for a call with
        ``resume=True``.
    """
    from pixnet._core.parallel import run_tasks
    from pixnet._core.predict.tile_runner import TileCost, store_tile

    started, total = time.perf_counter(), TileCost()
    tiles = runner.tiles()
    todo = [tile for tile in tiles if tile not in stream.done]
    if stream.done:
        logger.info("resuming %r: %d of %d tiles are done", key, len(tiles) - len(todo), len(tiles))
    try:
        _warn_if_full(stream, len(todo), entry["params"]["dtype"])
        results = run_tasks(store_tile, [runner, stream.arrays[0]], todo)
        # closing: whatever happens, no task writes any more when the stream is dealt with
        with (
            closing(results),
            tqdm(
                total=len(tiles),
                initial=len(tiles) - len(todo),
                desc=f"predict {key}",
                unit="tile",
                file=sys.stderr,
                disable=not settings.progress,
            ) as bar,
        ):
            for i, j, work in results:
                stream.mark(i, j)
                total.add(work)
                speed = total.windows * runner.layout.window**2 / 1e6 / (time.perf_counter() - started)
                bar.set_postfix_str(f"{speed:.2f} Mpx/s", refresh=False)
                bar.update()
        for level in range(1, len(stream.arrays)):
            tasks = stream.level_tasks(level, tiles, runner.layout.tile)
            with closing(run_tasks(store_level, [stream.arrays[level - 1], stream.arrays[level]], tasks)) as results:
                for _ in results:
                    pass
        size = stream.size
        with recording(sdata, "images", key, entry):
            stream.finish(sdata)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            stream.discard()
            raise OSError(
                error.errno,
                f"the disk of {stream.root} is full; the unfinished map {key!r} was deleted. Make room, ask for fewer "
                "genes (genes=) or a coarser map (out_mpp=)",
            ) from error
        _interrupted(stream, key)
        raise
    except BaseException:
        _interrupted(stream, key)
        raise
    wall = time.perf_counter() - started
    logger.info(
        "%r: %d channels, %d x %d px at %.3g um/px, %.3g M px predicted, in %.1f s (%.2f Mpx/s; %.1f s in the "
        "model); %.2f GB in %s",
        key,
        runner.n_channels,
        *runner.layout.shape,
        runner.layout.mpp,
        total.pixels / 1e6,
        wall,
        total.windows * runner.layout.window**2 / 1e6 / wall,
        total.forward,
        size / 1e9,
        stream.root,
    )


def _interrupted(stream: MapWriter, key: str) -> None:
    stream.interrupt()
    logger.warning("the map %r is unfinished; the same call with resume=True goes on with it", key)


def _warn_if_full(stream: MapWriter, n_tiles: int, dtype: str) -> None:
    """Say early that the disk will not do; what compression saves is not known, so this is no error."""
    array = stream.arrays[0]
    needed = 1.3 * n_tiles * array.shape[0] * array.chunks[1] * array.chunks[2] * np.dtype(dtype).itemsize
    free = shutil.disk_usage(stream.root).free
    if needed > free:
        logger.warning(
            "the map may take %.1f GB and %s has %.1f GB free: ask for fewer genes (genes=), a coarser map (out_mpp=), "
            "or make room",
            needed / 1e9,
            stream.root,
            free / 1e9,
        )
