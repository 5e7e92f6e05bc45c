"""Encoders from timm: any CNN with feature maps, any ViT by its intermediate tokens. Extra: pixnet[timm]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIT_BLOCK = 256
"""A ViT sees blocks of this many pixels, anchored at the slide's origin: its attention never depends on the tiling."""

_UNI2_H = {
    # The architecture that Hugging Face's model card of UNI2-h gives for timm.create_model.
    "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
}  # fmt: skip


class TimmEncoder(nn.Module):
    """A timm model as a feature pyramid.

    CNNs give their own feature maps. Of a ViT, the tokens after four groups of blocks become maps at strides 4, 8, 16 and
    32: shallow groups are enlarged, the deepest reduced (PixNet's way). A ViT with patches of 14 sees its blocks reduced
    to 14/16, so that a token stands for 16 pixels.

    Parameters
    ----------
    name
        As `timm.create_model` takes it, such as ``"resnet18"`` or ``"hf-hub:MahmoodLab/UNI2-h"``.
    pretrained
        Load its weights (from the hub, or timm's cache).
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

    def __init__(self, name: str, pretrained: bool = True, **options) -> None:
        super().__init__()
        timm = _import_timm()
        self.is_vit = "vit" in name.lower() or "uni" in name.lower() or "virchow" in name.lower()
        if name.endswith("/UNI2-h"):
            options = _uni2_options() | options
        if self.is_vit:
            depth = options.get("depth") or len(_create(timm, name, False, options).blocks)
            options |= {"out_indices": [round(depth * q) - 1 for q in (0.25, 0.5, 0.75, 1.0)]}
            options.setdefault("dynamic_img_size", True)
        else:
            options.setdefault("out_indices", None)
        options = {k: v for k, v in options.items() if v is not None}
        self.net = _create(timm, name, pretrained, options | {"features_only": True})
        info = self.net.feature_info
        config = self.net.pretrained_cfg if hasattr(self.net, "pretrained_cfg") else {}
        mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        if self.is_vit:
            self.patch = int(info.reduction()[0])
            self.strides, self.channels = (4, 8, 16, 32), tuple(info.channels())
        else:
            self.strides, self.channels = tuple(info.reduction()), tuple(info.channels())

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the feature maps of an image ``(N, 3, H, W)`` in 0 to 1, finest first."""
        image = (image - self.mean) / self.std
        return self._tokens(image) if self.is_vit else list(self.net(image))

    def _tokens(self, image: Tensor) -> list[Tensor]:
        """Run the ViT in blocks, put their token maps together, and bring each group to its stride."""
        n, c, height, width = image.shape
        image = F.pad(image, (0, -width % VIT_BLOCK, 0, -height % VIT_BLOCK), mode="replicate")
        rows, cols = image.shape[2] // VIT_BLOCK, image.shape[3] // VIT_BLOCK
        blocks = image.reshape(n, c, rows, VIT_BLOCK, cols, VIT_BLOCK).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        if self.patch != 16:
            side = VIT_BLOCK // 16 * self.patch
            blocks = F.interpolate(blocks, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        out = []
        for stride, tokens in zip(self.strides, self.net(blocks)):
            side = tokens.shape[-1]
            x = (
                tokens.reshape(n, rows, cols, -1, side, side)
                .permute(0, 3, 1, 4, 2, 5)
                .reshape(n, -1, rows * side, cols * side)
            )
            x = x[..., : -(-height // 16), : -(-width // 16)]
            size = (height // stride, width // stride)
            out.append(F.interpolate(x, size=size, mode="bilinear", align_corners=False) if x.shape[-2:] != size else x)
        return out


def _import_timm():
    try:
        import timm
    except (ImportError, RuntimeError) as err:
        raise ImportError(
            f"encoders named 'timm/...' need timm and a torchvision built for this torch: pip install 'pixnet[timm]' ({err})"
        ) from err
    return timm


def _uni2_options() -> dict:
    from timm.layers import SwiGLUPacked

    return _UNI2_H | {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


def _create(timm, name: str, pretrained: bool, options: dict) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, ConnectionError) as err:
        raise FileNotFoundError(
            f"the weights of {name!r} cannot be had: {err}. Log in to the hub (huggingface-cli login) and accept the model's "
            "terms, or give a file: TimmEncoder(name, pretrained_cfg_overlay={'file': 'weights.bin'})"
        ) from err
    except RuntimeError as err:
        if "Unknown model" in str(err) or "Invalid" in str(err):
            raise ValueError(f"timm has no model {name!r}; timm.list_models() lists them ({err})") from err
        raise
