"""Options of a command, from the signature and the docstring of the public function behind it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

F = TypeVar("F", bound=Callable[..., Any])

_LISTS = {"genes": list[str], "shapes": list[str], "agg_func": list[str], "table_key": str, "mask_key": str}
"""Options whose annotation allows more than a command line can say."""


def options_of(function: Callable[..., Any], leave_out: Collection[str] = ()) -> Callable[[F], F]:
    """Give a command the keywords of a public function that it passes on as ``**options``, with their help.

    Parameters
    ----------
    function
        The public function.
    leave_out
        Keywords that the command settles itself, or has under another meaning.
    """

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {*leave_out, *(p.name for p in own)}
        texts = described(function)
        more = []
        for p in inspect.signature(function).parameters.values():
            annotation = _annotation(function, p)
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in taken and annotation is not None:
                shown = Annotated[annotation, _parameter(texts.get(p.name, ""), annotation)]  # type: ignore[valid-type]
                several = p.name in _LISTS and isinstance(p.default, str)
                more.append(p.replace(annotation=shown, default=[p.default] if several else p.default))
        whole = signature.replace(parameters=[*own, *more])
        command.__signature__ = whole  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in whole.parameters.values()}
        return command

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, gene lists read from files (``@genes.txt``)."""
    found = {name: value for name, value in options.items() if value is not None and value != []}
    if len(found.get("agg_func", [])) == 1:
        found["agg_func"] = found["agg_func"][0]
    if "genes" in found:
        genes = [gene for name in found["genes"] for gene in _names(name)]
        found["genes"] = genes if genes != ["trusted"] else "trusted"
    if found.get("mask_key") in {"False", "false"}:
        found["mask_key"] = False
    return found


def _names(name: str) -> list[str]:
    if not name.startswith("@"):
        return [name]
    with open(name[1:], encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def described(function: Callable[..., Any]) -> dict[str, str]:
    """Return what a numpy docstring says of each parameter, as plain text."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-{3,}$|\Z)", doc, flags=re.S | re.M)
    found: dict[str, str] = {}
    for entry in re.split(r"^(?=\S)", section.group(1) if section else "", flags=re.M):
        names, _, text = entry.partition("\n")
        for name in names.split(","):
            found[name.strip()] = " ".join(_plain(text).split())
    return found


def _plain(text: str) -> str:
    """Return text without the markup of Sphinx."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    return text.replace("``", "").replace("`", "")


def _annotation(function: Callable[..., Any], p: inspect.Parameter) -> Any:
    """Return the type of an option; None for what only Python can say."""
    if p.name in _LISTS:
        return _LISTS[p.name] | None
    try:
        found = eval(str(p.annotation), vars(sys.modules[function.__module__]))
    except NameError:  # imported for type checks alone: an object
        return None
    return found


def _parameter(text: str, annotation: Any) -> Parameter:
    several = "list" in str(annotation) or "Sequence" in str(annotation)
    return Parameter(help=text, consume_multiple=several, negative=())
