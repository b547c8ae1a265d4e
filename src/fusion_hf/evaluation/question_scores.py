"""What single questions score, where a metric of lmms-eval is a number of all questions together."""

import copy
import inspect
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fusion_hf.evaluation.sample_log import read_scores

# of a metric that is no figure of one question alone, as an F1 whose only question is no hit
NO_FIGURE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def keep_results(task: Any) -> list[dict[str, Any]]:
    """Let a task of lmms-eval copy what it makes of each answer into a list, before its aggregations change it."""
    kept: list[dict[str, Any]] = []
    process = task.process_results

    def process_and_keep(*args: Any, **kwargs: Any) -> dict[str, Any]:
        results = process(*args, **kwargs)
        kept.append(copy.deepcopy(results))
        return results

    task.process_results = process_and_keep
    return kept


def score_questions(
    logged: Iterable[Mapping[str, Any]],
    kept: Iterable[dict[str, Any]],
    aggregations: Mapping[str, Callable[..., Any]],
    metrics: Iterable[str],
) -> Iterator[dict[str, Any]]:
    """
    Put the score of each question where lmms-eval logs what its aggregation needs.

    Args:
        logged: lmms-eval's samples of a task.
        kept: What the task made of each of their answers.
        aggregations: The task's, by metric. One without a number for each question is applied to the question alone.
        metrics: Whose scores are wanted.

    Yields:
        The samples, with what `keep_results` kept in place of what aggregations may have changed.
    """
    names = [name for name in metrics if name in aggregations]
    with tempfile.TemporaryDirectory() as folder:  # some write files
        arguments = Namespace(output_path=folder, process_with_media=False, reasoning_tags=None)
        for sample, results in zip(logged, kept, strict=True):
            entry = {**sample, **results}
            known = read_scores(entry)
            missing = [name for name in names if name in entry and name not in known]
            scores = {name: _aggregate(aggregations[name], entry[name], arguments) for name in missing}
            yield {**entry, **{name: score for name, score in scores.items() if score is not None}}


def _aggregate(aggregation: Callable[..., Any], value: Any, arguments: Namespace) -> float | None:
    """None if the aggregation of one question is no number."""
    takes_arguments = "args" in inspect.signature(aggregation).parameters
    value = copy.deepcopy(value)  # some change it
    try:
        return float(aggregation([value], args=arguments) if takes_arguments else aggregation([value]))
    except NO_FIGURE:
        return None
