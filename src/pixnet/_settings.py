"""Package-wide settings: the defaults of arguments that are left at None."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from pixnet._logging import logger

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class Settings:
    """Defaults of arguments that are left at ``None``; assign to change them.

    Attributes
    ----------
    device
        Torch device such as ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``; ``None`` takes CUDA where there is a GPU,
        for prediction also Apple's GPU, else the CPU.
    precision
        Arithmetic of prediction: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` takes bfloat16 where the
        device computes in it natively, else float32.
    progress
        Show progress bars (on stderr).
    cache_dir
        Folder of downloads. Environment variable ``PIXNET_CACHE_DIR``.
    scratch_dir
        Folder of the maps of objects in memory and of the features of training slides, which are deleted at exit, and
        of the state of a training that was interrupted. Environment variable ``PIXNET_SCRATCH_DIR``.
    seed
        Seed of functions whose own ``seed`` is left at ``None``.
    verbosity
        A logging level: ``"warning"``, ``"info"``, ``"debug"`` or a number.

    Examples
    --------
    >>> import pixnet as px
    >>> px.settings.progress = False
    >>> px.settings.precision
    """

    device: str | None = None
    precision: str | None = None
    progress: bool = True
    cache_dir: Path = Path(os.environ.get("PIXNET_CACHE_DIR") or user_cache_dir("pixnet"))
    scratch_dir: Path = Path(os.environ.get("PIXNET_SCRATCH_DIR") or tempfile.gettempdir())
    seed: int = 0
    verbosity: int | str = "info"

    def __setattr__(self, name: str, value: Any) -> None:
        valid = [field.name for field in fields(self)]
        if name not in valid:
            raise AttributeError(f"settings has no {name!r}; it has {', '.join(valid)}")
        if name in {"cache_dir", "scratch_dir"}:
            value = Path(value).expanduser()
        elif name == "precision" and value is not None and value not in PRECISIONS:
            raise ValueError(f"settings.precision is {value!r}; valid: None, {', '.join(map(repr, PRECISIONS))}")
        elif name == "verbosity":
            level = value.upper() if isinstance(value, str) else value
            if isinstance(level, str) and level not in logging.getLevelNamesMapping():
                raise ValueError(
                    f"settings.verbosity is {value!r}; valid: 'debug', 'info', 'warning', 'error' or a number"
                )
            logger.setLevel(level)
        elif name == "seed" and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"settings.seed is {value!r}; an int is needed")
        object.__setattr__(self, name, value)


settings = Settings()
