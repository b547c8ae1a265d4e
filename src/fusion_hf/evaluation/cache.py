"""Answers on disk: what was answered once is not asked again, whenever the run was killed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from filelock import FileLock, Timeout

from fusion_hf.common.errors import InputError

Answer: TypeAlias = dict[str, Any]  # {"answer": text} or {"logprob": sum, "greedy": whether it is the likeliest}

KINDS = ({"answer"}, {"logprob", "greedy"})


class Entry(NamedTuple):
    """An answer by the key of its prompt; the rest is for readers."""

    key: str
    answer: Answer
    task: str
    doc_id: int


class AnswerCache:
    """
    The answers in a folder by the keys of their prompts. Every process writes to a file of its own, and reads all.

    A line without an end was being written when a process was killed, and does not count.

    Args:
        folder: is made if it is not there.
        rank: of this process.

    Raises:
        InputError: if another run works in the folder, or a file is damaged.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.path = folder / f"{rank:05d}.jsonl"
        self.answers: dict[str, Answer] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / f"{rank:05d}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{folder} is in use by another run; wait for it, or give another --output.") from error
        self.stream = self._open()
        self.reload()

    def _open(self) -> BinaryIO:
        """Behind the last whole line."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        stream = self.path.open("r+b" if content else "wb")
        stream.truncate(whole)
        stream.seek(whole)
        return stream

    def reload(self) -> None:
        """Read what all processes have written so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            content = path.read_bytes()
            for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
                key, answer = _parse(line, path, number)
                self.answers[key] = answer

    def get(self, key: str) -> Answer | None:
        return self.answers.get(key)

    def put(self, entries: Sequence["Entry"]) -> None:
        """Add the answers of a batch, which are on the disk when this returns."""
        for entry in entries:
            self.answers[entry.key] = entry.answer
            line = {"key": entry.key, "task": entry.task, "doc_id": entry.doc_id, **entry.answer}
            self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        self.stream.close()
        self.lock.release()


def _parse(line: bytes, path: Path, number: int) -> tuple[str, Answer]:
    try:
        entry = json.loads(line)
        for names in KINDS:
            if names <= entry.keys():
                return entry["key"], {name: entry[name] for name in names}
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is damaged in line {number}; remove that line, or the file.") from error
    raise InputError(f"{path} has no answer in line {number}; remove that line, or the file.")
