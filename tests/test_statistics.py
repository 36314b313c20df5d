"""Intervals and tests against closed forms, SciPy, and the share of simulated samples that they cover."""

from __future__ import annotations

import inspect
import time

import numpy as np
import pytest
from scipy import stats

from kore import statistics as st


def seeded(number):
    """SciPy 1.15 renamed the argument."""
    return {"rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state": number}


def samples(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_the_interval_over_seeds_is_students():
    values = [70.2, 61.4, 65.8]
    found = st.seed_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-12)
    assert st.seed_interval([3.0]) == st.Interval(3.0) and f"{st.seed_interval([3.0]):.1f}" == "3.0"
    assert f"{st.Interval(1.0, 0.5, 1.5):.1f}" == "1.0 [0.5, 1.5]"
    narrow = st.seed_interval(values, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_pairs_of_seeds_are_compared_as_in_scipy():
    a, b = samples(0, 5), samples(1, 5)
    found = st.paired_seeds(a, b)
    expected = stats.ttest_rel(b, a)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-10)
    assert found.difference.value == pytest.approx((b - a).mean())
    assert found.difference.low == pytest.approx(expected.confidence_interval().low, rel=1e-10)
    assert st.paired_seeds([1.0], [2.0]) == st.Comparison(st.Interval(1.0), None)
    assert st.paired_seeds([1.0, 2.0], [1.0, 2.0]).p == 1 and st.paired_seeds([1.0, 2.0], [2.0, 3.0]).p == 0


def test_the_interval_of_a_proportion_is_wilsons():
    n, k, z = 40, 3, stats.norm.ppf(0.975)
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    found = st.proportion_interval(k, n)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-10)
    assert st.proportion_interval(0, 50).high > 0.05 and st.proportion_interval(50, 50).low < 0.95


def test_resampled_means_are_those_of_rows_drawn_with_replacement():
    x = samples(0, 7, 2)
    means = st.resampled_means(x, 20_000, 1)
    assert np.array_equal(means, st.resampled_means(x, 20_000, 1))
    assert not np.array_equal(means, st.resampled_means(x, 20_000, 2))
    assert means.mean(0) == pytest.approx(x.mean(0), abs=4 * x.std() / np.sqrt(7 * 20_000))
    assert np.cov(means.T) == pytest.approx(np.cov(x.T, bias=True) / 7, rel=0.05)
    assert (means >= x.min(0)).all() and (means <= x.max(0)).all()


def test_blocks_do_not_change_the_kind_of_draw(monkeypatch):
    x = samples(0, 50, 1)
    monkeypatch.setattr(st, "_CELLS", 170)
    means = st.resampled_means(x, 3000)
    assert means.std() == pytest.approx(x.std() / np.sqrt(50), rel=0.06)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_intervals_agree_with_scipy(method):
    x = samples(3, 60) ** 4
    found = st.bootstrap_interval(x, method=method, resamples=40_000)
    expected = stats.bootstrap((x,), np.mean, n_resamples=20_000, method=method, **seeded(1)).confidence_interval
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)
    plain = st.bootstrap_interval(x, resamples=40_000)
    assert (found.low == plain.low) == (method == "percentile")


def test_bca_of_a_ratio_agrees_with_scipy():
    x = samples(4, 40, 2) + 0.2
    found = st.bootstrap_interval(x, lambda m: m[..., 0] / m[..., 1], method="bca", resamples=40_000)
    expected = stats.bootstrap(
        (x[:, 0], x[:, 1]),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        **seeded(1),
    ).confidence_interval
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04 * width)


@pytest.mark.slow
def test_ten_thousand_questions_take_seconds():
    marks = (samples(5, 10_000, 2) < 0.3).astype(float)
    started = time.process_time()
    found = st.bootstrap_interval(marks, lambda means: means.mean(-1))
    assert time.process_time() - started < 8
    exact = marks.mean(1).std() / 100 * stats.norm.ppf(0.975)
    assert found.high - found.value == pytest.approx(exact, rel=0.05)


def coverage(interval, draw, truth: float, trials: int) -> float:
    hits = 0
    for trial in range(trials):
        found = interval(draw(np.random.default_rng(trial)))
        hits += found.low <= truth <= found.high
    return hits / trials


def test_coverage_over_questions():
    """95 % of 300 samples, give or take 2.5 standard errors and the bootstrap's own shortfall at 60 questions."""
    covered = coverage(
        lambda x: st.bootstrap_interval(x, resamples=600), lambda rng: rng.binomial(1, 0.4, 60).astype(float), 0.4, 300
    )
    assert 0.90 < covered < 0.985


def two_way(rng: np.random.Generator, runs: int, n: int) -> np.ndarray:
    """Runs that differ by 1, questions by 3, and noise of 2: the truth is 0."""
    return rng.normal(0, 1, (runs, 1)) + rng.normal(0, 3, (1, n)) + rng.normal(0, 2, (runs, n))


@pytest.mark.parametrize("runs", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)])
def test_coverage_over_seeds_and_questions_together(runs):
    covered = coverage(
        lambda x: st.hierarchical_interval(x, resamples=600), lambda rng: two_way(rng, runs, 40), 0.0, 250
    )
    assert 0.91 < covered <= 1.0
    alone = coverage(
        lambda x: st.bootstrap_interval(x.mean(0), resamples=600), lambda rng: two_way(rng, runs, 40), 0.0, 250
    )
    assert alone < covered - 0.03


def test_with_questions_that_do_not_differ_the_interval_is_students_and_with_one_seed_the_bootstraps():
    values = np.array([70.2, 61.4, 65.8])
    found = st.hierarchical_interval(np.repeat(values[:, None], 30, axis=1), resamples=100_000)
    expected = st.seed_interval(list(values))
    assert (found.low, found.high) == pytest.approx(
        (expected.low, expected.high), abs=0.03 * (expected.high - found.low)
    )
    one = samples(1, 1, 30)
    assert st.hierarchical_interval(one) == st.bootstrap_interval(one[0])


def test_deviations_of_seeds_keep_the_dependence_of_their_statistics():
    x = np.array([[1.0, -2.0], [4.0, -8.0], [2.0, -4.0]])
    deviations = st.seed_deviations(x, 2000)
    assert deviations.shape == (2000, 2) and np.allclose(deviations[:, 1], -2 * deviations[:, 0])
    assert not st.seed_deviations(x[:1], 5).any()


def test_the_sign_test_counts_all_patterns_of_few_and_draws_of_many():
    d = np.array([1.0, 2.0, 0.0, 3.0, -0.5])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    exact = (np.abs(signs @ np.array([1.0, 2.0, 3.0, 0.5])) >= 5.5 - 1e-9).mean()
    assert st.sign_flip_p(d) == exact
    assert st.sign_flip_p([0.0, 0.0]) == 1.0
    many = np.random.default_rng(0).normal(0.15, 1, 200)
    expected = stats.permutation_test(
        (many, np.zeros(200)),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        vectorized=True,
        **seeded(0),
    ).pvalue
    assert st.sign_flip_p(many, resamples=20_000) == pytest.approx(expected, abs=0.01)
    assert st.sign_flip_p(np.ones(40), resamples=999) == pytest.approx(1 / 1000)


def test_under_no_difference_p_is_uniform():
    p = [st.sign_flip_p(np.random.default_rng(i).normal(size=30), resamples=400, seed=i) for i in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_paired_difference_has_the_sign_of_the_second_and_less_noise_than_unpaired_ones():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 5, 200)
    a, b = easy + rng.normal(0, 0.5, 200), easy + 0.3 + rng.normal(0, 0.5, 200)
    found = st.paired_difference(a, b)
    assert 0 < found.difference.low < found.difference.value == pytest.approx((b - a).mean()) and found.p < 0.001
    back = st.paired_difference(b, a)
    assert back.difference.value == -found.difference.value and back.difference.high < 0
    with pytest.raises(ValueError, match="as many values of both"):
        st.paired_difference(a, b[:-1])


def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ():
    a, b = np.array([1, 1, 0, 0, 0, 0, 0, 0, 1, 0]), np.array([1, 0, 1, 1, 1, 1, 1, 0, 1, 1])
    assert st.mcnemar(a, b) == pytest.approx(2 * (1 + 7) / 2**7)
    assert st.mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="marks of 0 and 1"):
        st.mcnemar(a, b / 2)


def test_holm():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.9]) == [1.0, 1.0] and st.holm([]) == []


def test_p_from_draws():
    draws = np.array([-1.0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert st.draws_p(draws) == pytest.approx(2 * 2 / 10) and st.draws_p(np.zeros(9)) == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: st.seed_interval([1.0, np.nan]), "values: expected a list of numbers, none of them missing"),
        (lambda: st.bootstrap_interval([]), "values: expected an array of 2 dimensions"),
        (lambda: st.bootstrap_interval([[1.0, 2.0]]), "expected a function of the 2 means"),
        (lambda: st.bootstrap_interval([1.0, 2.0], method="basic"), "method: expected percentile or bca"),
        (lambda: st.seed_interval([1.0, 2.0], level=95), "level: expected a share between 0 and 1"),
        (lambda: st.hierarchical_interval([1.0]), "expected runs x questions"),
        (lambda: st.proportion_interval(3, 2), "expected 0 <= successes <= count"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
