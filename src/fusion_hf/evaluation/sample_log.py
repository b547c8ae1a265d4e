"""What a run did with each question of a task, one line of JSON each: asked, answered, scored."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.common.result_log import encode_line

ADVICE = "run the evaluation again: answers are kept"  # about damage
QUESTION_IDS = (
    "question_id",
    "questionId",
    "qid",
    "index",
    "Index",
    "id",
)  # of benchmarks' rows, the first that is there
MAX_BYTES = 2**31
# what lmms-eval's samples have beside metrics
NO_METRICS = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input")
IMAGE, SCORE = "image", "score"


@dataclass(frozen=True)
class AskedQuestion:
    """
    A question as a model was asked it.

    Attributes:
        messages: The conversation, whose image blocks show nothing.
        prompt: What the model reads, or what stands for it where that is not known.
        image_sha256: Of the image's pixels; None without an image.
        generation: How to answer; see `prompting.Generation`. None where a given answer's probability was asked.
    """

    messages: list[dict[str, Any]]
    prompt: str
    image_sha256: str | None = None
    generation: dict[str, Any] | None = None


@dataclass(frozen=True)
class AnsweredQuestion:
    """
    A question, its answer and what it scored.

    Attributes:
        doc_id: The question's number in the data.
        answer: As it was scored.
        question_id: Of the benchmark, where it has one.
        target: The right answer.
        scores: By the names of metrics, where a metric is a number of each question.
        image: The image's file, where there is one.
        asked: How it was asked; None where several prompts make one answer.
    """

    doc_id: int
    answer: str
    question_id: str | int | None = None
    target: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    image: str | None = None
    asked: AskedQuestion | None = None


def make_samples(
    logged: Iterable[Mapping[str, Any]], asked: Mapping[int, list[AskedQuestion]]
) -> list[AnsweredQuestion]:
    """
    Take samples from what lmms-eval logs of a task; of a question that it scores by several filters, the first.

    Args:
        logged: lmms-eval's samples.
        asked: How each question was asked, by its number.
    """
    samples: dict[int, AnsweredQuestion] = {}
    for entry in logged:
        number = entry["doc_id"]
        if number not in samples:
            prompts = list({each.prompt: each for each in asked.get(number, [])}.values())
            samples[number] = _make_sample(entry, prompts[0] if len(prompts) == 1 else None)
    return [samples[number] for number in sorted(samples)]


def _make_sample(entry: Mapping[str, Any], asked: AskedQuestion | None) -> AnsweredQuestion:
    row = entry.get("doc") or {}
    identity = next((row[name] for name in QUESTION_IDS if isinstance(row.get(name), str | int)), None)
    return AnsweredQuestion(
        doc_id=entry["doc_id"],
        answer=read_answer(entry),
        question_id=identity,
        target=str(entry["target"]),
        scores=read_scores(entry),
        image=find_image(row.get(IMAGE)),
        asked=asked,
    )


def read_answer(entry: Mapping[str, Any]) -> str:
    """The answer in a sample of lmms-eval; several are one text."""
    found = entry.get("filtered_resps")
    while isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) else str(found)


def read_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a sample of lmms-eval that are numbers, or that say which number they count."""
    scores = {}
    for name, value in entry.items():
        number = value.get(SCORE) if isinstance(value, dict) else value
        if name not in NO_METRICS and isinstance(number, bool | int | float) and math.isfinite(number):
            scores[name] = float(number)
    return scores


def find_image(source: Any) -> str | None:
    """The file of an image, where a row of data names one that is there."""
    if not isinstance(source, str):
        return None
    try:
        return str(Path(source).resolve()) if Path(source).is_file() else None
    except OSError:  # no name of a file, such as an image in base64
        return None


def samples_file(folder: Path, task: str) -> Path:
    """Where a task's samples are."""
    return folder / f"{task}.jsonl"


def write_samples(path: Path, samples: Iterable[AnsweredQuestion]) -> None:
    """Write a task's samples as a whole file."""
    write_atomically(path, b"".join(encode_line(asdict(sample)) for sample in samples))


def read_samples(path: Path) -> list[AnsweredQuestion]:
    """
    Read what `write_samples` wrote.

    Raises:
        InputError: If the file is missing, torn, or has anything else in it.
    """
    samples = []
    for number, entry in enumerate(read_lines(path), start=1):
        try:
            asked = entry.pop("asked")
            sample = AnsweredQuestion(asked=None if asked is None else AskedQuestion(**asked), **entry)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} has no sample in line {number} ({error}); {ADVICE}.") from error
        if not _is_sound(sample):
            raise InputError(f"{path} has no sample in line {number}; {ADVICE}.")
        samples.append(sample)
    return samples


def _is_sound(sample: AnsweredQuestion) -> bool:
    """Whether the values that are compared and shown are of their kinds."""
    asked = sample.asked
    texts = (sample.target, sample.image, asked.image_sha256 if asked else None)
    return (
        isinstance(sample.doc_id, int)
        and isinstance(sample.answer, str)
        and isinstance(sample.question_id, str | int | None)
        and all(isinstance(text, str | None) for text in texts)
        and isinstance(sample.scores, dict)
        and read_scores(sample.scores) == sample.scores
        and (asked is None or (isinstance(asked.prompt, str) and isinstance(asked.generation, dict | None)))
        and (asked is None or _are_messages(asked.messages))
    )


def _are_messages(messages: Any) -> bool:
    """Whether these are conversations as `AskedQuestion` has them."""
    return isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), list)
        and all(block == {"type": IMAGE} or _is_text(block) for block in message["content"])
        for message in messages
    )


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and block.keys() == {"type", "text"} and isinstance(block["text"], str)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    Read a file of one JSON object in each line; empty lines do not count.

    Raises:
        InputError: If the file is missing, very large, or a line is something else, as a torn one is.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing.")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; allowed: {MAX_BYTES}.")
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is torn or damaged in line {number}, which is no JSON.") from error
        if not isinstance(entry, dict):
            raise InputError(f"{path} is damaged in line {number}, which is no object of JSON.")
        entries.append(entry)
    return entries
