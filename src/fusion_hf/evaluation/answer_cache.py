"""Keep answers on disk, so that a run that was killed does not ask the same questions again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fusion_hf.common.errors import InputError
from fusion_hf.common.result_log import ResultLog, read_log

Answer: TypeAlias = dict[str, Any]  # {"answer": text} or {"logprob": sum, "greedy": whether it is the most likely one}

KINDS = ({"answer"}, {"logprob", "greedy"})
ADVICE = "Remove that line or the file"  # for damaged files


class CachedAnswer(NamedTuple):
    """An answer with the key of its prompt. Task and question are stored for readers of the file."""

    key: str
    answer: Answer
    task: str
    doc_id: int


class AnswerCache:
    """
    Store answers in a folder under the keys of their prompts. Each process writes a file of its own and reads all
    of them.

    Args:
        folder: the folder, which is created if it does not exist.
        rank: the rank of this process.

    Raises:
        InputError: if another run uses the folder, or a file is damaged.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.answers: dict[str, Answer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{rank:05d}"
        self.log = ResultLog(folder / f"{name}.jsonl", folder / f"{name}.lock", ADVICE, ascii_only=True)
        if not self.log.acquire():
            raise InputError(f"{folder} is in use by another run. Wait for it, or give another --output.")
        self.log.open()
        self.reload()

    def reload(self) -> None:
        """Read the answers that all processes have written so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, entry in enumerate(read_log(path, ADVICE), start=1):
                names = next((names for names in KINDS if {"key", *names} <= entry.keys()), None)
                if names is None:
                    raise InputError(f"{path}: line {number} must contain an answer. {ADVICE}.")
                self.answers[entry["key"]] = {name: entry[name] for name in names}

    def get(self, key: str) -> Answer | None:
        """
        Return the answer to a prompt, or None if it has not been answered.

        Args:
            key: the key of the prompt.
        """
        return self.answers.get(key)

    def put(self, answers: Sequence[CachedAnswer]) -> None:
        """
        Store the answers of a batch. They are on disk when this method returns.

        Args:
            answers: the answers.
        """
        self.answers.update((cached.key, cached.answer) for cached in answers)
        self.log.append(
            [{"key": cached.key, "task": cached.task, "doc_id": cached.doc_id, **cached.answer} for cached in answers]
        )

    def close(self) -> None:
        """Release the file, so that other processes can write it."""
        self.log.close()
        self.log.release()
