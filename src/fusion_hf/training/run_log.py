"""`log.jsonl` of a run: what each log of the trainer says, a line each."""

import json
from pathlib import Path
from typing import Any

from fusion_hf.common.outputs import write_atomically
from fusion_hf.training.checkpoints import writing

LOG_FILE = "log.jsonl"


def append_log(run_dir: Path, values: dict[str, Any]) -> None:
    """
    Add a line to the log of a run.

    Args:
        run_dir: the run's folder.
        values: of the line.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with writing(run_dir, LOG_FILE), (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, default=float) + "\n")


def forget_after(log: Path, step: int) -> None:
    """Take out what a run logged after the checkpoint from which it now goes on: it is going to be logged again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last one, cut by a kill
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line)
    write_atomically(log, "".join(f"{line}\n" for line in kept).encode())
