"""The settings of a model: the only place that declares their names, types, defaults and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pixnet._checked import checked
from pixnet._names import check_genes

Stride = Literal[1, 2, 4]
Zoom = Literal[1, 2, 4]
Decoder = Literal["pixel_mlp", "paper"]
Quantity = Literal["density", "panel_density", "log_sum"]
Width = Annotated[int, Field(ge=1, le=8192)]

MAX_MAP_UM = 4.0
"""By default a map is kept at this pixel size (µm/px) or finer."""

PAPER_FILTERS = (64, 128, 256, 512, 512, 512)
"""Channels of the published decoder, finest level first."""

PAPER_COARSEST = 32
"""Stride of its deepest level: 8 x 8 positions of the 256 px image of the decoder that PixNet builds on (MCADS)."""


def paper_levels(stride: int) -> int:
    """Return the number of levels of the published decoder, from the output stride to the deepest."""
    return (PAPER_COARSEST // stride).bit_length()


def _stride(known: dict[str, Any]) -> Stride:
    """Return the largest of 4, 2, 1 that keeps the map at 4 µm/px or finer (1 where none does)."""
    largest = MAX_MAP_UM * 1.02 / known["mpp"]
    return 4 if largest >= 4 else 2 if largest >= 2 else 1


def _widths(known: dict[str, Any]) -> tuple[int, ...] | None:
    return PAPER_FILTERS[: paper_levels(known["stride"])] if known["decoder"] == "paper" else None


def _zoom(known: dict[str, Any]) -> Zoom:
    """Enlarge coarse images, since encoders know tissue at 0.25 to 1 µm/px."""
    return 2 if known["mpp"] >= 1.5 else 1


# An enlarged image brings the encoder's reach, and the memory of a window, down to fewer of its own pixels.
def _window(known: dict[str, Any]) -> int:
    return 1024 // known["zoom"]


def _halo(known: dict[str, Any]) -> int:
    return -(-320 // (64 * known["zoom"])) * 64


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _genes(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):  # of a header that was edited by hand
        raise TypeError(f"genes is {value!r}; a list of names is needed")
    return tuple(check_genes(value))


@checked
class ModelConfig:
    """Settings of a `PixNet`, fixed when it is built. With the weights, they are the function that it computes.

    Parameters
    ----------
    genes
        Names of the genes, in the order of the map's channels; the total follows them.
    mpp
        Pixel size (µm/px) of the images that the model sees.
    stride
        Image pixels per map pixel. Default: the largest that keeps the map at 4 µm/px or finer.
    encoder
        Name of the encoder.
    decoder
        ``"pixel_mlp"`` (stacked features and a perceptron on each pixel) or ``"paper"`` (the published U-Net).
    widths
        Channels of the published decoder's levels, finest first; None for the other.
    hidden
        Channels of the decoded map and of the hidden layer of ``"pixel_mlp"``.
    members
        Decoders side by side; the map is their mean.
    quantity
        ``"density"``: a gene's channel is the density of its transcripts. ``"panel_density"``: so it is, and the genes
        add up to the total. ``"log_sum"``: it sums to a shape's log.
    n_programs
        Number of programs that the map holds in place of genes; None: a channel for each gene.
    zoom
        Factor by which an image is enlarged for the encoder. Default: 2 where ``mpp`` is 1.5 or coarser, else 1.
    window, halo
        Size of the windows in which a slide is predicted, and what they see beyond each edge, in image px.
    """

    genes: Annotated[tuple[str, ...], BeforeValidator(_genes)]
    mpp: Annotated[float, Field(gt=0, le=100)] = 0.5
    stride: Stride = Field(default_factory=_stride)
    encoder: Annotated[str, Field(min_length=1, max_length=300)] = "efficientnet_lite0"
    decoder: Decoder = "pixel_mlp"
    widths: Annotated[tuple[Width, ...] | None, BeforeValidator(_tuple)] = Field(default_factory=_widths)
    hidden: Width = 128
    members: Annotated[int, Field(ge=1, le=64)] = 1
    quantity: Quantity = "density"
    n_programs: Annotated[int, Field(ge=2, le=1024)] | None = None
    zoom: Zoom = Field(default_factory=_zoom)
    window: Annotated[int, Field(ge=64, le=16384, multiple_of=64)] = Field(default_factory=_window)
    halo: Annotated[int, Field(ge=0, le=4096, multiple_of=64)] = Field(default_factory=_halo)

    @model_validator(mode="after")
    def _check_programs(self) -> ModelConfig:
        if self.n_programs is not None and self.quantity != "density":
            raise ValueError(
                f"n_programs is {self.n_programs}; programs hold densities, quantity={self.quantity!r} genes"
            )
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> ModelConfig:
        if self.decoder == "paper":
            levels, found = paper_levels(self.stride), 0 if self.widths is None else len(self.widths)
            if found != levels:
                raise ValueError(
                    f"widths has {found} entries; the published decoder at stride {self.stride} has {levels} levels"
                )
        elif self.widths is not None:
            raise ValueError(f"widths are those of decoder='paper'; decoder={self.decoder!r} has hidden=")
        return self
