"""What the tests of the documents share."""

from pathlib import Path

import pytest
from tests.docs.markdown import ROOT, fenced_blocks

DOCUMENTS = (
    "README.md",
    "docs/attention_maps.md",
    "docs/demo.md",
    "docs/evaluation.md",
    "docs/evaluation_compare.md",
    "docs/inference.md",
    "docs/quickstart.md",
)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder that has what the snippets read, and may be filled."""
    for name in ("docs", "configs", "conversion"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    return tmp_path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`python_block` and `bash_line` run over the documents for users."""
    if "python_block" in metafunc.fixturenames:
        blocks = [block for document in DOCUMENTS for block in fenced_blocks(document, "python")]
        metafunc.parametrize("python_block", blocks, ids=[f"block{i}" for i in range(len(blocks))])
    if "bash_line" in metafunc.fixturenames:
        blocks = [block for document in DOCUMENTS for block in fenced_blocks(document, "bash")]
        lines = [line for block in blocks for line in block.splitlines()]
        metafunc.parametrize("bash_line", lines)
