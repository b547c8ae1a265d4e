"""The documentation site: every page is in it, and its generated pages have every command and key."""

import re
from dataclasses import fields
from pathlib import Path

import docstrings
import generated_pages
import generated_reference
from tests.docs.conftest import DOCUMENTS
from tests.docs.markdown import ROOT, fenced_blocks

from fusion_hf import FusionConfig
from fusion_hf.cli import COMMANDS, make_parser
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS
from fusion_hf.serving.fields import REQUEST
from fusion_hf.serving.limits import Limits
from fusion_hf.synthesis.run_config import EndpointSettings, ImageSettings, SynthesisConfig
from fusion_hf.training.recipe_keys import OwnArguments

DOCS = ROOT / "docs"
# pages that have tests of their own
TESTED_BY_THEIR_OWN = ("interchange", "serving", "synthesis", "trl", "tutorial_own_images")
CONTENTS = re.compile(r"^```{toctree}$(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_contents():
    listed = set("\n".join(CONTENTS.findall((DOCS / "index.md").read_text("utf-8"))).splitlines())
    paths = [path.relative_to(DOCS).with_suffix("") for path in (*DOCS.glob("*.md"), *DOCS.glob("benchmarks/*.md"))]
    pages = {path.as_posix() for path in paths} - {"index"}
    assert pages - listed == set()
    assert {f"generated/{Path(name).stem}" for name in ("cli.md", *generated_reference.PAGES)} <= listed


def test_the_python_of_every_page_is_executed():
    pages = {f"docs/{path.name}" for path in DOCS.glob("*.md")}
    with_snippets = {page for page in pages if fenced_blocks(page, "python")}
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
    page = generated_reference.recipe_page()
    assert [key.name for key in fields(OwnArguments) if page.count(f"| `{key.name}` |") != 1] == []
    assert "| `on_broken` | text | `error` | What a broken record does: `error` ends the run" in page


def test_page_of_the_configuration():
    page = generated_reference.config_page()
    declared = [each.name for each in fields(FusionConfig) if each.name in FusionConfig.__annotations__]
    undescribed = [name for name in declared if page.count(f"| `{name}` |") != 1]
    assert undescribed == ["tie_word_embeddings"]  # which every model of transformers has
    assert "| `query_lens` | `list[int]` | `[4, 16, 36, 64, 144]` |" in page


def test_page_of_the_server():
    page = generated_reference.server_page()
    accepted = {*REQUEST.known, *REQUEST.neutral, *REQUEST.ignored}
    assert [name for name in accepted if f"`{name}`" not in page] == []
    assert "`top_k` | `-1`, `0` |" in page
    assert f"| `--max-body-bytes` | {Limits().body_bytes} |" in page
    options = make_parser().commands.choices["serve"]._option_string_actions
    assert [limit.name for limit in fields(Limits) if generated_reference.option_of(limit.name) not in options] == []


def test_page_of_the_benchmarks():
    page = generated_reference.benchmarks_page()
    assert [name for name in BENCHMARKS if page.count(f"| `{name}` |") != 2] == []
    assert [name for name in VARIANTS if page.count(f"| `{name}` |") != 1] == []
    assert "| `mmbench_en_test` | `lmms-lab-encoder/MMBench`, `en` | `mmbench_en/test-*.parquet` |" in page


def test_page_of_the_synthesis_keys():
    page = generated_reference.synthesis_page()
    for section in (SynthesisConfig, EndpointSettings, ImageSettings):
        assert [key.name for key in fields(section) if f"| `{key.name}` |" not in page] == []
    assert "| `server` | `endpoint`, `vllm`, `sglang` | `endpoint` |" in page


def test_docstrings_become_restructured_text():
    lines = ["Call [`X`] with **kwargs.", "", "    ```python", "    >>> 1", "    ```", "    **bold** and a `**b`."]
    assert list(docstrings.convert(lines)) == [
        *("Call `X` with \\*\\*kwargs.", "", "", "    .. code-block:: python", "", "        >>> 1", ""),
        "    **bold** and a `**b`.",
    ]
