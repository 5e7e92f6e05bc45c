"""One-file checkpoints: safetensors with everything needed to use the model in the header. Loading runs no code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pixnet.models._pixnet import PixNet

FORMAT = 1
SHIPPED = {"her2st": Path(__file__).parent / "weights" / "her2st.safetensors"}
"""Models that come with the package."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_BUILD = (
    "genes", "mpp", "stride", "encoder", "decoder", "widths", "hidden", "members", "link", "quantity", "zoom", "window", "halo",
)  # fmt: skip
"""What of the configuration builds the model; all of it is in every checkpoint."""


def save(model: PixNet, path: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write a model to one file (see `PixNet.save`)."""
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the path is {str(path)!r}; a checkpoint ends in .safetensors")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; valid: {', '.join(map(repr, _DTYPES))}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    tensors = {
        name: (t.to(_DTYPES[dtype]) if t.is_floating_point() else t).contiguous().cpu()
        for name, t in model.state_dict().items()
    }
    header = {"format": FORMAT, "config": model.config, "history": model.history}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()  # with the permissions of any file; safetensors would keep others out
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={"pixnet": json.dumps(header, allow_nan=True)})
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> PixNet:
    """Load a model.

    Parameters
    ----------
    path
        A ``.safetensors`` checkpoint of pixnet, or the name of a model that ships with the package: ``"her2st"``.

    Returns
    -------
    PixNet
        On the CPU, in evaluation mode, weights in float32.

    Raises
    ------
    FileNotFoundError
        If there is no such file and no shipped model of that name.
    ValueError
        If the file is no checkpoint of pixnet (a pickle, another format), is cut short, or if its tensors do not fit its
        configuration.

    Examples
    --------
    >>> import pixnet as px
    >>> model = px.models.load("her2st")
    >>> len(model.genes)
    250
    """
    name, path = str(path), SHIPPED.get(str(path), Path(path))
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{name!r} {what}; pass a .safetensors file, or a shipped model: {', '.join(map(repr, SHIPPED))}"
        )
    header, tensors = _read(path)
    return _build(path, header, tensors)


def resolve_model(model: Any) -> tuple[PixNet, str]:
    """Return the model that an argument means, and what to call it: a PixNet, a path or a name; None is the one that ships.

    Raises
    ------
    TypeError
        If it is something else.
    """
    from pixnet.models._pixnet import PixNet

    if model is None:
        model = "her2st"
    if isinstance(model, str | Path):
        return load(model), Path(model).stem
    if not isinstance(model, PixNet):
        raise TypeError(
            f"model is of type {type(model).__name__}; pass a PixNet, the path or name of a checkpoint, or None"
        )
    return model, str(model.config.get("name") or f"{len(model.genes)} genes, {model.config.get('encoder', 'PixNet')}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read header and tensors, or say what the file is instead."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError, ValueError) as err:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK" or (start[:1] == b"\x80" and start[1:] in {b"\x02", b"\x03", b"\x04", b"\x05"}):
            raise ValueError(
                f"{path} is a pickle (torch.save); loading one can run any code, so pixnet reads .safetensors only: "
                "save the model with model.save('model.safetensors')"
            ) from None
        raise ValueError(f"{path} is no whole safetensors file (cut short, or another format): {err}") from err
    if "pixnet" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not of pixnet: its header has no 'pixnet' entry")
    try:
        header = json.loads(metadata["pixnet"])
        version = header["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as err:
        raise ValueError(f"{path} has a damaged pixnet header: {err}") from err
    if version > FORMAT:
        raise ValueError(f"{path} has checkpoint format {version}, this pixnet reads up to {FORMAT}: update pixnet")
    return header, tensors


def _build(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PixNet:
    from pixnet.models._pixnet import PixNet

    config = header["config"]
    lacking = [key for key in _BUILD if key not in config]
    if lacking:
        raise ValueError(f"{path} has a header without {', '.join(lacking)}")
    model = PixNet(**{key: config[key] for key in _BUILD}, pretrained=False)
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    if missing or extra:
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for kind, names in (("missing", missing), ("extra", extra)) if names]  # fmt: skip
        raise ValueError(f"{path} does not fit its own configuration: tensors {' and '.join(parts)}")
    wrong = [k for k, t in tensors.items() if t.shape != expected[k].shape]
    if wrong:
        raise ValueError(
            f"{path}: tensor {wrong[0]!r} has shape {tuple(tensors[wrong[0]].shape)}, "
            f"its configuration needs {tuple(expected[wrong[0]].shape)}"
        )
    model.load_state_dict({k: t.to(expected[k].dtype) for k, t in tensors.items()})
    model.config = config
    model.history = header.get("history", [])
    return model.eval()
