"""Slides, and places of slides, unlike those that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixnet._core.slide.stain import differences
from pixnet._logging import logger
from pixnet._sdata.novelty import EXPECTED, rare_share
from pixnet._sdata.slide import Slide

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from pixnet.models import PixNet


def warn_if_foreign(slide: Slide, model: PixNet, name: str | None, found: Mapping[str, Any] | None) -> None:
    """Say what tissue a model was trained on; warn if the statistics of a slide's stain are, or were, unlike that."""
    tissue = model.provenance.get("tissue")
    if tissue:
        logger.info("model %r was trained on %s; it knows no other tissue", name, tissue)
    before = slide.made.get("differed")
    if before:
        logger.warning(
            "image %r was brought to the stain of training slides, and lay far outside it: %s. If its tissue is another than "
            "%s, the map means nothing, however familiar the colours are now. Check it against measured genes",
            slide.key,
            "; ".join(before),
            tissue or "that of the training slides",
        )
    differs = differences(found, model.stain)
    if differs:
        logger.warning(
            "the stain of image %r lies far outside that of the slides the model was trained on: %s. Do not trust the map "
            "without checking it against measured genes; pixnet.pp.normalize_stain may help",
            slide.key,
            "; ".join(differs),
        )


def warn_if_new(sdata: SpatialData, slide: Slide, novelty_key: str) -> None:
    """Say which share of the predicted tissue is unlike the training tissue; warn if it is more than chance gives."""
    far = rare_share(sdata, novelty_key)
    if far <= 5 * EXPECTED:
        logger.info(
            "%.1f %% of the tissue of image %r is farther from the training tissue than 99 %% of held-out training tissue is",
            100 * far, slide.key,
        )  # fmt: skip
        return
    logger.warning(
        "%.0f %% of the tissue of image %r is farther from the training tissue than 99 %% of held-out training tissue is (1 %% is "
        "expected): values there are guesses. sdata.images[%r] shows where",
        100 * far, slide.key, novelty_key,
    )  # fmt: skip
