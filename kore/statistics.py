"""How sure a measured number is: intervals over seeds and over questions, and tests of one result against another.

Questions are a sample of those that could have been asked, seeds a sample of the runs that could have been made. The
bootstrap draws questions again with replacement (Efron 1979) and works for any measure, also for HARS. Of a few seeds
it cannot learn the tails, so there Student's t is used. Everything random is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 1 << 22
_EXACT_SIGNS = 16

Statistic = Callable[[np.ndarray], np.ndarray]
"""From means (..., m) of m measures to a number each, (...)."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; ``low`` and ``high`` are None where the data cannot tell."""

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, spec: str) -> str:
        value = format(self.value, spec)
        if self.low is None or self.high is None:
            return value
        return f"{value} [{format(self.low, spec)}, {format(self.high, spec)}]"

    def as_json(self) -> dict[str, float | None]:
        """value, low and high."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Comparison:
    """How much larger the second of two results is than the first, and the p-value of no difference (two-sided)."""

    difference: Interval
    p: float | None


def seed_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean ± t · s / √n of independent runs, t of Student's distribution with n − 1 degrees of freedom.

    One value has no interval.
    """
    from scipy import stats

    x = _finite("values", values, 1)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean)
    half = float(stats.t.ppf(0.5 + _level(level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def paired_seeds(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Comparison:
    """b − a of runs that belong together pair by pair (one seed, or one world): Student's t on the differences.

    One pair has neither interval nor p-value.
    """
    from scipy import stats

    d = _differences(a, b)
    interval = seed_interval(list(d), level)
    if len(d) < 2:
        return Comparison(interval, None)
    spread = d.std(ddof=1)
    if spread == 0:
        return Comparison(interval, 0.0 if d[0] else 1.0)
    t = interval.value / (spread / np.sqrt(len(d)))
    return Comparison(interval, float(2 * stats.t.sf(abs(t), len(d) - 1)))


def proportion_interval(successes: int, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion, which holds near 0 and 1 too, where a bootstrap has no spread."""
    from scipy import stats

    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"proportion_interval: expected 0 <= successes <= count, got {successes} of {count}")
    found = stats.binomtest(int(successes), int(count)).proportion_ci(_level(level), method="wilson")
    return Interval(successes / count, float(found.low), float(found.high))


def resampled_means(values: Any, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Means (resamples, m) of values (n, m), the n rows drawn again with replacement each time.

    Columns share the draw, so measures of the same questions stay together. Memory is bounded whatever n is.
    """
    x = _finite("values", values, 2)
    n, rng = len(x), np.random.default_rng(seed)
    means = np.empty((resamples, x.shape[1]))
    for start, stop in _blocks(resamples, n):
        drawn = rng.integers(0, n, size=(stop - start, n), dtype=np.uint32).astype(np.int64)
        drawn += np.arange(stop - start)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=(stop - start) * n).reshape(stop - start, n)
        means[start:stop] = counts @ x / n
    return means


def percentile_interval(value: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """The central part of bootstrap draws around an estimate."""
    low, high = np.quantile(draws, [0.5 - _level(level) / 2, 0.5 + level / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap_interval(
    values: Any,
    statistic: Statistic | None = None,
    *,
    method: Literal["percentile", "bca"] = "percentile",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int | Sequence[int] = 0,
) -> Interval:
    """Interval of a mean over questions, or of a function of several means.

    Args:
        values: (n,) or (n, m): a row for each question, a column for each measure.
        statistic: From means (..., m) to (...); None: the mean of a single measure.
        method: ``"percentile"``, or ``"bca"``, corrected for bias and skewness (Efron 1987).
        level: Of confidence.
        resamples: Bootstrap samples.
        seed: Of the draws.
    """
    x = _columns(values)
    of = statistic or _only_column(x)
    value = float(of(x.mean(0)))
    draws = np.asarray(of(resampled_means(x, resamples, seed)), dtype=np.float64)
    if method == "percentile":
        return percentile_interval(value, draws, level)
    if method != "bca":
        raise ValueError(f"method: expected percentile or bca, got {method!r}")
    n = len(x)
    if n < 2 or np.ptp(draws) == 0:
        return percentile_interval(value, draws, level)
    left_out = np.asarray(of((x.sum(0) - x) / (n - 1)), dtype=np.float64)
    low, high = _bca_levels(value, draws, left_out, _level(level))
    return Interval(value, float(np.quantile(draws, low)), float(np.quantile(draws, high)))


def seed_deviations(statistics: Any, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0) -> np.ndarray:
    """How far the mean over S runs may lie from that over all runs: draws (resamples, ...) of statistics (S, ...).

    Each draw is Σ zᵢ (xᵢ − x̄) / √(S (S − 1)) · √((S − 1) / χ²) with normal zᵢ, so for one statistic t · s / √S with
    S − 1 degrees of freedom: their quantiles are the interval of :func:`seed_interval`. Statistics of one run keep
    their dependence, since they share z and χ². Of a single run nothing is known: zeros.
    """
    x = np.asarray(statistics, dtype=np.float64)
    runs = len(x)
    if runs < 2:
        return np.zeros((resamples, *x.shape[1:]))
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((resamples, runs))
    z *= np.sqrt((runs - 1) / rng.chisquare(runs - 1, (resamples, 1)) / (runs * (runs - 1)))
    return np.tensordot(z, x - x.mean(0), axes=1)


def hierarchical_interval(
    values: Any,
    statistic: Statistic | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval over seeds and questions at once: of the mean over S runs of a function of means over n questions.

    The questions, the same for all runs, are drawn again by the bootstrap; to each draw a deviation of the runs is
    added (:func:`seed_deviations`). The noise of a run on its own questions is in both parts, so the interval is
    rather a little too wide.

    Args:
        values: (S, n) or (S, n, m).
        statistic: From means (..., m) to (...); None: the mean of a single measure.
        level: Of confidence.
        resamples: Draws.
        seed: Of the draws.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[..., None] if x.ndim == 2 else x
    if x.ndim != 3:
        raise ValueError(f"values: expected runs x questions or runs x questions x measures, got shape {x.shape}")
    runs, n, m = x.shape
    of = statistic or _only_column(x[0])
    observed = np.asarray(of(x.mean(1)), dtype=np.float64)
    means = resampled_means(x.transpose(1, 0, 2).reshape(n, runs * m), resamples, seed)
    draws = np.asarray(of(means.reshape(resamples, runs, m))).mean(1)
    draws = draws + seed_deviations(observed, resamples, (seed, 1))
    return percentile_interval(float(observed.mean()), draws, level)


def paired_difference(a: Any, b: Any, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """mean(b) − mean(a) on the same n questions: paired bootstrap interval, p-value of :func:`sign_flip_p`."""
    d = _differences(a, b)
    interval = bootstrap_interval(d, level=level, resamples=resamples, seed=seed)
    return Comparison(interval, sign_flip_p(d, resamples=resamples, seed=seed))


def sign_flip_p(differences: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Paired permutation test: how often Σ ± |d| is as far from 0 as Σ d, were the two results interchangeable.

    With at most 16 differences that are not 0 all sign patterns are counted; else p = (1 + hits) / (1 + resamples),
    which is never 0 (Phipson and Smyth 2010).
    """
    d = _finite("differences", differences, 1)
    size = np.abs(d[d != 0])
    if not len(size):
        return 1.0
    observed = abs(float(d.sum())) * (1 - 1e-12)
    if len(size) <= _EXACT_SIGNS:
        signs = (np.arange(2 ** len(size))[:, None] >> np.arange(len(size))) & 1
        return float((np.abs((2 * signs - 1) @ size) >= observed).mean())
    # Of equal sizes only the number of plus signs counts, which is binomial.
    sizes, counts = np.unique(size, return_counts=True)
    rng, hits = np.random.default_rng(seed), 0
    for start, stop in _blocks(resamples, len(sizes)):
        plus = rng.binomial(counts, 0.5, size=(stop - start, len(sizes)))
        hits += int((np.abs((2 * plus - counts) @ sizes) >= observed).sum())
    return (1 + hits) / (1 + resamples)


def mcnemar(a: Any, b: Any) -> float:
    """Exact McNemar test of two sets of right (1) and wrong (0) answers: p of as uneven a split where they differ."""
    from scipy import stats

    d = _differences(a, b)
    if not np.isin(d, (-1, 0, 1)).all():
        raise ValueError("mcnemar: expected marks of 0 and 1; use sign_flip_p for others")
    differ = int((d != 0).sum())
    return float(stats.binomtest(int((d > 0).sum()), differ).pvalue) if differ else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the i-th smallest of k times k − i + 1, never decreasing."""
    values = _finite("p", p, 1) if len(p) else np.empty(0)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, values[order] * np.arange(len(values), 0, -1)))
    return [float(one) for one in adjusted]


def draws_p(draws: np.ndarray) -> float:
    """Two-sided p-value of no difference from draws of the difference: twice the smaller share beyond 0, never 0."""
    beyond = 1 + min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * beyond / (1 + len(draws)))


def _bca_levels(value: float, draws: np.ndarray, left_out: np.ndarray, level: float) -> tuple[float, float]:
    from scipy import stats

    below = ((draws < value).mean() + (draws <= value).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    u = left_out.mean() - left_out
    spread = (u**2).sum()
    skew = (u**3).sum() / (6 * spread**1.5) if spread else 0.0
    shifted = bias + stats.norm.ppf([0.5 - level / 2, 0.5 + level / 2])
    low, high = stats.norm.cdf(bias + shifted / (1 - skew * shifted))
    return float(low), float(high)


def _blocks(count: int, width: int) -> Iterator[tuple[int, int]]:
    rows = max(1, _CELLS // max(1, width))
    return ((start, min(start + rows, count)) for start in range(0, count, rows))


def _only_column(x: np.ndarray) -> Statistic:
    if x.shape[-1] != 1:
        raise ValueError(f"statistic: expected a function of the {x.shape[-1]} means")
    return lambda means: means[..., 0]


def _columns(values: Any) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    return _finite("values", x[:, None] if x.ndim == 1 else x, 2)


def _differences(a: Any, b: Any) -> np.ndarray:
    x, y = _finite("a", a, 1), _finite("b", b, 1)
    if len(x) != len(y):
        raise ValueError(f"expected as many values of both, in the same order; got {len(x)} and {len(y)}")
    return y - x


def _finite(name: str, values: Any, dimensions: int) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != dimensions or not len(x) or not np.isfinite(x).all():
        what = f"an array of {dimensions} dimensions" if dimensions > 1 else "a list of numbers"
        raise ValueError(f"{name}: expected {what}, none of them missing, got shape {x.shape}")
    return x


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1, such as 0.95, got {level!r}")
    return level
