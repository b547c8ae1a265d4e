"""The examples in the docstrings of the model's public classes are true."""

import doctest
from typing import Any

import pytest

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionImageProcessor, FusionProcessor


@pytest.mark.parametrize(
    "named", [FusionConfig, FusionForConditionalGeneration, FusionImageProcessor, FusionProcessor]
)
def test_examples(named: Any) -> None:
    names: dict[str, Any] = {}
    examples = doctest.DocTestParser().get_examples(named.__doc__)
    assert any(example.want for example in examples)
    for example in examples:
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(example.source, names)
