"""What a run left, as tests compare it."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion_hf.synthesis.choices import LETTERS, Choice, parse_choice
from fusion_hf.synthesis.shards import read_records
from fusion_hf.synthesis.synth_record import SynthRecord


def written(data: Path) -> list[dict[str, Any]]:
    """All training records of all shards."""
    shards = sorted(path for path in data.glob("stage*/*") if path.suffix in (".tar", ".parquet"))
    return [record for shard in shards for record, _ in read_records(shard)]


def rejected(data: Path) -> list[dict[str, Any]]:
    """All records that were taken out."""
    return [json.loads(line) for path in sorted((data / "rejected").glob("*.jsonl")) for line in path.open()]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Relative path -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_complete(data: Path, count: int) -> None:
    """Each record is there once, written or rejected."""
    ids = [record["id"] for record in [*written(data), *rejected(data)]]
    assert len(ids) == count and len(set(ids)) == count
    assert not list(data.rglob("*.draft*"))


def letter_shares(records: Iterable[SynthRecord]) -> dict[int, dict[str, float]]:
    """By number of options, the share of questions in which each letter is right."""
    counts: dict[int, Counter[str]] = {}
    for record in records:
        for turn in record.turns:
            choice = parse_choice(turn)
            if isinstance(choice, Choice):
                counts.setdefault(len(choice.options), Counter())[choice.letter] += 1
    return {
        size: {letter: counted[letter] / counted.total() for letter in LETTERS[:size]}
        for size, counted in sorted(counts.items())
    }
