"""Lets pytest run transformers' own suites, and keeps `make test` from downloading them."""

from pathlib import Path

import pytest

# Marks that the suites carry; they mean nothing here.
FOREIGN_MARKS = """
    accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test is_pipeline_test is_training_test
    order torch_compile_test
"""


def pytest_configure(config: pytest.Config) -> None:
    for name in FOREIGN_MARKS.split():
        config.addinivalue_line("markers", f"{name}: used by transformers' own suites")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing a suite fetches it, so it is not even imported where slow tests are left out."""
    if collection_path.name.endswith("_suite.py") and config.getoption("markexpr") == "not slow":
        return True
    return None
