"""Models from files and names."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pixnet._names import listed
from pixnet.models._checkpoint import Layout, read_checkpoint
from pixnet.models._config import ModelConfig
from pixnet.models._pixnet import PixNet
from pixnet.models._remote import fetch, is_remote

SHIPPED = {name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("her2st", "kidney")}
"""Models that come with the package."""


def load(path: str | Path) -> PixNet:
    """Load a model.

    Parameters
    ----------
    path
        A ``.safetensors`` checkpoint of pixnet; the name of a model that ships with the package (``"her2st"`` or
        ``"kidney"``); a URL with the SHA-256 hash of its file, ``"https://.../model.safetensors#sha256:HASH"``; or a
        repository of the Hugging Face Hub, ``"hf://owner/name"`` (``pixnet[hub]``), whose file is ``model.safetensors``
        unless it is named, and ``"hf://owner/name@revision"``. What was downloaded is kept in ``settings.cache_dir``,
        or in the Hub's own cache.

    Returns
    -------
    PixNet
        On the CPU, in evaluation mode, weights in float32.

    Raises
    ------
    ConnectionError
        If a model could not be downloaded.
    FileNotFoundError
        If there is no such file and no shipped model of that name.
    ImportError
        If the model's encoder, or the Hub, needs a package that is not installed.
    ValueError
        If a URL has no hash, or its file has another one. If the file is not a checkpoint of pixnet (a pickle, another
        format), is cut short, holds a setting that is unknown or out of range, tensors that do not fit its
        configuration, or NaN or infinite weights. File, field and value are named.

    Examples
    --------
    >>> import pixnet as px
    >>> model = px.models.load("her2st")
    >>> len(model.genes), len(model.loadings)
    (13898, 64)
    """
    path = file_of(path)
    header, tensors = read_checkpoint(path, _layout_of)
    model = PixNet(**asdict(header.config), pretrained=False)
    expected = model.state_dict()
    model.load_state_dict(expected | {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()})
    model.training_options, model.provenance = header.training_options, header.provenance
    model.stain, model.history = [dict(slide) for slide in header.stain], header.history
    model.evidence = header.evidence
    return model.eval()


def file_of(model: str | Path) -> Path:
    """Return the file of a model that is given by path, name or address."""
    if isinstance(model, str) and is_remote(model):
        return fetch(model)
    path = SHIPPED.get(str(model), Path(model))
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{str(model)!r} {problem}; pass a .safetensors file, a shipped model ({listed(SHIPPED)}), a URL with a hash, or "
            "hf://owner/name"
        )
    return path


def resolve_model(model: Any) -> tuple[PixNet, str]:
    """Return the model that an argument means, and its name: a PixNet, a path or a name; None is the one that ships."""
    if model is None:
        model = "her2st"
    if isinstance(model, str | Path):
        return load(model), Path(model).stem
    if not isinstance(model, PixNet):
        raise TypeError(
            f"model is of type {type(model).__name__}; pass a PixNet, the path or name of a checkpoint, or None"
        )
    return model, f"{len(model.genes)} genes, {model.config.encoder}"


class _Unfilled(TorchFunctionMode):
    """Leaves new tensors without random numbers; on the meta device torch would import its compiler to draw them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.Tensor.normal_, torch.Tensor.uniform_} or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _layout_of(config: ModelConfig) -> Layout:
    """Return shape and type of each tensor of a model, without their memory: tensors on torch's meta device are empty."""
    one = replace(config, members=1)
    try:
        with torch.device("meta"), _Unfilled():
            state = PixNet(**asdict(one), pretrained=False).state_dict()
    except (NotImplementedError, RuntimeError):  # a registered encoder whose construction needs values
        state = PixNet(**asdict(one), pretrained=False).state_dict()
    layout = {name: (tuple(t.shape), "F32" if t.is_floating_point() else "I64") for name, t in state.items()}
    member = {name.removeprefix("members.0."): of for name, of in layout.items() if name.startswith("members.0.")}
    return layout | {f"members.{i}.{name}": of for i in range(1, config.members) for name, of in member.items()}
