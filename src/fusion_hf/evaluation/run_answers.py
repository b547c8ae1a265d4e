"""Read the answers of a run of `fusion-hf evaluate`, of lmms-eval alone, or of the authors' code."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS
from fusion_hf.evaluation.run_record import FAILED, RunRecord, TaskRecord, read_metrics
from fusion_hf.evaluation.sample_log import (
    AnsweredQuestion,
    AskedQuestion,
    read_answer,
    read_lines,
    read_samples,
    read_scores,
    samples_file,
)

OURS: Final = "fusion-hf"
LMMS_EVAL: Final = "lmms-eval"
AUTHORS: Final = "authors"
RECORDS, LMMS_SAMPLES = "record-*.json", "*_samples_*.jsonl"
MARK = "_samples_"  # stands between the time and the task in lmms-eval's file names
ANSWERS = "answers"  # the folder of stored answers next to a record
ALLOWED = (
    "a record of `fusion-hf evaluate`, its folder, samples of lmms-eval's --log_samples, an answers.jsonl of the "
    "authors or of `fusion-hf ask`"
)


@dataclass(frozen=True)
class TaskAnswers:
    """
    The answers to a task.

    Attributes:
        task: the name of the benchmark in this package, or the name in the run if it is no known benchmark.
        samples: one sample per question.
        metrics: the results of the run by metric.
        reason: why there are no samples, or None.
    """

    task: str
    samples: Sequence[AnsweredQuestion] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True)
class RunAnswers:
    """
    A run to compare.

    Attributes:
        path: the path of its record, or of the file or folder of its answers.
        kind: what made the run.
        tasks: the tasks by name. The authors' answers belong to no task and have the name "".
        record: the record of a run of `fusion-hf evaluate`.
        versions: the package versions of a run of `fusion-hf evaluate`.
    """

    path: Path
    kind: Literal["fusion-hf", "lmms-eval", "authors"]
    tasks: dict[str, TaskAnswers]
    record: RunRecord | None = None
    versions: dict[str, str] = field(default_factory=dict)


def read_run(path: Path) -> RunAnswers:
    """
    Read the answers of a run.

    Args:
        path: a record of `fusion-hf evaluate` or a folder with records, of which the newest is used; a file of
            lmms-eval's `--log_samples` or a folder with such files; or an `answers.jsonl` of the authors or of
            `fusion-hf ask`.

    Raises:
        InputError: if the path is none of these, is damaged, or has a question twice.
    """
    if path.is_dir():
        records = sorted(path.glob(RECORDS))
        return _read_record(records[-1]) if records else _read_lmms_eval(sorted(path.rglob(LMMS_SAMPLES)), path)
    if path.suffix == ".json":
        return _read_record(path)
    if path.match(LMMS_SAMPLES):
        return _read_lmms_eval([path], path)
    if path.suffix == ".jsonl":
        return _read_authors(path)
    raise InputError(f"A run must be {ALLOWED}, got {path}.")


def _read_record(path: Path) -> RunAnswers:
    record = RunRecord.read(path)
    versions = json.loads(path.read_text(encoding="utf-8"))["versions"]
    tasks = [_read_task(path, record, task) for task in record.tasks]
    return RunAnswers(path, OURS, {task.task: task for task in tasks}, record, versions)


def _read_task(path: Path, record: RunRecord, task: TaskRecord) -> TaskAnswers:
    if task.status == FAILED:
        return TaskAnswers(task.task, reason=f"it failed: {task.reason}")
    metrics = {metric.metric.partition(",")[0]: metric.value for metric in task.metrics}
    file = None if record.samples is None else samples_file(_inside(path, record.samples), task.task)
    if file is not None and (file.is_file() or metrics):
        samples = read_samples(file)
    else:  # a record of an earlier release, or answers for a server
        samples = _kept_answers(path.parent / ANSWERS, task)
    check_ids([sample.doc_id for sample in samples], file or path)
    return TaskAnswers(task.task, samples, metrics)


def _inside(path: Path, name: str) -> Path:
    """Return the path of a folder that a record names, which must lie in the folder of the record."""
    folder = path.parent.resolve()
    if not (folder / name).resolve().is_relative_to(folder):
        raise InputError(f"{path}: `samples` must be a folder in {folder}, got {name!r}.")
    return folder / name


def _kept_answers(folder: Path, task: TaskRecord) -> list[AnsweredQuestion]:
    """
    Return the stored answers of a run without scores. Raise an InputError if they belong to several models or
    prompts.
    """
    found: dict[int, str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for entry in read_lines(path):
            number, answer = entry.get("doc_id"), entry.get("answer")
            if entry.get("task") != task.lmms_task or not isinstance(number, int) or not isinstance(answer, str):
                continue
            if found.setdefault(number, answer) != answer:
                raise InputError(
                    f"{folder} has several answers to question {number} of {task.task}, and the record does not say "
                    "which one belongs to it. Run the evaluation again with the same command, which reuses answers."
                )
    kept = {number: answer for number, answer in found.items() if number < task.n}
    if len(kept) < task.n:
        raise InputError(
            f"{folder} has only {len(kept)} of {task.n} answers to {task.task}. Run the evaluation again."
        )
    return [AnsweredQuestion(number, answer) for number, answer in sorted(kept.items())]


def _read_lmms_eval(paths: Sequence[Path], given: Path) -> RunAnswers:
    if not paths:
        raise InputError(f"A run must be {ALLOWED}, but {given} holds neither record-*.json nor *_samples_TASK.jsonl.")
    tasks: dict[str, TaskAnswers] = {}
    for path in paths:
        time, _, name = path.stem.partition(MARK)
        task = find_task(name)
        if task in tasks:
            raise InputError(f"{given} has several files of samples of {task}. Give one of them, such as {path}.")
        samples = [_lmms_sample(path, number, entry) for number, entry in enumerate(read_lines(path), start=1)]
        check_ids([sample.doc_id for sample in samples], path)
        tasks[task] = TaskAnswers(task, samples, _lmms_metrics(path.with_name(f"{time}_results.json"), name))
    return RunAnswers(given, LMMS_EVAL, tasks)


def _lmms_sample(path: Path, number: int, entry: dict[str, Any]) -> AnsweredQuestion:
    if not isinstance(entry.get("doc_id"), int) or "filtered_resps" not in entry:
        raise InputError(f"{path}: line {number} must have doc_id and filtered_resps, as samples of lmms-eval have.")
    text, target = entry.get("input"), entry.get("target")
    return AnsweredQuestion(
        doc_id=entry["doc_id"],
        answer=read_answer(entry),
        target=None if target is None else str(target),
        scores=read_scores(entry),
        asked=asked_text(text) if isinstance(text, str) else None,
    )


def asked_text(text: str) -> AskedQuestion:
    """
    Make a question of which only the text is known.

    Args:
        text: the text.
    """
    return AskedQuestion([{"role": "user", "content": [{"type": "text", "text": text}]}], text)


def _lmms_metrics(path: Path, name: str) -> dict[str, float]:
    """Read the results of a task from lmms-eval's file of results, if it exists."""
    if not path.is_file():
        return {}
    try:
        metrics = read_metrics(json.loads(path.read_text(encoding="utf-8"))["results"][name])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} must have results of {name} ({error!r}).") from error
    return {metric.metric.partition(",")[0]: metric.value for metric in metrics}


def _read_authors(path: Path) -> RunAnswers:
    samples = []
    for number, entry in enumerate(read_lines(path), start=1):
        identity, text, prompt = read_id(entry), entry.get("text", entry.get("answer")), entry.get("prompt")
        if not isinstance(identity, str | int) or not isinstance(text, str):
            raise InputError(
                f"{path}: line {number} must have question_id and text, as the authors' answers have, or id and "
                "answer, as those of `fusion-hf ask` have."
            )
        asked = asked_text(prompt) if isinstance(prompt, str) else None
        samples.append(AnsweredQuestion(number - 1, text, question_id=identity, asked=asked))
    check_ids([sample.question_id for sample in samples], path)
    return RunAnswers(path, AUTHORS, {"": TaskAnswers("", samples)})


def read_id(entry: dict[str, Any]) -> Any:
    """
    Return the id of the question in a line of answers or questions.

    Args:
        entry: the line.
    """
    return entry.get("question_id", entry.get("id"))


def check_ids(ids: Iterable[Any], path: Path) -> None:
    """
    Check that there are answers, and at most one per question.

    Args:
        ids: the ids of the questions.
        path: the file, for errors.

    Raises:
        InputError: if there is no answer, or several to one question. The message names the question.
    """
    known = set()
    for identity in ids:
        if identity in known:
            raise InputError(f"{path} must have each question once, got question {identity!r} twice.")
        known.add(identity)
    if not known:
        raise InputError(f"{path} must contain at least one answer.")


def find_task(name: str) -> str:
    """
    Return the benchmark for a name of lmms-eval or of a run of this package, or the name itself if there is none.

    Args:
        name: the name.
    """
    for benchmark in (*BENCHMARKS.values(), *VARIANTS.values()):
        own = {benchmark.name, benchmark.lmms_task, benchmark.authors_task}
        if name in own | {f"lmms_{benchmark.name}", f"fusion_{benchmark.name}"}:
            return benchmark.name
    return name
