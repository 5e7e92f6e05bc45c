"""Pictures decoded with a limit on their size."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

# A picture without tiles (JPEG, PNG, striped TIFF) is decoded at once, up to this many pixels.
MAX_WHOLE_PIXELS = 1_000_000_000

_pillow_lock = threading.Lock()


def open_picture(path: Path) -> Any:
    """Open a JPEG, PNG or TIFF with Pillow without its warning on large pictures; nothing is decoded yet.

    Raises
    ------
    ValueError
        If the file is not a picture Pillow reads, or declares more pixels than are decoded at once.
    """
    from PIL import Image, UnidentifiedImageError

    with _pillow_lock, warnings.catch_warnings():
        # Pillow's limit is global and lower than an ordinary section; ours is applied below.
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path)
        except (UnidentifiedImageError, SyntaxError, OSError) as error:
            raise ValueError(f"{path} is not a readable picture ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    width, height = picture.size
    if width * height > MAX_WHOLE_PIXELS:
        raise ValueError(
            f"{path} declares {width:,} x {height:,} px, more than the {MAX_WHOLE_PIXELS:,} that are decoded at once; "
            "convert it to a tiled pyramidal TIFF, which is read tile by tile"
        )
    return picture


def read_picture(path: Path) -> np.ndarray:
    """Decode a picture to ``uint8 (3, y, x)``.

    Raises
    ------
    ValueError
        If the picture is not 8-bit RGB, or is truncated.
    """
    picture = open_picture(path)
    if picture.mode not in {"RGB", "RGBA", "P"}:
        what = {"L": "greyscale", "1": "black and white", "I;16": "16-bit", "I": "32-bit", "CMYK": "CMYK"}
        raise ValueError(
            f"{path} is {what.get(picture.mode, picture.mode)} (mode {picture.mode!r}); an H&E picture in 8-bit RGB is needed"
        )
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if picture.mode == "RGBA":  # transparent is empty glass
        from PIL import Image

        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.asarray(picture).transpose(2, 0, 1)
