"""The progress of a run: each task writes its counts to a small file, and any process can add them up."""

import json
import time
from collections import Counter
from pathlib import Path

from fusion_hf.common.outputs import json_bytes, write_atomically
from fusion_hf.synthesis.synth_record import SynthRecord

SECONDS = 1.0  # minimum time between two writes of a task
KEPT, REJECTED = "kept", "rejected"


class Progress:
    """
    Count the records of one stage.

    Args:
        folder: the folder of all stages.
        stage: the name of the stage.
        resumes: whether the stage continues after a kill instead of processing its records again.
    """

    def __init__(self, folder: Path, stage: str, resumes: bool = False):
        self.folder = folder / stage
        self.resumes = resumes
        self.task = -1
        self.counts: Counter[tuple[str, str]] = Counter()
        self.written = 0.0

    def count(self, task: int, record: SynthRecord) -> None:
        """
        Count a record that has passed the stage.

        Args:
            task: the number of the task.
            record: the record.
        """
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
    """
    Add up the counts of all tasks.

    Args:
        folder: the folder of all stages.

    Returns:
        For each stage, in the order of their start, the number of records by category and by kept or rejected.
    """
    found: dict[str, Counter[tuple[str, str]]] = {}
    for stage in sorted(path for path in folder.glob("*") if path.is_dir()):
        found[stage.name] = Counter()
        for path in sorted(stage.glob("*.json")):
            found[stage.name].update(_read(path))
    return found
