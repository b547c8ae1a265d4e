"""Fixtures and parameters of the tests of the documentation."""

from pathlib import Path

import pytest
from tests.docs.markdown import ROOT, fenced_blocks

DOCUMENTS = (
    "README.md",
    "docs/attention_implementations.md",
    "docs/attention_maps.md",
    "docs/authors_checkpoints.md",
    "docs/batches.md",
    "docs/compilation.md",
    "docs/conversations.md",
    "docs/cpu.md",
    "docs/demo.md",
    "docs/evaluation.md",
    "docs/evaluation_compare.md",
    "docs/generation.md",
    "docs/image_reuse.md",
    "docs/images.md",
    "docs/inference.md",
    "docs/models.md",
    "docs/publishing.md",
    "docs/quickstart.md",
    "docs/token_budget.md",
    "docs/verification.md",
)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Make a folder with the files that snippets read, in which they may write."""
    for name in ("docs", "configs", "conversion"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    return tmp_path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `python_block` and `bash_line` over the snippets of all documents for users."""
    if "python_block" in metafunc.fixturenames:
        blocks = [block for document in DOCUMENTS for block in fenced_blocks(document, "python")]
        metafunc.parametrize("python_block", blocks, ids=[f"block{i}" for i in range(len(blocks))])
    if "bash_line" in metafunc.fixturenames:
        blocks = [block for document in DOCUMENTS for block in fenced_blocks(document, "bash")]
        lines = [line for block in blocks for line in block.splitlines()]
        metafunc.parametrize("bash_line", lines)
