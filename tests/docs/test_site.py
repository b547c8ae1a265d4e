"""The documentation site: every page is in it, and its generated pages have every command and key."""

import re
from dataclasses import fields

import docstrings
import generated_pages
from tests.docs.conftest import DOCUMENTS
from tests.docs.markdown import ROOT, fenced_blocks

from fusion_hf.cli import COMMANDS, make_parser
from fusion_hf.training.recipe_keys import OwnArguments

DOCS = ROOT / "docs"
# pages that have tests of their own
TESTED_BY_THEIR_OWN = ("interchange", "serving", "synthesis", "training", "trl", "tutorial_own_images")
CONTENTS = re.compile(r"^```{toctree}$(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_contents():
    listed = set("\n".join(CONTENTS.findall((DOCS / "index.md").read_text("utf-8"))).splitlines())
    paths = [path.relative_to(DOCS).with_suffix("") for path in (*DOCS.glob("*.md"), *DOCS.glob("benchmarks/*.md"))]
    pages = {path.as_posix() for path in paths} - {"index"}
    assert pages - listed == set()
    assert {f"generated/{path}" for path in ("cli", "recipe_keys")} <= listed


def test_the_snippets_of_every_page_are_executed():
    pages = {f"docs/{path.name}" for path in DOCS.glob("*.md")}
    with_snippets = {page for page in pages if fenced_blocks(page, "python") or fenced_blocks(page, "bash")}
    assert "docs/generation.md" in with_snippets
    assert with_snippets - set(DOCUMENTS) - {f"docs/{name}.md" for name in TESTED_BY_THEIR_OWN} == set()


def test_page_of_the_command_line():
    page = generated_pages.command_page()
    for name, parser in make_parser().commands.choices.items():
        (section,) = re.findall(rf"^## fusion-hf {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        options = {option for action in parser._actions for option in action.option_strings}
        assert [option for option in options if f"`{option}`" not in section] == []
    assert len(re.findall("^## ", page, re.MULTILINE)) == len(COMMANDS)
    assert "%(" not in page


def test_page_of_the_recipe_keys():
    page = generated_pages.recipe_page()
    assert [key.name for key in fields(OwnArguments) if f"| `{key.name}` |" not in page] == []
    assert "| `on_broken` | `error` |" in page


def test_docstrings_become_restructured_text():
    lines = ["Call [`X`] with **kwargs.", "", "    ```python", "    >>> 1", "    ```", "    **bold** and a `**b`."]
    assert list(docstrings.convert(lines)) == [
        *("Call `X` with \\*\\*kwargs.", "", "", "    .. code-block:: python", "", "        >>> 1", ""),
        "    **bold** and a `**b`.",
    ]
