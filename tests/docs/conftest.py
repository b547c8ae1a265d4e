"""What the tests of the documents share."""

from pathlib import Path

import pytest
from tests.docs.markdown import ROOT, fenced_blocks


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
    """`python_block` and `bash_line` run over README.md."""
    if "python_block" in metafunc.fixturenames:
        blocks = fenced_blocks("README.md", "python")
        metafunc.parametrize("python_block", blocks, ids=[f"block{i}" for i in range(len(blocks))])
    if "bash_line" in metafunc.fixturenames:
        lines = [line for block in fenced_blocks("README.md", "bash") for line in block.splitlines()]
        metafunc.parametrize("bash_line", lines)
