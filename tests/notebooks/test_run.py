"""The notebooks run from a fresh kernel, without a network, and say what is stored."""

import json
from pathlib import Path

import pytest
from tests.notebooks.conftest import ROOT, texts

BESIDE = ("configs", "docs", "src", "tests")
VARIES = "varies"  # tag of cells with times, or with figures that depend on the machine or on versions


@pytest.fixture
def copy_of(tmp_path: Path):
    """A copy of a notebook beside what notebooks read, so that nothing is written into the repository."""

    def copy(notebook: Path) -> Path:
        for name in BESIDE:
            (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
        target = tmp_path / "notebooks" / notebook.name
        target.parent.mkdir()
        target.write_bytes(notebook.read_bytes())
        return target

    return copy


def write_notebook(path: Path, *sources: str) -> None:
    cells = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": text,
        }
        for i, text in enumerate(sources)
    ]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.mark.slow
def test_says_what_is_stored(notebook: Path, copy_of):
    from notebooks.run import execute

    stored = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for old, new in zip(stored, execute(copy_of(notebook)).cells, strict=True):
        kinds = [output["output_type"] for output in old.get("outputs", [])]
        assert [output.output_type for output in new.get("outputs", [])] == kinds, old["source"]
        if VARIES not in old["metadata"].get("tags", []):
            assert texts(new) == texts(old), old["source"]


@pytest.mark.slow
def test_the_same_bytes_twice(tmp_path: Path):
    from notebooks.run import main

    path = tmp_path / "small.ipynb"
    write_notebook(path, "import os\nprint(os.environ['HF_HUB_OFFLINE'])\nprint(2)", "from tqdm.auto import tqdm")
    main([str(path)])
    first = path.read_bytes()
    main([str(path)])
    assert path.read_bytes() == first
    cells = json.loads(first)["cells"]
    assert [texts(cell) for cell in cells] == [["1\n2\n"], []]


@pytest.mark.slow
def test_an_error_changes_nothing(tmp_path: Path):
    from nbclient.exceptions import CellExecutionError
    from notebooks.run import main

    path = tmp_path / "broken.ipynb"
    write_notebook(path, "print(1)", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        main([str(path)])
    assert path.read_bytes() == before
