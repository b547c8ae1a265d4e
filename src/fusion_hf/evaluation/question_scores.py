"""Compute the scores of single questions where lmms-eval has a metric of all questions together."""

import copy
import inspect
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fusion_hf.evaluation.sample_log import read_scores

# raised by metrics that are undefined for a single question, such as the F1 of one miss
NO_FIGURE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def keep_results(task: Any) -> list[dict[str, Any]]:
    """
    Copy the results of each answer into a list, before lmms-eval's aggregations change them.

    Args:
        task: a task of lmms-eval, changed in place.

    Returns:
        The list, which grows while answers are processed.
    """
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
    Replace what lmms-eval logs for its aggregations by the score of each question.

    Args:
        logged: the samples that lmms-eval logs for a task.
        kept: the results that `keep_results` has kept.
        aggregations: the aggregations of the task, by metric. If a metric has no number per question, its aggregation
            is applied to the question alone.
        metrics: the metrics to score.

    Yields:
        The samples with results as they were before aggregation.
    """
    names = [name for name in metrics if name in aggregations]
    with tempfile.TemporaryDirectory() as folder:  # some aggregations write files
        arguments = Namespace(output_path=folder, process_with_media=False, reasoning_tags=None)
        for sample, results in zip(logged, kept, strict=True):
            entry = {**sample, **results}
            known = read_scores(entry)
            missing = [name for name in names if name in entry and name not in known]
            scores = {name: _aggregate(aggregations[name], entry[name], arguments) for name in missing}
            yield {**entry, **{name: score for name, score in scores.items() if score is not None}}


def _aggregate(aggregation: Callable[..., Any], value: Any, arguments: Namespace) -> float | None:
    """Apply an aggregation to one question. Return None if the result is not a number."""
    takes_arguments = "args" in inspect.signature(aggregation).parameters
    value = copy.deepcopy(value)  # some aggregations change their input
    try:
        return float(aggregation([value], args=arguments) if takes_arguments else aggregation([value]))
    except NO_FIGURE:
        return None
