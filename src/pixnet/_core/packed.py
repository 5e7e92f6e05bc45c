"""A model ready to run: on which device, in which arithmetic, and how it reaches another process once."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import threading
from collections import OrderedDict
from typing import Any

import cloudpickle
import torch
from torch import nn

from pixnet._core.tasks import cluster_client

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_READY: OrderedDict[tuple[str, str], nn.Module] = OrderedDict()
_READY_SIZE = 2
_LOADING = threading.Lock()


# device and precision ----------------------------------------------------------------------------------------------


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to run on; None takes a GPU where there is one.

    With a cluster in scope a device that is named is taken at its word: this machine's devices say nothing of the workers'.

    Raises
    ------
    ValueError
        If the device is unknown or not there.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; valid: 'cpu', 'cuda', 'cuda:0', 'mps', ...") from error
    if cluster_client() is not None:
        return device
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device is {str(device)!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps'; torch sees no such device here")
    return device


def resolve_precision(precision: str | None, device: torch.device) -> str:
    """Return the arithmetic to run in; None takes bfloat16 where the device computes in it natively, else float32.

    Raises
    ------
    ValueError
        If the name is unknown, or float16 is asked of a CPU.
    """
    if precision is None:
        return "bfloat16" if _native_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; valid: None, {', '.join(map(repr, PRECISIONS))}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision is 'float16', which CPUs do not compute in; take 'bfloat16' or 'float32'")
    return precision


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        names = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")
        if capabilities:
            return any(capabilities.get(name) for name in names)
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(check is not None and check() for check in checks)
    return False


# the model ---------------------------------------------------------------------------------------------------------


class PackedModel:
    """A model as tasks carry it: pickled as bytes with a hash, unpacked once in a process.

    Parameters
    ----------
    model
        The model; a copy is kept, so that later training does not change a lazy map.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hash = model_hash(model)
        self._module = fold_norms(copy.deepcopy(model).eval().cpu())
        self._bytes: bytes | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._bytes is None:
            self._bytes = cloudpickle.dumps(self._module)
        return {"hash": self.hash, "_bytes": self._bytes, "_module": None}

    def ready(self, device: torch.device) -> nn.Module:
        """Return the model on a device, laid out for it; the same object each time in a process."""
        key = (self.hash, str(device))
        with _LOADING:
            if key not in _READY:
                module = pickle.loads(self._bytes) if self._module is None else self._module
                module = module if device.type == "cpu" else copy.deepcopy(module)
                _READY[key] = module.to(device=device, memory_format=torch.channels_last)
                while len(_READY) > _READY_SIZE:
                    _READY.popitem(last=False)
            _READY.move_to_end(key)
            return _READY[key]


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
