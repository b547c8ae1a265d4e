"""What the tests of the notebooks share."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`notebook` runs over all notebooks."""
    if "notebook" in metafunc.fixturenames:
        metafunc.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a stored notebook; texts are lists of lines."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def texts(cell: dict[str, Any]) -> list[str]:
    """What a cell's outputs say, each as one text: what was printed, or the text beside an image."""
    found = []
    for output in cell.get("outputs", []):
        text = output["text"] if output["output_type"] == "stream" else output.get("data", {}).get("text/plain", "")
        found.append("".join(text))
    return found
