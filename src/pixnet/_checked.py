"""Frozen dataclasses of settings whose values are checked by type and range, and refused by name."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, dataclass_transform

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from pixnet._names import listed

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
"""Shows the first few of the thousands of genes that a setting may name, and other values whole."""

_WRONG_NAMES = {"missing", "missing_argument", "unexpected_keyword_argument", "unexpected_positional_argument"}


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def checked(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that raises ValueError for a wrong value, TypeError for a wrong name."""
    made: Any = dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))(cls)
    build = made.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
        try:
            build(self, *args, **plain)
        except ValidationError as error:
            first = error.errors()[0]
            wrong_name = first["type"] in _WRONG_NAMES
            raise (TypeError if wrong_name else ValueError)(explain(first, made)) from None

    def __repr__(self: Any) -> str:
        values = (f"{field.name}={_SHORT.repr(getattr(self, field.name))}" for field in fields(made))
        return f"{made.__name__}({', '.join(values)})"

    made.__init__, made.__repr__ = __init__, __repr__
    return made


def explain(error: Mapping[str, Any], owner: Any) -> str:
    """Say what one of pydantic's errors is about: the name, the value, and what it should be."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] in {"missing", "missing_argument"}:
        return f"{owner.__name__} lacks {name!r}"
    if error["type"] == "unexpected_keyword_argument":
        return f"{owner.__name__} has no setting {name!r}; it has: {listed(f.name for f in fields(owner))}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    value = repr(error["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    return f"{name} is {value}; it should {error['msg'].partition(' should ')[2] or error['msg']}"


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
