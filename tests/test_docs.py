"""The site and the README cover what there is, and what they point at exists."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
import shlex
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
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


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/your-data.md",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs/concepts").glob("*.md"))),
]
NOTEBOOKS = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tutorials").glob("*.ipynb"))]


def _cells(page):
    return json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS)
def test_relative_links_lead_somewhere(page):
    if page.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in _cells(page) if cell["cell_type"] == "markdown")
    else:
        text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:|pixnet\.", target):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_tutorials_are_complete(page):
    """They say how long they take, show figures of a full run, end with what to try next, and name no one's folders."""
    cells = _cells(page)
    first, last = "".join(cells[0]["source"]), "".join(cells[-1]["source"])
    assert re.search(r"\*\*Time:\*\* about .* minute", first)
    assert "**Needs:**" in first
    assert last.startswith("## Next")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] == i + 1 for i, cell in enumerate(code)), "run tutorials/execute.py"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    for cell in code:  # a call that draws and ends in a semicolon has its figure below it
        if re.search(r"^px\.pl\.\w+\(.*;$", "".join(cell["source"]).splitlines()[-1]):
            assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), cell["source"]
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output
        text = json.dumps(
            {k: v for k, v in output.items() if k != "data"} | {"text/plain": output.get("data", {}).get("text/plain")}
        )
        assert not re.search(r"/(?:home|root|tmp|Users|work)/", text)


def test_the_troubleshooting_page_quotes_real_messages():
    """Each fragment in the first column is part of a string in the code."""
    strings = []
    for path in (ROOT / "src/pixnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert quoted
    assert [text for text in quoted if not any(text in string for string in strings)] == []


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)


def test_the_lines_of_your_data_are_those_of_guides_that_run():
    """tests/io/test_platforms.py runs these guides as they are printed."""
    guides = ("slides", "visium", "visium-hd", "xenium")
    run = {
        line for name in guides for block in _blocks(f"docs/guides/{name}.md", "python") for line in block.split("\n")
    }
    lines = [line for block in _blocks("docs/your-data.md", "python") for line in block.split("\n")]
    assert len(lines) > 20
    assert [line for line in lines if line not in run] == []


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/your-data.md"])
def test_commands_are_understood(page):
    from pixnet.cli import app

    text = "\n".join(_blocks(page, "bash")) + "\n".join(re.findall(r"`(pixnet .+?)`", (ROOT / page).read_text()))
    commands = re.findall(r"^pixnet .+$", text, flags=re.M)
    assert commands
    for command in commands:
        app.parse_args(shlex.split(command, comments=True)[1:], exit_on_error=False, print_error=False)


def test_pictures_stay_small():
    for picture in (ROOT / "docs/_static").glob("*.png"):
        assert picture.stat().st_size <= 600_000, picture.name


def test_entries_and_citations_agree_with_the_package():
    tomllib = pytest.importorskip("tomllib")
    yaml = pytest.importorskip("yaml")
    entry = yaml.safe_load((ROOT / "docs/ecosystem/meta.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert entry["name"] == entry["install"]["pypi"] == project["name"]
    assert entry["license"] == project["license"]
    assert entry["version"] == f"v{project['version']}"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"version = {{{project['version']}}}" in (ROOT / "docs/project/citation.md").read_text()
    assert entry["project_home"] == project["urls"]["Homepage"]
    assert entry["documentation_home"] == project["urls"]["Documentation"]


# what every public name says about itself ----------------------------------------------------------------------------


def _thing(name):
    space, attribute = name.split(".")
    return getattr(getattr(px, space), attribute)


def _methods(name):
    thing = _thing(name)
    if not inspect.isclass(thing):
        return []
    return [m for m in vars(thing) if not m.startswith("_") and callable(getattr(thing, m))]


# Steps of forward, on tensors: their one line says it.
INNER = ("encode", "decode", "standardise", "read_out", "start", "train")
METHODS = [f"{name}.{method}" for name in PUBLIC for method in _methods(name)]


def _documented(name):
    """The callable and its docstring's sections: title to text."""
    space, attribute, *method = name.split(".")
    thing = _thing(f"{space}.{attribute}")
    thing = getattr(thing, method[0]) if method else thing
    text = inspect.getdoc(thing) or ""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}$", text, flags=re.MULTILINE)
    return thing, {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def _entries(section):
    """Name to description; ``a, b`` counts for both."""
    found = {}
    for entry in re.split(r"^(?=\S)", section.strip("\n"), flags=re.MULTILINE):
        if not entry.strip():
            continue
        head, _, body = entry.partition("\n")
        for one in head.split(":")[0].split(","):
            found[one.strip().lstrip("*")] = inspect.cleandoc(body).strip() if body.strip() else ""
    return found


def _parameters(thing):
    names = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_explained(name):
    thing, sections = _documented(name)
    parameters = _parameters(thing)
    if not parameters:
        return
    entries = _entries(sections["Parameters"])
    assert [p for p in parameters if not entries.get(p)] == []
    assert [e for e in entries if e and e not in parameters] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_returns_and_refuses(name):
    thing, sections = _documented(name)
    if not inspect.isclass(thing):
        returned = inspect.signature(thing).return_annotation
        assert (returned in (None, "None")) or all(_entries(sections["Returns"]).values())
    if _parameters(thing):
        errors = _entries(sections["Raises"])
        assert errors
        assert all(errors.values())
        for error in errors:
            assert error.endswith("Error"), f"{name} documents {error!r} as an error"


LENGTHS = re.compile(r"(_um|mpp|_px|edge|pitch)$|^(box|halo|window|stride|tile_size|size|margin)$")


@pytest.mark.parametrize("name", PUBLIC)
def test_lengths_have_units(name):
    thing, sections = _documented(name)
    for parameter, text in _entries(sections.get("Parameters", "")).items():
        if LENGTHS.search(parameter):
            assert re.search(r"\bum\b|µm|um/px|pixel|px\b", text), f"{name}({parameter}=) names no unit: {text}"


@pytest.mark.parametrize("name", METHODS)
def test_public_methods_are_explained(name):
    thing, sections = _documented(name)
    assert sections[""].strip(), name
    parameters = [p for p in _parameters(thing) if p not in ("args", "kwargs")]
    if parameters and "Parameters" in sections:
        assert [p for p in parameters if not _entries(sections["Parameters"]).get(p)] == []
    else:
        assert not parameters or name.endswith(INNER), name


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, monkeypatch, tmp_path):
    """Each in a fresh folder; examples that need a download are marked, and are not the only line that runs."""
    monkeypatch.chdir(tmp_path)
    thing = _thing(name)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(thing))
    tests = [t for t in finder.find(thing, name, globs={}) if t.examples]
    assert tests, f"{name} has no example"
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in tests:
            runner.run(test, out=output.append)
    plt.close("all")
    assert runner.summarize(verbose=False).failed == 0, "".join(output)
