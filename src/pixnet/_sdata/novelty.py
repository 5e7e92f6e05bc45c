"""The novelty of a slide as an image element: its file while a map is written, and which one belongs to a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from numpy.lib.format import open_memmap
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from xarray import DataArray, DataTree

from pixnet._core.predict.tile import NoveltyPatch
from pixnet._sdata.rasters import channel_names, full_resolution
from pixnet._sdata.record import find_entry, identity
from pixnet._sdata.store.bound import check_bound

CHANNEL = "novelty"
"""Name of the only channel."""

RARE, EXPECTED = 99.0, 0.01
"""Percentile beyond which tissue is unlike the training tissue, and the share of tissue beyond it by chance."""


@dataclass(frozen=True)
class NoveltySpec:
    """The image of a map's novelty: its name, size ``(y, x)``, and transformations to each coordinate system."""

    key: str
    shape: tuple[int, int]
    transformations: Mapping[str, Any]

    def entry(self, of_map: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is recorded of it, beside the entry of the map that it was made with."""
        kept = {name: of_map[name] for name in ("image_key", "mask_key", "model", "model_hash")}
        return {"kind": CHANNEL, "identity": identity([CHANNEL], self.shape), **kept}


class NoveltyFile:
    """The novelty of a map that is being written, in a file that a resumed run goes on with."""

    def __init__(self, path: Path, spec: NoveltySpec) -> None:
        self.key, self._transformations = spec.key, spec.transformations
        if path.exists():
            self._values = open_memmap(path, mode="r+")
        else:
            self._values = open_memmap(path, mode="w+", dtype=np.float32, shape=spec.shape)
            self._values[:] = np.nan

    def add(self, patches: Sequence[NoveltyPatch]) -> None:
        """Keep the values of some parts; NaN leaves what is there."""
        for box, values in patches:
            rows, columns = box.slices
            there = self._values[rows, columns]  # the last pixels may reach over the slide
            new = values[: there.shape[0], : there.shape[1]]
            np.copyto(there, new, where=np.isfinite(new))
        self._values.flush()

    def element(self) -> DataArray:
        """Return the image, in memory."""
        return Image2DModel.parse(
            np.array(self._values)[None],
            dims=("c", "y", "x"),
            c_coords=[CHANNEL],
            transformations=dict(self._transformations),
        )


def is_novelty(image: DataArray | DataTree) -> bool:
    """Return whether an image holds novelty, by the name of its channel."""
    return channel_names(image) == [CHANNEL]


def find_novelty(sdata: SpatialData, made: Mapping[str, Any]) -> str | None:
    """Return the image of novelty that belongs to a map, by what is recorded of it; None if there is none.

    Another model may have replaced it since.
    """
    key = made.get("novelty")
    entry = find_entry(sdata, "images", key) if isinstance(key, str) else None
    if entry is None or entry.get("kind") != CHANNEL or entry.get("model_hash") != made.get("model_hash"):
        return None
    return key


def novelty_pixels(sdata: SpatialData, novelty_key: str) -> da.Array:
    """Return the pixels ``(1, y, x)`` of an image of novelty that is still the one its object was read with."""
    data = full_resolution(sdata.images[novelty_key])
    check_bound(data, f"image {novelty_key!r}")
    return data.data


def rare_share(sdata: SpatialData, novelty_key: str) -> float:
    """Return the share of the predicted tissue that is farther from the training tissue than 99 % of held-out tissue."""
    values = np.asarray(novelty_pixels(sdata, novelty_key))
    return float(np.mean(values[np.isfinite(values)] > RARE))
