"""Stream a gene map into a store tile by tile, as a multiscale image element that appears when it is whole."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from zarr.codecs import BloscCodec

from pixnet._core.coverage.jit import jit
from pixnet._logging import logger
from pixnet._sdata.legacy import write_brought_over
from pixnet._sdata.store.element_store import commit, heal, local_store, read_element, set_element
from pixnet._sdata.store.workspace import JOB, NEW, Workspace, scratch_root, work_folders

CHANNELS = 25
"""Channels per chunk, about: showing one gene must not read them all."""

# lz4 with byte shuffle: the only compression measured that costs less than writing the bytes it saves
COMPRESSOR = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")

DONE = "done.txt"


@dataclass(frozen=True)
class MapSpec:
    """What a stored map looks like.

    Attributes
    ----------
    channels
        Names of the channels.
    shape
        Size of the finest level ``(y, x)``.
    dtype
        ``"float32"`` or ``"float16"``.
    chunk
        Pixels a side of a chunk.
    scale_factors
        How much coarser each level is than the one before.
    transformations
        From the map's pixels to each coordinate system.
    """

    channels: Sequence[str]
    shape: tuple[int, int]
    dtype: str
    chunk: int
    scale_factors: Sequence[int]
    transformations: Mapping[str, Any]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Sizes of all levels; they are rounded down, as SpatialData does it."""
        shapes = [self.shape]
        for factor in self.scale_factors:
            shapes.append(tuple(max(1, n // factor) for n in shapes[-1]))
        return shapes

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Shape of the chunks ``(c, y, x)``; channels are shared out evenly."""
        n = len(self.channels)
        return (math.ceil(n / math.ceil(n / CHANNELS)), min(self.chunk, self.shape[0]), min(self.chunk, self.shape[1]))


class MapWriter:
    """A map being written. Open one with :meth:`open`, write tiles to ``arrays[0]``, then levels, then finish.

    Attributes
    ----------
    arrays
        The levels as zarr arrays, finest first. They pickle, so that other processes can write to them.
    done
        Tiles written by an earlier, interrupted run.
    """

    def __init__(self, root: Path, key: str, work: Workspace, scratch: bool) -> None:
        self.root, self.key, self.scratch = root, key, scratch
        self._work = work
        element = work.path / NEW / "images" / key
        self.arrays = [zarr.open_array(element / path, mode="r+") for path in _level_paths(element)]
        self.done = self._read_done()
        self._log = open(work.path / DONE, "a")  # noqa: SIM115  open as long as the stream is

    @classmethod
    def open(cls, sdata: SpatialData, key: str, spec: MapSpec, job: Mapping[str, Any], resume: bool) -> MapWriter:
        """Start a map, or go on with one that was interrupted.

        Parameters
        ----------
        sdata
            The object. The map streams to its store, or to a store in the scratch folder if it is in memory.
        key
            Name of the map.
        spec
            What it looks like.
        job
            What determines its bytes (JSON-plain). A map is resumed only if this is the same.
        resume
            Go on with an interrupted map. Else what is left of one is cleared.

        Raises
        ------
        PermissionError
            If the store cannot be written to.
        RuntimeError
            If another process is writing a map of that name.
        ValueError
            If the interrupted map was made in another way.
        """
        root = local_store(sdata)
        scratch = root is None
        root = scratch_root() if scratch else root
        if not scratch:
            heal(sdata)
            write_brought_over(sdata)
        job = {"key": key, "resumable": True, "what": dict(job)}
        work = _interrupted(root, key, job, resume)
        if work is None:
            if resume:
                logger.info("nothing to resume for %r: starting from the beginning", key)
            work = Workspace.create(root, job)
            try:
                _write_empty(work.path / NEW, key, spec)
                (work.path / DONE).touch()
            except BaseException:
                work.remove()
                raise
        return cls(root, key, work, scratch)

    def mark(self, i: int, j: int) -> None:
        """Note that a tile is written: a resumed run leaves it out."""
        self._log.write(f"{i} {j}\n")
        self._log.flush()

    def level_tasks(self, level: int, written: Sequence[tuple[int, int]], tile: int) -> list[tuple[int, int]]:
        """Return the chunks ``(row, column)`` of a level that lie over tiles that were written.

        Parameters
        ----------
        level
            The level, 1 or coarser.
        written
            Tiles of the finest level that hold tissue.
        tile
            Their size in pixels.
        """
        array, (height, width) = self.arrays[level], self.arrays[0].shape[1:]
        chunk_y, chunk_x = array.chunks[1:]
        found = set()
        for i, j in written:
            rows = _span(i * tile, min((i + 1) * tile, height), array.shape[1] / height, chunk_y, array.shape[1])
            cols = _span(j * tile, min((j + 1) * tile, width), array.shape[2] / width, chunk_x, array.shape[2])
            found.update((r, c) for r in rows for c in cols)
        return sorted(found)

    def finish(self, sdata: SpatialData) -> None:
        """Put the map in its place and bind it in ``sdata``, in one step."""
        self._log.close()
        new = self._work.path / NEW
        for partial in new.rglob("*.partial"):  # what a killed writer left
            partial.unlink(missing_ok=True)
        if self.scratch:
            place = self.root / f"{self._work.path.name}.zarr"
            new.rename(place)
            self._work.remove()
        else:
            place = self.root
            commit(sdata, self._work, "images", self.key)
        set_element(sdata, self.key, read_element(place, "images", self.key))

    def interrupt(self) -> None:
        """Leave what is written for a run with ``resume=True``."""
        self._log.close()
        self._work.release()

    def discard(self) -> None:
        """Delete what is written."""
        self._log.close()
        self._work.remove()

    @property
    def size(self) -> int:
        """Bytes on disk so far."""
        return sum(path.stat().st_size for path in (self._work.path / NEW).rglob("*") if path.is_file())

    def _read_done(self) -> set[tuple[int, int]]:
        text = (self._work.path / DONE).read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may have left half a line
        return {(int(i), int(j)) for i, j in (line.split() for line in lines)}


def store_level(source: Any, target: Any, i: int, j: int) -> None:
    """Fill chunk ``(i, j)`` of a level with area means of the level below, over the pixels that have a value."""
    step, chunk_y, chunk_x = target.chunks
    y0, x0 = i * chunk_y, j * chunk_x
    y1, x1 = min(y0 + chunk_y, target.shape[1]), min(x0 + chunk_x, target.shape[2])
    ry, rx = source.shape[1] / target.shape[1], source.shape[2] / target.shape[2]
    sy, sx = int(y0 * ry + 1e-9), int(x0 * rx + 1e-9)
    ey = min(math.ceil(y1 * ry - 1e-9), source.shape[1])
    ex = min(math.ceil(x1 * rx - 1e-9), source.shape[2])
    for c in range(0, target.shape[0], step):
        below = np.asarray(source[c : c + step, sy:ey, sx:ex], dtype=np.float32)
        out = np.empty((below.shape[0], y1 - y0, x1 - x0), np.float32)
        _mean_level(below, out, y0 * ry - sy, x0 * rx - sx, ry, rx)
        target[c : c + step, y0:y1, x0:x1] = out.astype(target.dtype)


@jit
def _mean_level(below, out, shift_y, shift_x, ry, rx):
    """Area means without NaN. Levels cover the same rectangle, so a pixel may take parts of pixels."""
    channels, height, width = out.shape
    rows, cols = below.shape[1:]
    for i in range(height):
        top, bottom = shift_y + i * ry, shift_y + (i + 1) * ry
        a0, a1 = int(top + 1e-9), min(int(np.ceil(bottom - 1e-9)), rows)
        for j in range(width):
            left, right = shift_x + j * rx, shift_x + (j + 1) * rx
            b0, b1 = int(left + 1e-9), min(int(np.ceil(right - 1e-9)), cols)
            for c in range(channels):
                total, area = 0.0, 0.0
                for a in range(a0, a1):
                    wy = min(bottom, a + 1.0) - max(top, float(a))
                    for b in range(b0, b1):
                        value = below[c, a, b]
                        if not np.isnan(value):
                            w = wy * (min(right, b + 1.0) - max(left, float(b)))
                            total += w * value
                            area += w
                out[c, i, j] = total / area if area > 1e-9 else np.nan


def fingerprint(parts: Sequence[np.ndarray]) -> str:
    """Return a hash of pixels, to tell whether an interrupted run was about the same slide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _span(start: int, stop: int, scale: float, chunk: int, size: int) -> Iterator[int]:
    first, last = max(int(start * scale - 1), 0), min(math.ceil(stop * scale + 1), size)
    return range(first // chunk, -(-last // chunk))


def _interrupted(root: Path, key: str, job: Mapping[str, Any], resume: bool) -> Workspace | None:
    """Find what is left of a map of that name: to go on with, or to clear."""
    found = None
    for folder in work_folders(root):
        try:
            other = json.loads((folder / JOB).read_text())
        except (OSError, ValueError):
            continue
        if other.get("key") != key or not other.get("resumable"):
            continue
        work = Workspace.adopt(folder)
        if work is None:
            raise RuntimeError(
                f"another process is writing {key!r} into {root}; wait for it, or choose another key_added="
            )
        if not resume or not (folder / DONE).exists():
            logger.info("cleared what was left of an interrupted map %r", key)
            work.remove()
            continue
        old, new = work.job["what"], json.loads(json.dumps(job["what"]))
        if old != new:
            work.release()
            differs = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            raise ValueError(
                f"the interrupted map {key!r} was made with other {', '.join(differs)}: call with the same arguments to "
                "go on, or with resume=False to start from the beginning"
            )
        if found is not None:
            found.remove()
        found = work
    return found


def _write_empty(path: Path, key: str, spec: MapSpec) -> None:
    """Have SpatialData write the element's metadata from a tiny one, then put arrays of the right shape in place."""
    side = 2 * math.prod(spec.scale_factors)
    tiny = Image2DModel.parse(
        np.zeros((len(spec.channels), side, side), dtype=spec.dtype),
        dims=("c", "y", "x"),
        c_coords=list(spec.channels),
        scale_factors=list(spec.scale_factors) or None,
        transformations=dict(spec.transformations),
    )
    SpatialData(images={key: tiny}).write(path, consolidate_metadata=False)
    element = path / "images" / key
    for level, (name, shape) in enumerate(zip(_level_paths(element), spec.shapes, strict=True)):
        old = zarr.open_array(element / name, mode="r")
        chunks = spec.chunks
        zarr.create_array(
            element / name,
            shape=(len(spec.channels), *shape),
            dtype=spec.dtype,
            chunks=(chunks[0], min(chunks[1], shape[0]), min(chunks[2], shape[1])) if level else chunks,
            compressors=COMPRESSOR,
            fill_value=np.nan,
            dimension_names=old.metadata.dimension_names,
            overwrite=True,
        )
    group = zarr.open_group(element, mode="r+", use_consolidated=False)
    ome = dict(group.attrs["ome"])
    for dataset, shape in zip(ome["multiscales"][0]["datasets"], spec.shapes, strict=True):
        scale = [1.0, spec.shape[0] / shape[0], spec.shape[1] / shape[1]]
        dataset["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    group.attrs["ome"] = ome


def _level_paths(element: Path) -> list[str]:
    attrs = zarr.open_group(element, mode="r", use_consolidated=False).attrs
    return [dataset["path"] for dataset in attrs["ome"]["multiscales"][0]["datasets"]]
