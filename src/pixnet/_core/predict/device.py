"""The device and the precision that a model runs in."""

from __future__ import annotations

import torch

from pixnet._core.parallel import cluster_client

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to run on; None takes a GPU where there is one.

    With a cluster in scope a device that is named is not checked: the workers' devices may differ from this machine's.

    Raises
    ------
    ValueError
        If the device is unknown or missing.
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
        raise ValueError(f"device is {str(device)!r}; torch finds {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps'; torch does not find one here")
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
        raise ValueError("precision is 'float16', in which CPUs do not compute; use 'bfloat16' or 'float32'")
    return precision


def _native_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 without converting."""
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        names = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")
        if capabilities:
            return any(capabilities.get(name) for name in names)
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(check is not None and check() for check in checks)
    return False
