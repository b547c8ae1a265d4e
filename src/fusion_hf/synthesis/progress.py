"""How far a run is: each task notes its counts in a small file, and whoever sees the folder can add them up."""

import json
import time
from collections import Counter
from pathlib import Path

from fusion_hf.common.outputs import json_bytes, write_atomically
from fusion_hf.synthesis.synth_record import SynthRecord

SECONDS = 1.0  # between two writes of a task
KEPT, REJECTED = "kept", "rejected"


class Progress:
    """
    Counts of one stage.

    Args:
        folder: of all stages.
        resumes: the stage goes on after a kill instead of going through its records again.
    """

    def __init__(self, folder: Path, stage: str, resumes: bool = False):
        self.folder = folder / stage
        self.resumes = resumes
        self.task = -1
        self.counts: Counter[tuple[str, str]] = Counter()
        self.written = 0.0

    def count(self, task: int, record: SynthRecord) -> None:
        """Note that a record has gone through the stage."""
        if task != self.task:
            self.flush()
            self.task, self.counts = task, Counter(_read(self._path(task)) if self.resumes else {})
        self.counts[record.category, KEPT if record.rejection is None else REJECTED] += 1
        if time.monotonic() - self.written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the counts."""
        if self.task < 0:
            return
        content = [[category, kind, number] for (category, kind), number in sorted(self.counts.items())]
        write_atomically(self._path(self.task), json_bytes(content))
        self.written = time.monotonic()

    def _path(self, task: int) -> Path:
        return self.folder / f"{task:05d}.json"


def _read(path: Path) -> dict[tuple[str, str], int]:
    if not path.exists():
        return {}
    return {(category, kind): number for category, kind, number in json.loads(path.read_bytes())}


def read_progress(folder: Path) -> dict[str, Counter[tuple[str, str]]]:
    """Add up stage -> (category, kept or rejected) -> records so far, in the order in which stages began."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for stage in sorted(path for path in folder.glob("*") if path.is_dir()):
        found[stage.name] = Counter()
        for path in sorted(stage.glob("*.json")):
            found[stage.name].update(_read(path))
    return found
