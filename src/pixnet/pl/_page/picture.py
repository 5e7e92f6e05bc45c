"""The H&E image as a JPEG for a page."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixnet.pl._frame import Frame, read_pixels

LONGEST_PX = 4096


@dataclass(frozen=True)
class Picture:
    """A JPEG, and where it lies.

    Attributes
    ----------
    jpeg
        The file.
    affine
        3 x 3 matrix from its pixels to the frame.
    """

    jpeg: bytes
    affine: NDArray[np.float64]


def picture_of(frame: Frame, he_key: str, most_bytes: int) -> Picture:
    """Return what a frame shows of the H&E, as large and as good as the bytes allow."""
    aspect = min(frame.aspect, 1.0)  # panel pixels count across
    placed = read_pixels(frame, he_key, LONGEST_PX * aspect)
    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(placed.values, 0, -1)))
    longest = LONGEST_PX
    while True:
        scale = min(1.0, longest / max(image.size))
        small = (
            image if scale == 1 else image.resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.BOX)
        )
        for quality in (85, 75):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality)
            if file.tell() <= most_bytes:
                ratio = np.diag([image.width / small.width, image.height / small.height, 1.0])
                return Picture(file.getvalue(), placed.affine @ ratio)
        longest = int(max(small.size) * 0.8)
