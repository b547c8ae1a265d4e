"""Answers on disk: what was answered once is not asked again, whenever the run was killed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fusion_hf.common.errors import InputError
from fusion_hf.common.result_log import ResultLog, read_log

Answer: TypeAlias = dict[str, Any]  # {"answer": text} or {"logprob": sum, "greedy": whether it is the likeliest}

KINDS = ({"answer"}, {"logprob", "greedy"})
ADVICE = "remove that line, or the file"  # about damage


class CachedAnswer(NamedTuple):
    """An answer by the key of its prompt; the rest is for readers."""

    key: str
    answer: Answer
    task: str
    doc_id: int


class AnswerCache:
    """
    Keep answers in a folder by the keys of their prompts. Every process writes to a file of its own, and reads all.

    Args:
        folder: is made if it is not there.
        rank: of this process.

    Raises:
        InputError: if another run works in the folder, or a file is damaged.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.answers: dict[str, Answer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{rank:05d}"
        self.log = ResultLog(folder / f"{name}.jsonl", folder / f"{name}.lock", ADVICE, ascii_only=True)
        if not self.log.acquire():
            raise InputError(f"{folder} is in use by another run; wait for it, or give another --output.")
        self.log.open()
        self.reload()

    def reload(self) -> None:
        """Read what all processes have written so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, entry in enumerate(read_log(path, ADVICE), start=1):
                names = next((names for names in KINDS if {"key", *names} <= entry.keys()), None)
                if names is None:
                    raise InputError(f"{path} has no answer in line {number}; {ADVICE}.")
                self.answers[entry["key"]] = {name: entry[name] for name in names}

    def get(self, key: str) -> Answer | None:
        """Look up the answer to a prompt; None if there is none."""
        return self.answers.get(key)

    def put(self, answers: Sequence[CachedAnswer]) -> None:
        """Add the answers of a batch, which are on the disk when this returns."""
        self.answers.update((cached.key, cached.answer) for cached in answers)
        self.log.append(
            [{"key": cached.key, "task": cached.task, "doc_id": cached.doc_id, **cached.answer} for cached in answers]
        )

    def close(self) -> None:
        """Let other processes write."""
        self.log.close()
        self.log.release()
