"""Is one run better than another on the same questions? Tests, intervals and what the questions can show at all."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import Final, Literal

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
SEED = 0
BLOCK = 2**22  # numbers drawn at a time: 32 MB
MCNEMAR: Final = "McNemar, exact"
WILCOXON: Final = "Wilcoxon signed-rank"


@dataclass(frozen=True)
class Interval:
    """Of `CONFIDENCE`."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """
    The scores of two runs on the same questions; all differences are the second run's score less the first's.

    Attributes:
        questions, clusters: How many; questions of one cluster, such as those about one image, depend on each other.
        first, second: Mean scores.
        difference: Of the means.
        standard_error: Of the difference, by clusters; None for a single cluster.
        interval: Of the difference, by the standard error and Student's distribution; None where that is unknown, or 0
            because all questions changed alike.
        bootstrap: Of the difference, by drawing clusters with a fixed seed; None as above.
        p_value: That there is no difference, by the standard error and Student's distribution: it takes clusters into
            account.
        method, method_p_value: McNemar's test where scores have two values at most, Wilcoxon's otherwise: of single
            questions.
        won, lost: Questions that score more, or less, in the second run.
        detectable: The difference that so many questions, if they vary as these do, show with a power of `POWER`.
        least_changed: If all changes went in one direction: how many questions had to change for the test to show it.
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
        first, second: A score for each question.
        clusters: What each question depends on; questions that share it are drawn together.
        resamples: Of the bootstrap.

    Raises:
        ValueError: If there is no question, or the lengths differ.
    """
    if not len(first) or len({len(first), len(second), len(clusters)}) > 1:
        raise ValueError(
            f"There are {len(first)}, {len(second)} scores of {len(clusters)} questions; allowed: one each."
        )
    a, b = np.asarray(first, float), np.asarray(second, float)
    differences = b - a
    numbers = {key: number for number, key in enumerate(dict.fromkeys(clusters))}
    groups = np.array([numbers[key] for key in clusters])  # (n), cluster of each question
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
        least_changed=ceil(1 - log2(1 - CONFIDENCE)),  # both tests: 2 * 0.5 ** k <= 0.05
    )


def _standard_error(differences: np.ndarray, groups: np.ndarray) -> float | None:
    """Of the mean: the root of the squared sums of residuals over clusters, with the factor G / (G - 1)."""
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
    if error == 0:  # all questions changed alike, or none did
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, clusters - 1))


def _bootstrap(differences: np.ndarray, groups: np.ndarray, resamples: int) -> Interval:
    """Percentiles of the mean over clusters that are drawn with replacement."""
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
