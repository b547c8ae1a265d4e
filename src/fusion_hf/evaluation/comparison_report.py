"""Write a comparison of two runs as text for a terminal and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fusion_hf.evaluation.paired_statistics import CONFIDENCE, POWER, PairedTest
from fusion_hf.evaluation.run_answers import AUTHORS, RunAnswers
from fusion_hf.evaluation.run_comparison import (
    SIDES,
    MetricComparison,
    Pair,
    TaskComparison,
    missing_tasks,
)

if TYPE_CHECKING:
    from fusion_hf.evaluation.run_stages import QuestionStages, StageReport

SHARE = f"{CONFIDENCE:.0%}"


def describe_comparison(first: RunAnswers, second: RunAnswers, tasks: Sequence[TaskComparison]) -> dict[str, Any]:
    """
    Describe a comparison as JSON.

    Args:
        first: the first run.
        second: the second run.
        tasks: the comparison of `compare_runs`.
    """
    return {
        "runs": [_describe_run(run) for run in (first, second)],
        "confidence": CONFIDENCE,
        "power": POWER,
        "not_compared": missing_tasks(first, second),
        "tasks": [_describe_task(task) for task in tasks],
    }


def _describe_run(run: RunAnswers) -> dict[str, Any]:
    model = None if run.record is None else asdict(run.record.model)
    return {"path": str(run.path), "kind": run.kind, "model": model}


def _describe_task(task: TaskComparison) -> dict[str, Any]:
    return {
        "task": task.task,
        "questions": len(task.pairs),
        "alone": list(task.alone),
        "notes": list(task.notes),
        "metrics": [
            {"metric": metric.metric, "figures": list(metric.figures), **asdict(metric.test)}
            for metric in task.metrics
        ],
        "changed": len(task.changed),
        "directions": task.directions,
        "changes": [_describe_change(pair, task.direction(pair)) for pair in task.changed],
    }


def _describe_change(pair: Pair, direction: str) -> dict[str, Any]:
    return {
        "doc_id": pair.first.doc_id,
        "question": pair.question,
        "target": pair.first.target if pair.first.target is not None else pair.second.target,
        "answers": [pair.first.answer, pair.second.answer],
        "scores": [pair.first.scores, pair.second.scores],
        "direction": direction,
    }


def write_text(first: RunAnswers, second: RunAnswers, tasks: Sequence[TaskComparison]) -> str:
    """
    Write a comparison as text for a terminal.

    Args:
        first: the first run.
        second: the second run.
        tasks: the comparison of `compare_runs`.
    """
    lines = [f"{side}: {_name(run)}" for side, run in zip(SIDES, (first, second), strict=True)]
    lines += missing_tasks(first, second)
    for task in tasks:
        lines += ["", *_task_lines(task)]
    return "\n".join(lines) + "\n"


def _name(run: RunAnswers) -> str:
    if run.record is None:
        return str(run.path) if run.kind == AUTHORS else f"{run.path} ({run.kind})"
    model = run.record.model
    return f"{run.path}: {model.name} ({model.revision}), {model.dtype} on {model.device}"


def _task_lines(task: TaskComparison) -> Iterator[str]:
    clusters = task.metrics[0].test.clusters if task.metrics else len({pair.cluster for pair in task.pairs})
    grouped = "" if clusters == len(task.pairs) else f", in {clusters} groups with a common image"
    name = f"{task.task}: " if task.task else ""  # files of answers belong to no task
    yield f"{name}{len(task.pairs)} questions{grouped}"
    for metric in task.metrics:
        yield from _metric_lines(metric)
    counts = ", ".join(f"{count} {direction}" for direction, count in task.directions.items())
    yield f"  answers: {len(task.changed)} changed{f' ({counts})' if counts else ''}"
    yield from (f"  note: {note}" for note in task.notes)


def _metric_lines(metric: MetricComparison) -> Iterator[str]:
    test = metric.test
    yield f"  {metric.metric}: {test.first:.4f} and {test.second:.4f}, difference {test.difference:+.4f}"
    if any(
        figure is not None and abs(figure - mean) > 5e-5
        for figure, mean in zip(metric.figures, (test.first, test.second), strict=True)
    ):
        shown = ["unknown" if figure is None else f"{figure:.4f}" for figure in metric.figures]
        yield f"    the runs report {shown[0]} and {shown[1]}; the test uses the scores of single questions"
    if test.interval is not None and test.bootstrap is not None:
        yield (
            f"    {SHARE} interval {test.interval.low:+.4f} to {test.interval.high:+.4f} "
            f"(bootstrap {test.bootstrap.low:+.4f} to {test.bootstrap.high:+.4f})"
        )
    by_clusters = "unknown: all questions are about one image" if test.p_value is None else f"{test.p_value:.3g}"
    yield f"    p-value by groups {by_clusters}; {test.method} {test.method_p_value:.3g}"
    yield f"    {test.won} questions score higher, {test.lost} lower"
    yield from _power_lines(test)


def _power_lines(test: PairedTest) -> Iterator[str]:
    if test.detectable is not None:
        yield f"    these questions detect a difference of {test.detectable:.4f} with a power of {POWER:.0%}"
    else:
        yield "    the scores do not vary, so the difference that these questions can detect is unknown"
    if test.least_changed > test.questions:
        yield f"    too few questions to detect a difference: at least {test.least_changed} scores must change"
        return
    share = test.least_changed / test.questions
    yield f"    fewer than {test.least_changed} changed scores ({share:.4f} of all) can never be significant"


def describe_stages(report: "StageReport") -> dict[str, Any]:
    """
    Describe as JSON where two runs start to differ.

    Args:
        report: the report of `compare_run_stages`.
    """
    first = report.first
    return {
        "task": report.task,
        "first": None if first is None else first.stage,
        "differing": report.differing,
        "is_reproduced": report.is_reproduced,
        "settings": [
            {"name": each.name, "values": [each.first, each.second], "stages": list(each.stages)}
            for each in report.settings
        ],
        "questions": [
            {
                "doc_id": each.doc_id,
                "recorded": list(each.recorded),
                "rebuilt": list(each.rebuilt),
                "stages": [asdict(stage) for stage in each.stages],
                "exchanged": dict(each.exchanged),
            }
            for each in report.questions
        ],
        "scoring": asdict(report.scoring),
        "notes": list(report.notes),
    }


def write_stages(report: "StageReport") -> str:
    """
    Describe where two runs start to differ as text for a terminal.

    Args:
        report: the report of `compare_run_stages`.
    """
    first = report.first
    if first is None:
        rest = "" if report.is_reproduced else ", but the recorded answers were not reproduced, see the notes"
        lines = [f"{report.task}: no stage differs in {len(report.questions)} questions{rest}"]
    else:
        lines = [f"{report.task}: the first stage that differs is {first.stage}: {first.detail}"]
    for stage in report.differing:
        acting = [str(each) for each in report.settings if stage in each.stages]
        lines.append(f"  {stage} differs by itself; recorded settings that affect it: {'; '.join(acting) or 'none'}")
    for question in report.questions:
        lines += _question_lines(question)
    return "\n".join([*lines, *(f"  note: {note}" for note in report.notes)]) + "\n"


def _question_lines(question: "QuestionStages") -> Iterator[str]:
    answers = " and ".join(map(repr, question.recorded))
    yield f"  question {question.doc_id}: {answers}"
    for stage in question.stages:
        told = stage.detail if stage.differs else "equal"
        if stage.stage in question.exchanged:
            told += f"; with only this stage exchanged, the answer is {question.exchanged[stage.stage]!r}"
        yield f"    {stage.stage}: {told}"
