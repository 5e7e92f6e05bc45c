"""Sphinx configuration. The build needs no network; PIXNET_DOCS_INTERSPHINX=1 links to other projects' documentation."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import metadata
from pathlib import Path

warnings.filterwarnings("ignore", message=".*is deprecated. Check CHANGES for Sphinx API modifications.*")

info = metadata("pixnet")
project = "pixnet"
author = "The pixnet developers"
copyright = f"2026, {author}"
version = release = info["Version"]
repository_url = "https://github.com/pixnet-dev/pixnet"

# Tutorials lie beside docs/ and link into it with ../docs/; in the site, both are under one root.
here = Path(__file__).parent
(here / "tutorials").mkdir(exist_ok=True)
for source in (here.parent / "tutorials").iterdir():
    if source.suffix in {".md", ".ipynb"}:
        text, copy_ = (
            source.read_text(encoding="utf-8").replace("](../docs/", "](../"),
            here / "tutorials" / source.name,
        )
        if not copy_.exists() or copy_.read_text(encoding="utf-8") != text:  # rebuild only what changed
            copy_.write_text(text, encoding="utf-8")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
]

exclude_patterns = ["_build", "**.ipynb_checkpoints", "_generated", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]
default_role = "py:obj"
nitpicky = True
# Names of other projects resolve only with their inventories, which need network access.
nitpick_ignore_regex = [("py:.*", r"(?!pixnet\.).*"), ("py:.*", r"pixnet\.(_[a-z]|.*\._).*")]

if os.environ.get("PIXNET_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
        "xarray": ("https://docs.xarray.dev/en/stable/", None),
    }

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = True
always_use_bars_union = True
typehints_defaults = "braces"
suppress_warnings = [
    "sphinx_autodoc_typehints.forward_reference",
    "sphinx_autodoc_typehints.guarded_import",
    "config.cache",
    "mystnb.unknown_mime_type",
]

nb_execution_mode = "off"  # notebooks are committed with outputs; the tests execute them
nb_merge_streams = True
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = "pixnet"
html_static_path = ["_static"]
html_css_files = ["pixnet.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_show_sphinx = False
html_theme_options = {
    "repository_url": repository_url,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "home_page_in_toc": False,
    "show_toc_level": 2,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
pygments_style = "default"
