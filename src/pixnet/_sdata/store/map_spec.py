"""The form of a stored map, and an empty map of that form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from zarr.codecs import BloscCodec

from pixnet._sdata.novelty import NoveltySpec
from pixnet._sdata.store.metadata import METADATA, level_paths
from pixnet._sdata.store.workspace import read_json, write_json

CHANNELS = 25
"""Channels per chunk, about: showing one gene must not read them all."""

LEAST_CHUNK = 16
"""Chunks of a coarser level have at least this many pixels a side, where its size allows."""

# lz4 with byte shuffle: the only compression measured that costs less than writing the bytes it saves
COMPRESSOR = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")


@dataclass(frozen=True)
class MapSpec:
    """The form of a stored map, float32.

    Attributes
    ----------
    channels
        Names of the channels.
    shape
        Size of the finest level ``(y, x)``.
    chunk
        Pixels a side of a chunk.
    scale_factors
        How much coarser each level is than the one before.
    transformations
        From the map's pixels to each coordinate system.
    novelty
        The image of novelty that is written with it; None: there is none.
    """

    channels: Sequence[str]
    shape: tuple[int, int]
    chunk: int
    scale_factors: Sequence[int]
    transformations: Mapping[str, Any]
    novelty: NoveltySpec | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Sizes of all levels: each is exactly reduced, and what is left of a last block is left out."""
        shapes = [self.shape]
        for factor in self.scale_factors:
            shapes.append((max(1, shapes[-1][0] // factor), max(1, shapes[-1][1] // factor)))
        return shapes

    @property
    def scales(self) -> list[tuple[int, int]]:
        """Pixels of the finest level per pixel of each level, ``(y, x)``."""
        scales = [(1, 1)]
        for factor, shape in zip(self.scale_factors, self.shapes):
            scales.append((scales[-1][0] * min(factor, shape[0]), scales[-1][1] * min(factor, shape[1])))
        return scales

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Shape of the chunks ``(c, y, x)``; channels are shared out evenly."""
        n = len(self.channels)
        return (math.ceil(n / math.ceil(n / CHANNELS)), min(self.chunk, self.shape[0]), min(self.chunk, self.shape[1]))

    @property
    def level_chunks(self) -> list[tuple[int, int, int]]:
        """Shape of the chunks of all levels: those of a coarser one lie over one chunk of the finest, if not too small."""
        found, scale = [self.chunks], 1
        for factor, (height, width) in zip(self.scale_factors, self.shapes[1:]):
            scale *= factor
            side = self.chunk // scale
            if self.chunk % scale or side < min(LEAST_CHUNK, self.chunk):
                side = self.chunk
            found.append((self.chunks[0], min(side, height), min(side, width)))
        return found


def write_empty(path: Path, key: str, spec: MapSpec) -> None:
    """Have SpatialData write the element's metadata from a tiny one, then put arrays of the right shape in place."""
    side = 2 * math.prod(spec.scale_factors)
    tiny = Image2DModel.parse(
        np.zeros((len(spec.channels), side, side), dtype="float32"),
        dims=("c", "y", "x"),
        c_coords=list(spec.channels),
        scale_factors=list(spec.scale_factors) or None,
        transformations=dict(spec.transformations),
    )
    SpatialData(images={key: tiny}).write(path, consolidate_metadata=False)
    element = path / "images" / key
    for name, shape, chunks in zip(level_paths(element), spec.shapes, spec.level_chunks, strict=True):
        zarr.create_array(
            element / name,
            shape=(len(spec.channels), *shape),
            dtype="float32",
            chunks=chunks,
            compressors=COMPRESSOR,
            fill_value=np.nan,
            dimension_names=("c", "y", "x"),
            overwrite=True,
        )
    content = read_json(element / METADATA)
    for dataset, (y, x) in zip(content["attributes"]["ome"]["multiscales"][0]["datasets"], spec.scales, strict=True):
        scale = [1.0, float(y), float(x)]
        dataset["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    write_json(element / METADATA, content)
