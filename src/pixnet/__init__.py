"""pixnet: dense maps of gene expression from H&E slides, summed over any shape, on SpatialData."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pixnet._settings import settings

if TYPE_CHECKING:
    from pixnet import datasets, io, models, pl, pp, tl

try:
    __version__ = version("pixnet")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["datasets", "io", "models", "pl", "pp", "settings", "tl"]

# torch then asks for huge pages for large arrays, which lowers the peak memory of `tl.predict`. It reads the variable
# when it first allocates an array.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_NAMESPACES = frozenset({"datasets", "io", "models", "pl", "pp", "tl"})


def __getattr__(name: str) -> Any:
    # Namespaces load on first use: `import pixnet` stays fast and imports neither torch nor spatialdata.
    if name in _NAMESPACES:
        return importlib.import_module(f"pixnet.{name}")
    raise AttributeError(f"module 'pixnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMESPACES])
