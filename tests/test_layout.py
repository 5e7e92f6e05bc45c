"""The layout of the code, as docs/project/layout.md promises it."""

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
ANYONE = {"pixnet._settings", "pixnet._logging", "pixnet._names"}
"""Modules that any other may import."""


def _module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in sorted((SOURCE / "pixnet").rglob("*.py"))}


def _imports(path: Path) -> set[str]:
    """Return the modules of pixnet that a module imports, also within functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found - {_module(path)}


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def test_no_module_imports_itself_through_others():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a cycle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(IMPORTS[name]):
                visit(other)
            open_.pop()
            done.add(name)

    for name in IMPORTS:
        visit(name)


def test_no_module_is_imported_by_more_than_fifteen():
    importers = defaultdict(set)
    for name, others in IMPORTS.items():
        for other in others:
            importers[other].add(name)
    crowded = {name: len(by) for name, by in importers.items() if len(by) > 15 and name not in ANYONE}
    assert not crowded


def test_modules_have_at_most_400_lines():
    longer = {name: n for name, path in MODULES.items() if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert not longer


@pytest.mark.parametrize(("layer", "never"), [("_core", "spatialdata"), ("_core", "pixnet._sdata"), ("models", "pixnet._sdata"), ("_sdata", "pixnet.tl")])  # fmt: skip
def test_layers_do_not_import_upwards(layer, never):
    for path in (SOURCE / "pixnet" / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n == never or n.startswith(f"{never}.")], path


def test_benchmarks_use_no_private_name_of_a_module():
    """Modules of the package are private to users, not to its benchmarks; names with an underscore in them are."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pixnet._"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.name} imports {private} of {node.module}"


def test_the_lowest_versions_are_those_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *extras["test"], *extras["tutorials"]]
    lowest = {
        requirement.replace(">=", "==") for requirement in bounds if re.fullmatch(r"[\w.-]+>=[\w.]+", requirement)
    }
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()

    def plain(requirements):
        return {re.sub(r"(\.0)+$", "", one) for one in requirements}

    assert plain(line for line in lines if not line.startswith("#")) == plain(lowest)
