"""docs/training.md lists the keys that a recipe has."""

from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from fusion_hf.training import FusionTrainingArguments


def test_the_table_of_keys_is_complete_and_says_what_the_keys_say(root: Path):
    theirs = {field.name for field in fields(TrainingArguments)}
    expected = [
        f"| `{field.name}` | {field.metadata['help']} |"
        for field in fields(FusionTrainingArguments)
        if field.name not in theirs
    ]
    lines = (root / "docs" / "training.md").read_text().splitlines()
    begin = lines.index("| key | meaning |") + 2
    assert lines[begin : begin + len(expected)] == expected
    assert not lines[begin + len(expected)].startswith("|")
