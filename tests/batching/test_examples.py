"""The examples in docstrings do what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("inference.batching", "inference.chat_model", "inference.conversation", "maps.attention")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(import_module(f"fusion_hf.{name}"))
    assert result.failed == 0 < result.attempted
