"""One-file checkpoints: safetensors with a typed header. All of a file is checked before anything is built; no code runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import AllowInfNan, Field, model_validator
from torch import Tensor
from typing_extensions import TypedDict  # that of typing serves pydantic from Python 3.12 on

from pixnet._checked import checked
from pixnet._evidence import COLUMNS, Evidence
from pixnet._names import listed
from pixnet._whole_file import whole_file
from pixnet.models._config import ModelConfig

FORMAT = 2
MAX_HEADER_BYTES = 8 * 2**20
MAX_NESTING = 20

LACKING: dict[int, dict[str, Any]] = {
    1: {
        "decoder": "pixel_mlp", "widths": None, "hidden": 128, "members": 1, "quantity": "density",
        "zoom": 1, "window": 1024, "halo": 320, "n_programs": None,
    },
    2: {"n_programs": None},
}  # fmt: skip
"""By header version: what a setting is that a header lacks. Whoever adds a setting adds, to each version, the value that
models had before there was the setting; defaults of new models may change, these never do."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FLOATS, _INTEGERS = {"F64", "F32", "F16", "BF16"}, {"I64", "I32"}
_POSITIVE = ("feature_sd_", "head.area_um2", "novelty.sd")
_RENAMED = ((re.compile(r"^(members\.\d+)\.head\."), r"\1.last."), (re.compile(r"^area_um2$"), "head.area_um2"))
"""Names that tensors had in earlier versions."""
_NOVELTY = "novelty."
"""Tensors that a file may lack, all together: those of a model that does not know what is new to it."""

Three = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)]


class StainStatistics(TypedDict):
    """Stain of a training slide (see `pixnet._core.slide.stain.statistics`)."""

    od_mean: Three
    od_sd: Three
    detail: NotRequired[Annotated[float, Field(ge=0)]]
    masked: NotRequired[bool]


@checked
class Header:
    """All that a checkpoint holds beside the weights. Only ``config`` is part of the function that the model computes."""

    config: ModelConfig
    training_options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    stain: list[StainStatistics] = Field(default_factory=list)
    history: list[dict[str, Annotated[float, AllowInfNan(True)] | int | None]] = Field(default_factory=list)
    evidence: Evidence | None = None

    @model_validator(mode="after")
    def _evidence_fits(self) -> Header:
        """Refuse evidence of another number of genes."""
        if self.evidence is not None:
            sizes = {len(getattr(self.evidence, name)) for name in COLUMNS}
            if sizes != {len(self.config.genes)}:
                raise ValueError(f"evidence is of {sorted(sizes)} genes, and the model has {len(self.config.genes)}")
        return self


Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and type (as safetensors calls it) of each tensor, by name."""


def write_checkpoint(
    path: str | Path, header: Header, tensors: Mapping[str, Tensor], *, dtype: str = "float32", overwrite: bool = False
) -> None:
    """Write a checkpoint; an existing file stays whole until the new one is."""
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the path is {str(path)!r}; a checkpoint ends in .safetensors")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; valid: {listed(_DTYPES)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")

    # Single numbers, such as an area in µm², stay in float32: they may exceed what float16 holds. So do means and
    # spreads of features, small differences of which count.
    def stored(name: str, t: Tensor) -> Tensor:
        exact = t.ndim == 0 or (name.startswith(_NOVELTY) and t.ndim == 1)
        return (t if exact or not t.is_floating_point() else t.to(_DTYPES[dtype])).contiguous().cpu()

    tensors = {name: stored(name, t) for name, t in tensors.items()}
    with whole_file(path) as partial:
        partial.touch()  # with the permissions of any file; safetensors would keep others out
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={"pixnet": json.dumps({"format": FORMAT, **asdict(header)})})
        partial.chmod(mode)


def read_checkpoint(path: Path, layout_of: Callable[[ModelConfig], Layout]) -> tuple[Header, dict[str, Tensor]]:
    """Read a checkpoint, having compared it with the layout that its configuration asks for.

    Raises
    ------
    ImportError
        If its encoder needs a package that is not there.
    ValueError
        If the file is not a whole checkpoint of pixnet, a setting is unknown or out of range, tensors do not fit the
        configuration, or they hold NaN or infinite values.
    """
    from safetensors import SafetensorError, safe_open

    _check_start(path)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as err:
        raise ValueError(f"{path} is not a whole safetensors file (cut short, or another format): {err}") from err
    with opened as file:
        header, added = _read_header(path, file.metadata() or {})
        names = {_current(name): name for name in sorted(file.keys())}
        parts = {name: file.get_slice(stored) for name, stored in names.items()}
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        try:
            expected = layout_of(header.config)
        except ImportError as err:
            raise ImportError(f"{path}: {err}") from err
        except (OSError, RuntimeError, ValueError) as err:
            raise ValueError(f"{path}: its model cannot be built: {err}") from err
        lacking = set(added)
        if not any(name.startswith(_NOVELTY) for name in found):
            lacking |= {name for name in expected if name.startswith(_NOVELTY)}
        _check_layout(path, found, {name: layout for name, layout in expected.items() if name not in lacking})
        tensors = {name: _checked_tensor(path, name, file.get_tensor(stored)) for name, stored in names.items()}
        return header, added | tensors


def _check_start(path: Path) -> None:
    """Refuse, by its first bytes, a pickle or a file whose header is too long to be parsed."""
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}):
        raise ValueError(
            f"{path} is a pickle (torch.save); loading one can run any code, so pixnet reads .safetensors only: "
            "save the model with model.save('model.safetensors')"
        )
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size + 8 > path.stat().st_size:
        raise ValueError(f"{path} is not a whole safetensors file (cut short, or another format)")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {size:,} bytes; checkpoints have at most {MAX_HEADER_BYTES:,}")


# the header --------------------------------------------------------------------------------------------------------


def _read_header(path: Path, metadata: Mapping[str, str]) -> tuple[Header, dict[str, Tensor]]:
    """Return the header, and tensors that early formats kept in it."""
    if "pixnet" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not of pixnet: its header has no 'pixnet' entry")
    try:
        values = json.loads(metadata["pixnet"])
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} has a damaged header: {err}") from err
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise ValueError(f"{path} has a damaged header: it is not an object with a 'config'")
    if _nesting(values) > MAX_NESTING:
        raise ValueError(f"{path} has a damaged header: it is nested more than {MAX_NESTING} levels deep")
    version = values.pop("format", None)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{path} has a damaged header: format is {version!r}; a whole number is needed")
    if version > FORMAT:
        raise ValueError(f"{path} has checkpoint format {version}, this pixnet reads up to {FORMAT}: update pixnet")
    try:
        added = _from_version_1(values) if version == 1 else {}
        config = LACKING[version] | values.pop("config")
        _check_known("config", config, ModelConfig)
        _check_known("the header", {"config": config, **values}, Header)
        lacking = sorted({field.name for field in fields(ModelConfig)} - set(config))
        if lacking:
            raise ValueError(f"config lacks {listed(lacking)}")
        evidence = values.pop("evidence", None)
        return Header(
            ModelConfig(**config), evidence=None if evidence is None else Evidence(**evidence), **values
        ), added
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path} has a header that cannot be used: {err}") from err


def _check_known(part: str, values: Mapping[str, Any], owner: Any) -> None:
    """Refuse entries that a later version may have written."""
    unknown = sorted(set(values) - {field.name for field in fields(owner)})
    if unknown:
        raise ValueError(f"{part} has {listed(unknown)}, which this version of pixnet does not know: update pixnet")


def _from_version_1(values: dict[str, Any]) -> dict[str, Tensor]:
    """Bring a header of version 1, whose configuration held everything, to the current form; return what is a tensor now."""
    config = values["config"] = dict(values["config"])
    values["provenance"] = config.pop("provenance", {})
    values["stain"] = config.pop("stain", [])
    values["training_options"] = config.pop("recipe", {})
    if isinstance(values["provenance"], dict):
        values["provenance"] |= {k: config.pop(k) for k in ("epochs",) if k in config}
        if "recipe" in values["provenance"]:
            values["provenance"]["options"] = values["provenance"].pop("recipe")
    link = config.pop("link", "exp")
    if link != "exp":
        raise ValueError(f"config.link is {link!r}; pixnet has 'exp' only")
    config.pop("unit", None)
    config.pop("name", None)
    if config.get("decoder") == "none":
        config["decoder"] = "pixel_mlp"
    area = config.pop("area_um2", 1000.0)
    if isinstance(area, bool) or not isinstance(area, int | float) or not 0 < area < 1e12:
        raise ValueError(f"config.area_um2 is {area!r}; an area in µm² is needed")
    return {"head.area_um2": torch.tensor(float(area))} if config.get("quantity") == "log_sum" else {}


def _nesting(value: Any) -> int:
    """Return how deep lists and objects are nested, up to one more than is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_NESTING:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1
    return depth


# the tensors -------------------------------------------------------------------------------------------------------


def _current(name: str) -> str:
    """Return the name that a tensor has in this version."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _check_layout(path: Path, found: Layout, expected: Layout) -> None:
    """Compare names, shapes and types of the tensors with those of the model."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for kind, names in (("missing", missing), ("extra", extra)) if names]  # fmt: skip
        raise ValueError(f"{path} does not fit its own configuration: tensors {' and '.join(parts)}")
    for name, (shape, dtype) in expected.items():
        if found[name][0] != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {found[name][0]}, its configuration needs {shape}")
        if found[name][1] not in (_FLOATS if dtype in _FLOATS else _INTEGERS):
            raise ValueError(f"{path}: tensor {name!r} has type {found[name][1]}, its configuration needs {dtype}")


def _checked_tensor(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Refuse values that no training gives: NaN, infinite, or a spread that is negative."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        wrong = tensor[~torch.isfinite(tensor)].flatten()
        raise ValueError(
            f"{path}: tensor {name!r} holds {len(wrong):,} values such as {float(wrong[0])}; weights are finite"
        )
    least = 0.0 if name.endswith("running_var") else None
    if least is not None and (tensor < least).any():
        raise ValueError(f"{path}: tensor {name!r} holds {float(tensor.min())}; a variance is not negative")
    if name == f"{_NOVELTY}quantiles" and (tensor.diff() < 0).any():
        raise ValueError(f"{path}: tensor {name!r} falls; quantiles rise from one to the next")
    if name.startswith(_POSITIVE) and (tensor <= 0).any():
        raise ValueError(f"{path}: tensor {name!r} holds {float(tensor.min())}; it must be positive")
    return tensor
