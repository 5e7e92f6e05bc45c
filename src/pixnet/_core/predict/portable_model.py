"""A model as it reaches other processes: once each, with a hash to tell it by."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import pickle
import threading
from collections import OrderedDict
from typing import Any

import cloudpickle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CACHE: OrderedDict[tuple[str, str], nn.Module] = OrderedDict()
_CACHE_SIZE = 2
_LOADING = threading.Lock()


class PortableModel:
    """A model that tasks carry: pickled as bytes with a hash, unpacked once in a process.

    Parameters
    ----------
    model
        The model; a copy is kept, so that later training does not change a lazy map.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hash = model_hash(model)
        self._module = fuse_activations(fold_norms(copy.deepcopy(model).eval().cpu()))
        self._bytes: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._bytes is None:
            self._bytes = cloudpickle.dumps(self._module)
        return {"hash": self.hash, "_bytes": self._bytes, "_module": None}

    def ready(self, device: torch.device) -> nn.Module:
        """Return the model on a device, laid out for it; the same object each time in a process."""
        key = (self.hash, str(device))
        with _LOADING:
            if key not in _CACHE:
                module = pickle.loads(self._bytes) if self._module is None else self._module
                module = module if device.type == "cpu" else copy.deepcopy(module)
                _CACHE[key] = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                while len(_CACHE) > _CACHE_SIZE:
                    _CACHE.popitem(last=False)
            _CACHE.move_to_end(key)
            return _CACHE[key]


def n_cached() -> int:
    """Return the number of models that this process holds ready."""
    return len(_CACHE)


def clear_cache() -> None:
    """Forget the models that this process holds ready."""
    with _LOADING:
        _CACHE.clear()


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(getattr(model, "config", {}), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm that follows a convolution in a sequence into its weights: the same function, less work."""
    for child in module.children():
        fold_norms(child)
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        for first, second in zip(names, names[1:]):
            conv, norm = module._modules[first], module._modules[second]
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                module._modules[first] = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
                module._modules[second] = nn.Identity()
    return module


class FusedConv(nn.Module):
    """A convolution that clamps its output in the same pass over memory, where oneDNN runs it in float32.

    It gives what the two layers give one after the other, up to rounding. The operator is the one that torch.compile
    uses.
    """

    def __init__(self, conv: nn.Conv2d, lowest: float, largest: float) -> None:
        super().__init__()
        self.conv, self.lowest, self.largest = conv, lowest, largest

    def forward(self, x: Tensor) -> Tensor:
        """Return the clamped convolution."""
        conv = self.conv
        plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or not _fuses():  # it may have come from another machine
            return F.hardtanh(conv(x), self.lowest, self.largest, inplace=True)
        return _clamped_conv(x, conv, self.lowest, self.largest)


def fuse_activations(module: nn.Module) -> nn.Module:
    """Join each convolution with the ReLU6 that follows it in a sequence, where oneDNN runs both at once."""
    if not _fuses():
        return module
    for child in module.children():
        fuse_activations(child)
    if isinstance(module, nn.Sequential):
        names = [name for name, child in module._modules.items() if type(child) is not nn.Identity]
        for first, second in zip(names, names[1:]):
            conv, act = module._modules[first], module._modules[second]
            if type(conv) is nn.Conv2d and type(act) is nn.ReLU6 and conv.padding_mode == "zeros":
                module._modules[first], module._modules[second] = FusedConv(conv, 0.0, 6.0), nn.Identity()
    return module


def _clamped_conv(x: Tensor, conv: nn.Conv2d, lowest: float, largest: float) -> Tensor:
    padding, scalars = list(conv.padding), [lowest, largest]
    return torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, conv.groups, "hardtanh", scalars, ""
    )


@functools.cache
def _fuses() -> bool:
    """Whether this torch has the operator, and it computes what it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), 9 * torch.randn(1, 8, 9, 9)
        x = x.to(memory_format=torch.channels_last)
        try:
            return torch.allclose(_clamped_conv(x, conv, 0.0, 6.0), conv(x).clamp(0, 6), atol=1e-4)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
