"""Sphinx configuration: MyST pages, the furo theme, and the reference taken from docstrings."""

from __future__ import annotations

import re
from pathlib import Path

_package = Path(__file__).parent.parent / "fdshare" / "__init__.py"
_version = re.search(r'^__version__ = "(.+)"$', _package.read_text(), re.MULTILINE)
if _version is None:
    raise RuntimeError(f"no __version__ in {_package}")

project = "fdshare"
author = "fdshare contributors"
copyright = "2026, fdshare contributors"
release = version = _version[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fdshare {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_use_type_comments = False
napoleon_numpy_docstring = False
