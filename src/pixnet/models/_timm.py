"""Encoders from timm: any CNN with feature maps, any ViT by its intermediate tokens. Extra: pixnet[timm]."""

from __future__ import annotations

import pkgutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnet.models._timm_models import known_timm_model

VIT_BLOCK = 256
"""A ViT sees blocks of this many pixels, anchored at its window: its attention never depends on the tiling."""

TOKEN = 16
"""Pixels that a token of a ViT stands for."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class TimmEncoder(nn.Module):
    """A timm model as a feature pyramid.

    CNNs give their own feature maps. Of a ViT, the tokens after each quarter of its blocks become four maps, all at the
    stride of its tokens, 16: decoders enlarge them. A ViT with patches of 14 sees its blocks reduced to 14/16, so that
    a token stands for 16 pixels.

    Parameters
    ----------
    name
        As `timm.create_model` takes it, such as ``"resnet18"``, ``"hf-hub:MahmoodLab/UNI2-h"`` or
        ``"local-dir:/path"``.
    pretrained
        Load its weights (from the hub, timm's cache or the folder).
    **options
        Passed on to `timm.create_model`.

    Raises
    ------
    ImportError
        If timm, or the torchvision that it needs, does not import.
    FileNotFoundError
        If the weights cannot be had; the message says how to supply them.
    ValueError
        If timm has no such model, or it has no feature maps.
    """

    net: Any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = True, **options: Any) -> None:
        super().__init__()
        timm = _import_timm()
        known = known_timm_model(name)
        if known is not None:
            layers = {argument: pkgutil.resolve_name(layer) for argument, layer in known.layers.items()}
            options = {**known.options, **layers, **options}
            if not pretrained and known.architecture is not None:
                name = known.architecture
        with torch.device("meta"):
            plain: Any = _create(timm, name, False, options)
        # Several families have blocks, only ViTs have tokens beside those of the patches.
        self.is_vit = hasattr(plain, "blocks") and hasattr(plain, "patch_embed") and hasattr(plain, "num_prefix_tokens")
        if self.is_vit:
            depth = len(plain.blocks)
            if depth < 4:
                raise ValueError(f"timm model {name!r} has {depth} blocks; a pyramid of four maps needs at least 4")
            options = {"dynamic_img_size": True} | options
            options["out_indices"] = [round(depth * q) - 1 for q in (0.25, 0.5, 0.75, 1.0)]
        del plain
        self.net = _create(timm, name, pretrained, options | {"features_only": True})
        info = self.net.feature_info
        config = getattr(self.net, "pretrained_cfg", None) or {}
        mean, std = config.get("mean", _IMAGENET[0]), config.get("std", _IMAGENET[1])
        if known is not None:
            mean, std = known.mean or mean, known.sd or std
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        if self.is_vit:
            self.patch = int(info.reduction()[0])
            self.strides, self.channels, self.block = (TOKEN,) * 4, tuple(info.channels()), VIT_BLOCK
        else:
            self.strides, self.channels = tuple(info.reduction()), tuple(info.channels())

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the feature maps of an image ``(N, 3, H, W)`` in 0 to 1, finest first."""
        image = (image - self.mean) / self.std
        return self._tokens(image) if self.is_vit else list(self.net(image))

    def _tokens(self, image: Tensor) -> list[Tensor]:
        """Run the ViT in blocks and put the token maps of each group together."""
        n, c, height, width = image.shape
        image = F.pad(image, (0, -width % VIT_BLOCK, 0, -height % VIT_BLOCK), mode="replicate")
        rows, cols = image.shape[2] // VIT_BLOCK, image.shape[3] // VIT_BLOCK
        blocks = image.reshape(n, c, rows, VIT_BLOCK, cols, VIT_BLOCK).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        side = VIT_BLOCK // TOKEN
        if self.patch != TOKEN:
            seen = (side * self.patch, side * self.patch)
            blocks = F.interpolate(blocks, size=seen, mode="bilinear", antialias=True, align_corners=False)
        maps = [
            tokens.reshape(n, rows, cols, -1, side, side).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
            for tokens in self.net(blocks)
        ]
        return [x[..., : height // TOKEN, : width // TOKEN] for x in maps]


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as err:
        raise ImportError(
            f"encoders named 'timm/...' need timm and torchvision: install them with pip install 'pixnet[timm]'{_index()} ({err})"
        ) from err
    except RuntimeError as err:
        raise ImportError(
            "timm does not import, because the installed torchvision was built for another torch. Install the one that belongs to "
            f"torch {torch.__version__}: pip install --force-reinstall --no-deps torchvision{_index()} ({err})"
        ) from err
    return timm


def _index() -> str:
    """Return where pip finds the torchvision of a CPU build of torch: that of PyPI is built for CUDA."""
    return " --extra-index-url https://download.pytorch.org/whl/cpu" if torch.__version__.endswith("+cpu") else ""


def _create(timm: Any, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, ConnectionError) as err:
        raise FileNotFoundError(_how_to_supply(name, err)) from err
    except RuntimeError as err:
        if "No pretrained weights" in str(err):
            raise FileNotFoundError(_how_to_supply(name, err)) from err
        if "Unknown model" in str(err) or "Invalid" in str(err):
            raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them ({err})") from err
        raise


def _how_to_supply(name: str, err: Exception) -> str:
    source, _, repo = name.rpartition(":")
    if source == "local-dir":
        return f"the folder {repo!r} has no model of timm: it needs config.json and the weights ({err})"
    where = f"https://huggingface.co/{repo}" if source else "Hugging Face's repository of that model"
    folder = repo.rpartition("/")[2]
    return (
        f"the weights of {name!r} cannot be had: {err} Go online; where a model is gated, accept its terms at {where} and run "
        f"'hf auth login'. Without a connection, download its files elsewhere and name their folder: "
        f"encoder='timm/local-dir:/path/to/{folder}'"
    )
