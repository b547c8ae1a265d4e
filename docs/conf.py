"""Configure the documentation site, which `make docs` builds with Sphinx."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fusion_hf

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import read_markdown
from generated_pages import write_pages

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "fusion_hf"
author = "The fusion_hf contributors"
copyright = f"2025, {author}"
version = release = fusion_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
# docstrings use the single backticks of Markdown
default_role = "code"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"fusion_hf {release}"


def setup(app: "Sphinx") -> None:
    """Write the generated pages before Sphinx reads the sources, and convert docstrings."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", read_markdown, priority=400)  # before napoleon's 500
