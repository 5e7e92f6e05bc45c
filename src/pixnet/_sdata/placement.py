"""Whether shapes lie on their slide as they should: by the tissue, and by how their transcripts follow the haematoxylin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from pixnet._core.coverage import ShapeArrays
from pixnet._core.placement import UM, PointLookup, compare_placements
from pixnet._core.slide.stain import optical_density
from pixnet._core.slide.tissue import compute_mask
from pixnet._logging import logger
from pixnet._sdata.counts import match_rows
from pixnet._sdata.shapes import pixel_shapes
from pixnet._sdata.slide import Slide
from pixnet._sdata.tissue import read_coarse, read_mask

# A warning is given below this share of shapes on tissue, or where another placement has this much more of them on it.
ENOUGH, MORE = 0.75, 0.10
# Measured as Spearman's correlation of transcripts and haematoxylin. Sections of her2st, the kidney and synthetic
# tissue, rightly placed: 0.44 to 0.86, all others at most as high. A shift by half a spot costs 0.01 to 0.1. Cells of
# synthetic tissue: 0.10 to 0.40, others at most 0.05 higher.
BETTER, BETTER_SHIFT = 0.10, 0.05
FEWEST = 30
"""Of fewer shapes, correlations say nothing."""


def check_placement(slide: Slide, pairs: Mapping[str, str], totals: Mapping[str, NDArray]) -> None:
    """Log a warning where the measured shapes of a slide seem misplaced.

    ``pairs`` has the table of each shapes element, ``totals`` the transcripts of the table's rows, by element.
    """
    for key, table_key in pairs.items():
        rows = match_rows(slide.sdata, table_key, key)
        geometries = pixel_shapes(slide.sdata, key, slide.key).take(rows[rows >= 0])
        if len(geometries):
            total = np.asarray(totals[key], float)[rows >= 0]
            warn_of_placement(score_placements(slide, geometries, total), slide, key, geometries, len(total))


def score_placements(slide: Slide, geometries: ShapeArrays, total: NDArray | None = None) -> pd.DataFrame:
    """Return how well shapes fit a slide, as they are placed and otherwise; see `compare_placements`.

    Parameters
    ----------
    slide
        The slide, opened.
    geometries
        The shapes, in its level-0 pixels.
    total
        Transcripts of each shape; NaN where they are unknown. None: nothing is measured, and only tissue is compared.
    """
    x, y = centres(geometries)
    if total is not None:  # by area: large cells have more transcripts wherever they lie
        total = total / geometries.area if np.isfinite(total).sum() >= FEWEST else None
    diameter = float(np.median((geometries.bounds[:, 2:] - geometries.bounds[:, :2]).mean(axis=1)))
    pixels, scale, mpp = read_coarse(slide)
    if slide.mask_key is None:
        tissue = PointLookup(compute_mask(pixels, mpp), np.diag([1 / scale[1], 1 / scale[0], 1.0]))
    else:
        tissue = PointLookup(*read_mask(slide))
    red = optical_density(pixels)[0]
    red[(pixels == 0).all(axis=0)] = 0  # no picture there
    stain = PointLookup(
        ndimage.gaussian_filter(red, diameter / 3 / scale[0]), np.diag([1 / scale[1], 1 / scale[0], 1.0])
    )
    size = slide.image.sizes["x"], slide.image.sizes["y"]
    return compare_placements(x, y, diameter, size, slide.mpp, tissue, stain, total)


def warn_of_placement(scores: pd.DataFrame, slide: Slide, shapes: str, geometries: ShapeArrays, n: int) -> None:
    """Log a warning where another placement fits better, or few shapes are on tissue.

    Parameters
    ----------
    scores
        From :func:`score_placements`.
    slide, shapes, geometries
        The slide, and name and geometries of the shapes.
    n
        Number of shapes whose transcripts are known.
    """
    given = scores.loc["as given"]
    shifted = scores.index.str.startswith("shifted")
    others, moved = scores[~shifted].iloc[1:], scores[shifted]
    on = f"{'in' if slide.mask_key is False else 'on the tissue of'} image {slide.key!r}"
    look = f"pixnet.pp.check_spots(sdata, {shapes!r}, plot=True) draws it"
    follows, better = others["correlation"], others["on_tissue"]
    enough = max(BETTER, 2 / np.sqrt(max(n, 1)))
    if follows.notna().any() and follows.max() > given["correlation"] + enough:
        logger.warning(
            "transcripts of %r hardly follow the haematoxylin of image %r (correlation %.2f); with coordinates '%s' it would be "
            "%.2f: %s (%s)",
            shapes,
            slide.key,
            given["correlation"],
            follows.idxmax(),
            follows.max(),
            _what_to_check(follows.idxmax()),
            look,
        )
    elif better.max() > given["on_tissue"] + MORE and not _follows(given, others, better.idxmax()):
        logger.warning(
            "%.0f %% of %r lie %s; with coordinates '%s' it would be %.0f %%: %s (%s)",
            100 * given["on_tissue"],
            shapes,
            on,
            better.idxmax(),
            100 * better.max(),
            _what_to_check(better.idxmax()),
            look,
        )
    elif given["on_tissue"] < ENOUGH:
        x, y = centres(geometries)
        outside = (x < 0) | (y < 0) | (x >= slide.image.sizes["x"]) | (y >= slide.image.sizes["y"])
        logger.warning(
            "only %.0f %% of %r lie %s (%.0f %% outside the image): shifted, or at another scale?",
            100 * given["on_tissue"],
            shapes,
            on,
            100 * outside.mean(),
        )
    elif len(moved) and moved["correlation"].iloc[0] > given["correlation"] + max(BETTER_SHIFT, 1 / np.sqrt(max(n, 1))):
        logger.warning(
            "%r fit image %r better if they are %s (correlation of transcripts and haematoxylin %.2f, now %.2f): check the "
            "transformations (%s)",
            shapes,
            slide.key,
            moved.index[0],
            moved["correlation"].iloc[0],
            given["correlation"],
            look,
        )


def centres(geometries: ShapeArrays) -> tuple[NDArray, NDArray]:
    """Return the centres x and y of the boxes around shapes."""
    bounds = geometries.bounds
    return (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2


def _what_to_check(placement: str) -> str:
    if placement == UM:
        return "they look like µm: scale them to pixels with spatialdata.transformations.set_transformation"
    return "check x and y, and the transformations"


def _follows(given: pd.Series, others: pd.DataFrame, rival: str) -> bool:
    """Whether transcripts follow the haematoxylin clearly better than under the rival: then tissue says nothing."""
    return bool(given["correlation"] > others.loc[rival, "correlation"] + BETTER)
