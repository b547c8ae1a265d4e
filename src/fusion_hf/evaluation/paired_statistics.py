"""Test whether one run is better than another on the same questions, and what difference the questions can detect."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import Final, Literal

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
SEED = 0
BLOCK = 2**22  # numbers drawn at a time (32 MB)
MCNEMAR: Final = "McNemar, exact"
WILCOXON: Final = "Wilcoxon signed-rank"


@dataclass(frozen=True)
class Interval:
    """An interval with the confidence `CONFIDENCE`."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """
    The comparison of two runs on the same questions. All differences are the second score minus the first.

    Attributes:
        questions: the number of questions.
        clusters: the number of clusters. Questions of one cluster, such as those about one image, depend on each
            other.
        first: the mean score of the first run.
        second: the mean score of the second run.
        difference: the difference of the means.
        standard_error: the standard error of the difference, by clusters. None for a single cluster.
        interval: the confidence interval of the difference, by the standard error and Student's distribution. None if
            the standard error is unknown, or is 0 because all scores changed by the same amount.
        bootstrap: the confidence interval by resampling clusters with a fixed seed. None in the same cases.
        p_value: the p-value of no difference, by the standard error and Student's distribution, which accounts for
            clusters.
        method: McNemar's test if scores have at most two values, and Wilcoxon's otherwise.
        method_p_value: the p-value of that test, which treats questions as independent.
        won: the number of questions that score higher in the second run.
        lost: the number of questions that score lower in the second run.
        detectable: the difference that so many questions, with the variance of these, detect with a power of `POWER`.
        least_changed: the minimum number of scores that must change, all in one direction, for a significant test.
    """

    questions: int
    clusters: int
    first: float
    second: float
    difference: float
    standard_error: float | None
    interval: Interval | None
    bootstrap: Interval | None
    p_value: float | None
    method: Literal["McNemar, exact", "Wilcoxon signed-rank"]
    method_p_value: float
    won: int
    lost: int
    detectable: float | None
    least_changed: int


def compare_scores(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable], resamples: int = RESAMPLES
) -> PairedTest:
    """
    Compare the scores of two runs question by question.

    Args:
        first: the score of each question in the first run.
        second: the score of each question in the second run.
        clusters: the cluster of each question. Questions of a cluster are resampled together.
        resamples: the number of bootstrap samples.

    Returns:
        The comparison.

    Raises:
        ValueError: if there is no question, or the lengths differ.
    """
    if not len(first) or len({len(first), len(second), len(clusters)}) > 1:
        raise ValueError(
            f"There must be one score per run and question, got {len(first)} and {len(second)} scores of "
            f"{len(clusters)} questions."
        )
    a, b = np.asarray(first, float), np.asarray(second, float)
    differences = b - a
    numbers = {key: number for number, key in enumerate(dict.fromkeys(clusters))}
    groups = np.array([numbers[key] for key in clusters])  # (n,), the cluster of each question
    mean, error = differences.mean().item(), _standard_error(differences, groups)
    binary = len(np.unique([a, b])) <= 2  # 0 and 1, or 0 and 100
    return PairedTest(
        questions=len(a),
        clusters=len(numbers),
        first=a.mean().item(),
        second=b.mean().item(),
        difference=mean,
        standard_error=error,
        interval=_student_interval(mean, error, len(numbers)) if error else None,
        bootstrap=_bootstrap(differences, groups, resamples) if error else None,
        p_value=_student_p_value(mean, error, len(numbers)),
        method=MCNEMAR if binary else WILCOXON,
        method_p_value=_mcnemar(differences) if binary else _wilcoxon(differences),
        won=int((differences > 0).sum()),
        lost=int((differences < 0).sum()),
        detectable=_detectable(error) if error else None,
        least_changed=ceil(1 - log2(1 - CONFIDENCE)),  # for both tests, 2 * 0.5 ** k <= 0.05
    )


def _standard_error(differences: np.ndarray, groups: np.ndarray) -> float | None:
    """
    Return the standard error of the mean: the root of the squared cluster sums of residuals, with the factor G /
    (G - 1).
    """
    count = int(groups.max()) + 1
    if count < 2:
        return None
    sums = np.bincount(groups, weights=differences - differences.mean(), minlength=count)
    return sqrt(count / (count - 1) * float(sums @ sums)) / len(differences)


def _student_interval(mean: float, error: float, clusters: int) -> Interval:
    from scipy import stats

    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, clusters - 1)) * error
    return Interval(mean - width, mean + width)


def _student_p_value(mean: float, error: float | None, clusters: int) -> float | None:
    from scipy import stats

    if error is None:
        return None
    if error == 0:  # all scores changed by the same amount, or none did
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, clusters - 1))


def _bootstrap(differences: np.ndarray, groups: np.ndarray, resamples: int) -> Interval:
    """Return percentiles of the mean over clusters that are drawn with replacement."""
    sums, sizes = np.bincount(groups, weights=differences), np.bincount(groups)
    generator = np.random.default_rng(SEED)
    means, step = [], max(1, BLOCK // len(sums))
    for begin in range(0, resamples, step):
        drawn = generator.integers(len(sums), size=(min(step, resamples - begin), len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _mcnemar(differences: np.ndarray) -> float:
    from scipy import stats

    changed = int((differences != 0).sum())
    return 1.0 if not changed else float(stats.binomtest(int((differences > 0).sum()), changed).pvalue)


def _wilcoxon(differences: np.ndarray) -> float:
    from scipy import stats

    changed = differences[differences != 0]
    return 1.0 if not len(changed) else float(stats.wilcoxon(changed).pvalue)


def _detectable(error: float) -> float:
    from scipy import stats

    return float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * error
