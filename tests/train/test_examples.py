"""The examples in the docstrings of public names are true."""

import doctest
from pathlib import Path
from typing import Any

import pytest

from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments, load_records


@pytest.mark.parametrize("named", [FusionDataCollator, FusionTrainer, FusionTrainingArguments, load_records])
def test_examples(named: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = doctest.DocTestParser().get_examples(named.__doc__)
    assert any(example.want for example in examples)
    for example in examples:
        if example.want:  # what is printed on the way does not count
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(example.source, names)
