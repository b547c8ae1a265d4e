"""What importing costs: nothing beside transformers itself, and `--help` hardly anything."""

import os
import subprocess
import sys
from statistics import median

REPEATS = 5
EXTRA_SECONDS = 0.2  # that `import fusion_hf` may take longer than `import transformers`
HELP_SECONDS = 0.5


def seconds(*arguments: str) -> float:
    """Of a processor, not of a clock: what else the machine does must not decide."""
    begin = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


def test_import_takes_hardly_longer_than_transformers():
    imports = ("import transformers", "import transformers, fusion_hf")
    times = [[seconds("-c", code) for code in imports] for _ in range(REPEATS)]  # alternately
    theirs, ours = (median(column) for column in zip(*times, strict=True))
    assert ours <= theirs + EXTRA_SECONDS, times


def test_import_does_not_import_torch():
    code = "import sys, fusion_hf; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_fast():
    assert min(seconds("-m", "fusion_hf", "--help") for _ in range(REPEATS)) < HELP_SECONDS
