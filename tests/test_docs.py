"""The site and the README cover what there is, and what they point at exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import pixnet as px

ROOT = Path(__file__).parent.parent
NAMESPACES = ("datasets", "io", "models", "pl", "pp", "tl")
PUBLIC = [f"{space}.{name}" for space in NAMESPACES for name in getattr(px, space).__all__]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documentation's sources are not here")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_api_reference(name):
    listed = re.findall(r"^    ([a-z_]+\.\w+)$", (ROOT / "docs/api/index.md").read_text(), flags=re.MULTILINE)
    assert name in listed


def test_the_api_reference_lists_nothing_else():
    listed = re.findall(r"^    ([a-z_]+\.\w+)$", (ROOT / "docs/api/index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    space, attribute = name.split(".")
    thing = getattr(getattr(px, space), attribute)
    text = inspect.getdoc(thing) or ""
    if inspect.signature(thing).parameters:
        assert "Parameters\n----------" in text
    if not inspect.isclass(thing) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert "Returns\n-------" in text
    assert "Examples\n--------" in text
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^(\w+, )*\*{{0,2}}{parameter}(, \*{{0,2}}\w+)*( :.*)?$", text, flags=re.MULTILINE), (
            f"{name} does not document {parameter}"
        )


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs/concepts").glob("*.md"))]
)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:|pixnet\.", target):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_pictures_stay_small():
    for picture in (ROOT / "docs/_static").glob("*.png"):
        assert picture.stat().st_size <= 600_000, picture.name


def test_the_listing_entry_agrees_with_the_package():
    tomllib = pytest.importorskip("tomllib")
    yaml = pytest.importorskip("yaml")
    entry = yaml.safe_load((ROOT / "docs/ecosystem/meta.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert entry["name"] == entry["install"]["pypi"] == project["name"]
    assert entry["license"] == project["license"]
    assert entry["version"] == f"v{project['version']}"
    assert entry["project_home"] == project["urls"]["Homepage"]
    assert entry["documentation_home"] == project["urls"]["Documentation"]
