"""What is stored of the notebooks: outputs of a whole run, small, without errors and without this machine's paths."""

import json
import re
from pathlib import Path

import pytest
from tests.notebooks.conftest import FOLDER, ROOT, read_cells, texts

MAX_BYTES = 150_000
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NAMES = {"quick_start", "convert_and_publish", "fine_tune_lora", "attention_maps", "token_budget"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~<])/\w[\w.-]*/|\b[A-Za-z]:\\")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_all_are_there():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == NAMES


def test_small(notebook: Path):
    assert notebook.stat().st_size < MAX_BYTES


def test_outputs_of_one_run(notebook: Path):
    """Every cell of code was run, in this order, and without an error or a warning."""
    code = [cell for cell in read_cells(notebook) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []


def test_nothing_of_a_machine(notebook: Path):
    """Neither versions nor times in the metadata, no absolute path in an output or in the code."""
    assert json.loads(notebook.read_text(encoding="utf-8"))["metadata"] == METADATA
    for cell in read_cells(notebook):
        assert set(cell["metadata"]) <= {"tags"}
        for text in [*texts(cell), "".join(cell["source"])]:
            assert ABSOLUTE_PATH.findall(text) == [], text


@pytest.mark.parametrize(
    ("text", "is_absolute"),
    [
        ("wrote /home/me/x", True),
        ("'/usr/lib/x.py'", True),
        (r"C:\Users\me", True),
        ("runs/warm/x", False),
        ("../docs/x", False),
        ("https://stand-in/me/x", False),
        ("image/text", False),
    ],
)
def test_absolute_paths_are_found(text: str, is_absolute: bool):
    assert bool(ABSOLUTE_PATH.search(text)) == is_absolute


def test_links_lead_somewhere(notebook: Path):
    text = "\n".join("".join(cell["source"]) for cell in read_cells(notebook) if cell["cell_type"] == "markdown")
    targets = [target for target in LINK.findall(text) if not target.startswith("https://")]
    assert [target for target in targets if not (FOLDER / target).exists()] == []


def test_listed_in_the_readme(notebook: Path):
    assert f"](notebooks/{notebook.name})" in (ROOT / "README.md").read_text(encoding="utf-8")
