"""The log of each question of a task, one line of JSON per question: how it was asked, answered and scored."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.common.result_log import encode_line

ADVICE = "Run the evaluation again, which reuses stored answers"  # for damaged files
QUESTION_IDS = (
    "question_id",
    "questionId",
    "qid",
    "index",
    "Index",
    "id",
)  # fields of benchmarks' rows, of which the first existing one is used
MAX_BYTES = 2**31
# keys of lmms-eval's samples that are not metrics
NO_METRICS = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input")
IMAGE, SCORE = "image", "score"


@dataclass(frozen=True)
class AskedQuestion:
    """
    A question as it was given to a model.

    Attributes:
        messages: the conversation, with image blocks that hold no image.
        prompt: the text that the model reads, or a substitute if it is unknown.
        image_sha256: the hash of the pixels of the image, or None without an image.
        generation: the generation settings; see `prompting.Generation`. None if the probability of a given answer was
            requested.
    """

    messages: list[dict[str, Any]]
    prompt: str
    image_sha256: str | None = None
    generation: dict[str, Any] | None = None


@dataclass(frozen=True)
class AnsweredQuestion:
    """
    A question with its answer and scores.

    Attributes:
        doc_id: the number of the question in the data.
        answer: the answer as it was scored.
        question_id: the id of the question in the benchmark, if it has one.
        target: the right answer.
        scores: the scores by metric, for metrics with a number per question.
        image: the file of the image, if there is one.
        asked: how the question was asked. None if several prompts make one answer.
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
    Make samples from what lmms-eval logs for a task. If a question is scored by several filters, the first one is
    used.

    Args:
        logged: the samples of lmms-eval.
        asked: how each question was asked, by number.
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
    """
    Return the answer in a sample of lmms-eval. Several answers become one text.

    Args:
        entry: the sample.
    """
    found = entry.get("filtered_resps")
    while isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) else str(found)


def read_scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """
    Return the metrics of a lmms-eval sample that are numbers or hold the number that they count.

    Args:
        entry: the sample.
    """
    scores = {}
    for name, value in entry.items():
        number = value.get(SCORE) if isinstance(value, dict) else value
        if name not in NO_METRICS and isinstance(number, bool | int | float) and math.isfinite(number):
            scores[name] = float(number)
    return scores


def find_image(source: Any) -> str | None:
    """
    Return the file of an image if a row of data names an existing one.

    Args:
        source: the value in the row.
    """
    if not isinstance(source, str):
        return None
    try:
        return str(Path(source).resolve()) if Path(source).is_file() else None
    except OSError:  # not the name of a file, such as an image in base64
        return None


def samples_file(folder: Path, task: str) -> Path:
    """
    Return the path of a task's samples.

    Args:
        folder: the folder of samples.
        task: the name of the task.
    """
    return folder / f"{task}.jsonl"


def write_samples(path: Path, samples: Iterable[AnsweredQuestion]) -> None:
    """
    Write the samples of a task atomically.

    Args:
        path: the file.
        samples: the samples.
    """
    write_atomically(path, b"".join(encode_line(asdict(sample)) for sample in samples))


def read_samples(path: Path) -> list[AnsweredQuestion]:
    """
    Read what `write_samples` wrote.

    Args:
        path: the file.

    Raises:
        InputError: if the file is missing, incomplete, or holds anything else.
    """
    samples = []
    for number, entry in enumerate(read_lines(path), start=1):
        try:
            asked = entry.pop("asked")
            sample = AnsweredQuestion(asked=None if asked is None else AskedQuestion(**asked), **entry)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} must contain a sample ({error}). {ADVICE}.") from error
        if not _is_sound(sample):
            raise InputError(f"{path}: line {number} must contain a sample. {ADVICE}.")
        samples.append(sample)
    return samples


def _is_sound(sample: AnsweredQuestion) -> bool:
    """Return whether the values to compare and show have the right types."""
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
    """Return whether these are conversations as in `AskedQuestion`."""
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
    Read a file with one JSON object per line. Empty lines are skipped.

    Args:
        path: the file.

    Raises:
        InputError: if the file is missing or very large, or a line is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} must have at most {MAX_BYTES} bytes, got {path.stat().st_size}.")
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is incomplete or damaged: line {number} is not valid JSON.") from error
        if not isinstance(entry, dict):
            raise InputError(f"{path} is damaged: line {number} is not a JSON object.")
        entries.append(entry)
    return entries
