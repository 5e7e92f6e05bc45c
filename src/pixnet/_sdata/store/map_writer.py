"""Stream a gene map into a store tile by tile, as a multiscale image element that appears when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from anndata import AnnData
from spatialdata import SpatialData

from pixnet._core.predict.tile import NoveltyPatch
from pixnet._core.scratch import scratch_root
from pixnet._core.slide.pyramid import block_means
from pixnet._logging import logger
from pixnet._sdata.novelty import NoveltyFile
from pixnet._sdata.record import Entries
from pixnet._sdata.store.commit import CommittedError, check_free_on_disk, commit
from pixnet._sdata.store.element_store import (
    heal,
    prepare,
    read_element,
    set_element,
    write_earlier,
)
from pixnet._sdata.store.map_spec import MapSpec, write_empty
from pixnet._sdata.store.metadata import METADATA, level_paths, stamp
from pixnet._sdata.store.scratch import bind_scratch
from pixnet._sdata.store.workspace import DONE, JOB, NEW, NOVELTY, Workspace, store_lock, work_folders
from pixnet._sdata.target import local_store


class MapWriter:
    """A map being written. Open one with :meth:`open`, write tiles to ``arrays[0]``, then levels, then finish.

    Attributes
    ----------
    arrays
        The levels as zarr arrays, finest first. They pickle, so that other processes can write to them.
    factors
        How much coarser each level is than the one before.
    done
        Tiles written by an earlier, interrupted run.
    novelty
        The novelty of the tiles so far, where the map has an image of it.
    """

    def __init__(self, root: Path, key: str, work: Workspace, spec: MapSpec, *, scratch: bool, overwrite: bool) -> None:
        self.root, self.key, self.scratch, self.overwrite = root, key, scratch, overwrite
        self.factors = spec.scale_factors
        self._work, self._placed = work, False
        self._element = work.path / NEW / "images" / key
        self.arrays = [zarr.open_array(self._element / path, mode="r+") for path in level_paths(self._element)]
        self.done = self._read_done()
        self.novelty = None if spec.novelty is None else NoveltyFile(work.path / NOVELTY, spec.novelty)
        self._log = open(work.path / DONE, "a")  # noqa: SIM115  open as long as the writer is

    @classmethod
    def open(
        cls,
        sdata: SpatialData,
        key: str,
        spec: MapSpec,
        job: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> MapWriter:
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
            What determines its bytes (JSON-plain). A map is resumed only if this is the same, and a hash of it tells
            the map from any other.
        resume
            Go on with an interrupted map. Else what is left of one is cleared.
        overwrite
            Replace an element of that name.

        Raises
        ------
        PermissionError
            If the store cannot be written to.
        RuntimeError
            If another process is writing a map of that name.
        ValueError
            If the interrupted map was made in another way, or the store holds an element of that name.
        """
        store = local_store(sdata)
        if store is not None:
            heal(sdata)
            write_earlier(sdata)
        root = scratch_root() if store is None else store
        job = {"key": key, "resumable": True, "what": dict(job)}
        with store_lock(root):
            if store is not None:
                check_free_on_disk(store, key, overwrite)
            found = _interrupted(root, key, job, resume)
            work = Workspace.create(root, job) if found is None else found
        if found is None and resume:
            logger.info("nothing to resume for %r: starting from the beginning", key)
        try:
            if found is None:
                write_empty(work.path / NEW, key, spec)
                (work.path / DONE).touch()
            return cls(root, key, work, spec, scratch=store is None, overwrite=overwrite)
        except BaseException:
            if found is None:
                work.remove()
            else:
                work.release()
            raise

    def mark(self, i: int, j: int, novelty: Sequence[NoveltyPatch] = ()) -> None:
        """Keep the novelty of a tile that is written, and note that it is: a resumed run leaves it out."""
        if self.novelty is not None:
            self.novelty.add(novelty)
        self._log.write(f"{i} {j}\n")
        self._log.flush()

    def levels_of_tiles(self, tile: int) -> int:
        """Return the number of coarser levels of which every tile of ``tile`` pixels a side holds whole blocks and chunks."""
        scale = 1
        for level, (factor, array) in enumerate(zip(self.factors, self.arrays[1:])):
            scale *= factor
            side = tile // scale
            whole = all(side >= n or side % chunk == 0 for n, chunk in zip(array.shape[1:], array.chunks[1:]))
            if tile % scale or not whole:
                return level
        return len(self.factors)

    def level_tasks(
        self, level: int, factor: int, written: Sequence[tuple[int, int]], tile: int
    ) -> list[tuple[int, int]]:
        """Return the chunks ``(row, column)`` of a level that lie over tiles that were written.

        Parameters
        ----------
        level
            The level, 1 or coarser.
        factor
            How much coarser it is than the finest level.
        written
            Tiles of the finest level that hold tissue.
        tile
            Their size in pixels.
        """
        array = self.arrays[level]
        found: set[tuple[int, int]] = set()
        for i, j in written:
            rows = _chunks_over(i * tile, (i + 1) * tile, factor, array.chunks[1], array.shape[1])
            columns = _chunks_over(j * tile, (j + 1) * tile, factor, array.chunks[2], array.shape[2])
            found.update((r, c) for r in rows for c in columns)
        return sorted(found)

    def finish(
        self, sdata: SpatialData, entries: Entries | None = None, tables: Mapping[str, AnnData] | None = None
    ) -> None:
        """Put the map in its place and bind it in ``sdata``, with its tables and what is recorded of it, in one step."""
        self._log.close()
        new, kinds = self._work.path / NEW, {}
        for partial in new.rglob("*.partial"):  # what a killed writer left
            partial.unlink(missing_ok=True)
        what = json.dumps(self._work.job["what"], sort_keys=True)
        stamp(self._element, hashlib.sha256(what.encode()).hexdigest())
        others: dict[str, Any] = dict(tables or {})
        if self.novelty is not None:
            others[self.novelty.key] = self.novelty.element()
        for name, other in others.items() if not self.scratch else ():
            kind = prepare(self._work, name, other)
            kinds[name] = kind
            if kind == "images":
                stamp(new / kind / name, uuid.uuid4().hex)
        if self.scratch:
            place = self.root / f"{self._work.path.name}.zarr"
            new.rename(place)
            self._placed = True
            element = read_element(place, "images", self.key)
            bind_scratch(element, place)
        else:
            with store_lock(self.root):
                try:
                    commit(
                        self.root, self._work, "images", self.key, overwrite=self.overwrite, entries=entries,
                        companions=kinds, replaced=[] if self.novelty is None else [self.novelty.key],
                    )  # fmt: skip
                except CommittedError:
                    self._placed = True
                    raise
                self._placed = True
                element = read_element(self.root, "images", self.key)
                others |= {n: read_element(self.root, kind, n) for n, kind in kinds.items() if kind == "images"}
        self._work.remove()
        for name, other in others.items():
            set_element(sdata, name, other, None)
        set_element(sdata, self.key, element, entries)

    @property
    def committed(self) -> bool:
        """Whether the map counts already: what is left can only be completed."""
        return self._placed or self._work.committed

    def interrupt(self) -> bool:
        """Leave what is written for a run with ``resume=True``; False if the store was moved away, and it with it."""
        with contextlib.suppress(OSError):  # of a full disk, at its last write
            self._log.close()
        if self.scratch or (self.root / METADATA).exists():
            self._work.release()
            return True
        self._work.remove()  # what late writes made where the store was
        with contextlib.suppress(OSError):
            self.root.rmdir()
        return False

    def discard(self) -> None:
        """Delete what is written."""
        with contextlib.suppress(OSError):  # of a full disk, at its last write
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


def store_level(source: Any, target: Any, factor: int, i: int, j: int) -> None:
    """Fill chunk ``(i, j)`` of a level with means of the level before, over the pixels that have a value."""
    step, chunk_y, chunk_x = target.chunks
    y0, x0 = i * chunk_y, j * chunk_x
    y1, x1 = min(y0 + chunk_y, target.shape[1]), min(x0 + chunk_x, target.shape[2])
    fy, fx = (min(factor, n) for n in source.shape[1:])  # an axis shorter than a block becomes one pixel
    for c in range(0, target.shape[0], step):
        below = source[c : c + step, y0 * fy : y1 * fy, x0 * fx : x1 * fx]
        target[c : c + step, y0:y1, x0:x1] = block_means(below, fy, fx)


def fingerprint(parts: Sequence[np.ndarray]) -> str:
    """Return a hash of pixels, to tell whether an interrupted run was about the same slide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _chunks_over(start: int, stop: int, factor: int, chunk: int, size: int) -> range:
    """Return the chunks of a level that lie over a range of pixels of the finest level."""
    return range(start // factor // chunk, -(-min(-(-stop // factor), size) // chunk))


def _interrupted(root: Path, key: str, job: Mapping[str, Any], resume: bool) -> Workspace | None:
    """Find what is left of a map of that name: to go on with, or to clear. The store's lock is held."""
    found = None
    for folder in work_folders(root):
        try:
            other = json.loads((folder / JOB).read_text())
        except (OSError, ValueError):
            continue
        if other.get("key") != key or not other.get("resumable"):
            continue
        work = Workspace.adopt(folder)
        if work is not None and work.committed:  # its process has just failed: the next commit completes it
            work.release()
            continue
        if work is None and not folder.exists():  # its process has just finished
            continue
        if work is None:
            raise RuntimeError(
                f"another process is writing {key!r} into {root}; wait for it, or choose another key_added="
            )
        if not resume or not work.resumable:
            logger.info("cleared what was left of an interrupted map %r", key)
            work.remove()
            continue
        old, new = work.job["what"], json.loads(json.dumps(job["what"]))
        if old != new:
            work.release()
            differs = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            numbers = [n for n in differs if isinstance(old.get(n), int | float)]
            how = "; ".join(f"{name} {old[name]}, now {new.get(name)}" for name in numbers)
            raise ValueError(
                f"the interrupted map {key!r} was made with other {', '.join(differs)}{f' ({how})' if how else ''}: call "
                "with the same arguments to go on, or with resume=False to start from the beginning"
            )
        if found is not None:
            found.remove()
        found = work
    return found
