"""Paired tests and intervals, compared with scipy's and with what can be counted by hand."""

import numpy as np
import pytest
from scipy import stats

from fusion_hf.evaluation.paired_statistics import MCNEMAR, WILCOXON, compare_scores

COUNT, SIZE = 240, 4  # questions, and questions about an image


def draw(seed: int, share: float, count: int = COUNT) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def graded(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(COUNT).round(2)


def test_mcnemar_is_the_binomial_test_of_the_changed_questions():
    first, second = draw(0, 0.7), draw(1, 0.8)
    found = compare_scores(first, second, range(COUNT))
    won, lost = int(((first == 0) & (second == 1)).sum()), int(((first == 1) & (second == 0)).sum())
    assert (found.method, found.won, found.lost) == (MCNEMAR, won, lost)
    assert found.method_p_value == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-12)
    by_hand = 2 * sum(stats.binom.pmf(k, won + lost, 0.5) for k in range(min(won, lost) + 1))
    assert found.method_p_value == pytest.approx(by_hand, rel=1e-9)


def test_graded_scores_get_wilcoxon_and_students_test():
    first, second = graded(0), graded(1)
    found = compare_scores(first, second, range(COUNT))
    assert found.method == WILCOXON
    assert found.method_p_value == pytest.approx(stats.wilcoxon(second, first).pvalue, rel=1e-12)
    theirs = stats.ttest_rel(second, first)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))
    assert found.difference == pytest.approx((second - first).mean())


def test_clusters_of_one_size_are_as_a_test_of_their_means():
    """Of these, the clustered standard error is that of the means of clusters, which scipy tests."""
    first, second = draw(0, 0.7), draw(1, 0.8)
    second[: COUNT // 2] = np.repeat(second[: COUNT // 2 : SIZE], SIZE)  # questions about an image change together
    found = compare_scores(first, second, [f"image {i // SIZE}" for i in range(COUNT)])
    means = (second - first).reshape(-1, SIZE).mean(1)
    theirs = stats.ttest_1samp(means, 0)
    assert (found.clusters, found.questions) == (COUNT // SIZE, COUNT)
    assert found.standard_error == pytest.approx(stats.sem(means), rel=1e-9)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.standard_error > compare_scores(first, second, range(COUNT)).standard_error


def test_clusters_of_several_sizes_are_as_drawn():
    """The standard error of uneven clusters, and the bootstrap, against scipy's bootstrap of the same statistic."""
    first, second = draw(0, 0.6), draw(1, 0.7)
    clusters = np.sort(np.random.default_rng(2).integers(40, size=COUNT))
    found = compare_scores(first, second, clusters.tolist())
    sums = np.bincount(clusters, weights=second - first)
    sizes = np.bincount(clusters)
    theirs = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(3),
    )
    assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
    drawn = theirs.confidence_interval
    assert (found.bootstrap.low, found.bootstrap.high) == pytest.approx((drawn.low, drawn.high), abs=0.01)


def test_the_bootstrap_has_a_fixed_seed():
    pair = draw(0, 0.6), draw(1, 0.7)
    assert compare_scores(*pair, range(COUNT)) == compare_scores(*pair, range(COUNT))


def test_the_detectable_difference_has_the_promised_power():
    """Of many experiments with this true difference, four fifths are significant."""
    generator = np.random.default_rng(0)
    one = compare_scores(np.zeros(COUNT), generator.normal(0, 1, COUNT), range(COUNT))
    true = one.detectable / one.standard_error / np.sqrt(COUNT)  # of differences whose deviation is 1
    samples = generator.normal(true, 1, (4000, COUNT))
    share = (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean()
    assert share == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("changed", "significant"), [(5, False), (6, True)])
def test_fewer_changes_than_that_can_never_be_significant(changed, significant):
    first, second = np.zeros(COUNT), np.zeros(COUNT)
    second[:changed] = 1
    found = compare_scores(first, second, range(COUNT))
    assert found.least_changed == 6
    assert (found.method_p_value < 0.05) is significant


def test_equal_runs_have_no_interval_and_no_difference():
    scores = draw(0, 0.7)
    found = compare_scores(scores, scores, range(COUNT))
    assert (found.difference, found.p_value, found.method_p_value) == (0.0, 1.0, 1.0)
    assert (found.standard_error, found.interval, found.bootstrap, found.detectable) == (0.0, None, None, None)


def test_one_image_tells_nothing_about_others():
    found = compare_scores(draw(0, 0.5), draw(1, 0.5), ["image"] * COUNT)
    assert (found.clusters, found.standard_error, found.interval, found.p_value) == (1, None, None, None)


@pytest.mark.parametrize("sides", [([], [], []), ([1.0], [1.0, 0.0], [0, 1]), ([1.0], [0.0], [0, 1])])
def test_scores_that_do_not_fit_are_refused(sides):
    with pytest.raises(ValueError, match="must be one score per run and question"):
        compare_scores(*sides)
