"""The statistics behind every number that phikit reports.

Data arrive as `outcomes`: one inner sequence per problem, one entry per sampled reply, each in
[0, 1]. The unit of repetition is the problem: two replies to one question are not independent, so
a standard error is always taken over problems, never over replies. Where one problem alone gives no
spread, the standard error is None.

Intervals use the normal quantile 1.96, which is a little narrow below about 30 problems.

Sources: Miller, "Adding Error Bars to Evals" (arXiv 2411.00640), sections 2 and 4; Chen et al.,
"Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), section 2.1; Wilson (1927);
McNemar (1947); Efron & Tibshirani (1993), chapter 13; Wang et al., "Self-Consistency" (arXiv
2203.11171).
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phikit.base.errors import DataError

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 2000
"""Of a bootstrap."""

Outcomes = Sequence[Sequence[float]]


class Estimate(NamedTuple):
    """A mean over `n` problems and its standard error (None when n = 1)."""

    mean: float
    stderr: float | None
    n: int


class Interval(NamedTuple):
    low: float
    high: float


class PairedDifference(NamedTuple):
    """How much `after` scores above `before` on the same problems.

    `low` and `high` bound the 95 % interval; with one problem all three spreads are None.
    `mcnemar_p` is given when every score is 0 or 1.
    """

    delta: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    mcnemar_p: float | None

    @property
    def within_noise(self) -> bool:
        """True when the interval covers zero, or when there is none."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


class Pooled(NamedTuple):
    """A number repeated over seeds: its mean, the standard deviation between seeds, the range."""

    mean: float
    spread: float | None
    low: float
    high: float
    seeds: int


class Vote(NamedTuple):
    """One sampled answer: its canonical form, None when there is no answer; and is it right."""

    answer: Hashable | None
    correct: bool


def mean_stderr(outcomes: Outcomes) -> Estimate:
    """Mean score and its standard error, clustered by problem.

    With m_i the mean over the replies to problem i:  mean = (1/N) sum m_i,
    SE = sd(m) / sqrt(N), sd with N - 1.  For equally many replies per problem this is the clustered
    error SE^2 = N^-2 sum_g (sum_{i in g} (x_i - mean))^2 of Miller (2024), section 2.2, times
    N / (N - 1).

    Raises:
        DataError: no problems, or a problem without replies.
    """
    means = _means(outcomes)
    return Estimate(fmean(means), _stderr(means), len(means))


def wilson(successes: int, n: int, *, z: float = Z95) -> Interval:
    """Wilson (1927) score interval of a proportion; sound at 0 and n, where the SE is zero.

    centre = (p + z^2/2n) / (1 + z^2/n),  half = z / (1 + z^2/n) sqrt(p(1-p)/n + z^2/4n^2).

    Raises:
        DataError: not 0 <= successes <= n, or n = 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise DataError(f"{successes} successes of {n} is not a proportion")
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def bootstrap(
    rows: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] = np.mean,
    *,
    seed: int = 0,
) -> Interval:
    """The 95 % percentile interval of a statistic over problems, one row each, drawn with return.

    Args:
        statistic: of as many drawn rows; a draw for which it is not a number is left out. It can
            only vary by what occurs in the rows: where all are equal, so are the two ends.

    Raises:
        DataError: no rows, or the statistic is a number of no draw.
    """
    table = np.asarray(rows, np.float64)
    if not len(table):
        raise DataError("no problems to draw from", fix="check the task's data")
    random = np.random.default_rng(seed)
    drawn = [
        statistic(table[random.integers(len(table), size=len(table))]) for _ in range(RESAMPLES)
    ]
    found = [value for value in drawn if not math.isnan(value)]
    if not found:
        raise DataError("the statistic has no value for these problems")
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(low), float(high))


def avg_at(outcomes: Outcomes, n: int) -> Estimate:
    """avg@n: mean over problems of the mean over the first n replies.

    Raises:
        DataError: a problem has fewer than n replies.
    """
    _need(outcomes, n, f"avg@{n}")
    return mean_stderr([replies[:n] for replies in outcomes])


def pass_at_k(num_samples: int, num_correct: int, *, k: int) -> float:
    """Probability that k replies drawn without replacement from n hold at least one correct.

    1 - C(n-c, k) / C(n, k), computed as 1 - prod_{i=n-c+1}^{n} (1 - k/i): unbiased for
    1 - (1-p)^k, and no large binomials (Chen et al. 2021, equation 1 and figure 3).

    Raises:
        DataError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    n, c = num_samples, num_correct
    if not 0 <= c <= n:
        raise DataError(f"{c} correct of {n} samples is impossible")
    if not 1 <= k <= n:
        raise DataError(f"pass@{k} cannot be estimated from {n} samples", fix="sample at least k")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_at(outcomes: Sequence[Sequence[bool]], k: int) -> Estimate:
    """pass@k over problems: the mean and clustered error of `pass_at_k`."""
    _need(outcomes, k, f"pass@{k}")
    return mean_stderr([[pass_at_k(len(o), sum(map(bool, o)), k=k)] for o in outcomes])


def majority(votes: Sequence[Vote]) -> float:
    """Probability that the majority answer is right, ties broken uniformly at random.

    Replies without an answer do not vote. Correct answers count as one candidate however they are
    written, since each equals the gold answer; wrong ones are told apart by their canonical form.
    """
    right = object()
    counts = Counter(right if v.correct else v.answer for v in votes if v.answer is not None)
    if not counts:
        return 0.0
    top = max(counts.values())
    return (counts[right] == top) / sum(count == top for count in counts.values())


def maj_at_n(problems: Sequence[Sequence[Vote]]) -> Estimate:
    """maj@n over problems, n being the number of votes each has (Wang et al. 2022, section 2)."""
    return mean_stderr([[majority(votes)] for votes in problems])


def paired_difference(
    before: Sequence[tuple[str, float]], after: Sequence[tuple[str, float]]
) -> PairedDifference:
    """Mean change over problems, `after` minus `before`, its error from per-problem differences.

    d_i = after_i - before_i,  SE = sd(d) / sqrt(N),  interval = mean ± 1.96 SE. Taking differences
    first removes the spread in difficulty that both runs share (Miller 2024, section 4.2).

    Args:
        before, after: (content hash, score) of each problem, in the same order.

    Raises:
        DataError: the two runs did not see the same problems in the same order.
    """
    if len(before) != len(after):
        raise DataError(f"cannot pair {len(before)} problems with {len(after)}")
    for i, ((left, _), (right, _)) in enumerate(zip(before, after, strict=True)):
        if left != right:
            raise DataError(
                f"problem {i} differs between the two runs: {left} and {right}",
                fix="evaluate both on the same problems, in the same order",
            )
    pairs = [(x, y) for (_, x), (_, y) in zip(before, after, strict=True)]
    if not pairs:
        raise DataError("no problems to compare")
    differences = [y - x for x, y in pairs]
    delta, stderr = fmean(differences), _stderr(differences)
    low, high = (None, None) if stderr is None else (delta - Z95 * stderr, delta + Z95 * stderr)
    binary = all(score in (0.0, 1.0) for pair in pairs for score in pair)
    p = mcnemar([x == 1 for x, _ in pairs], [y == 1 for _, y in pairs]) if binary else None
    return PairedDifference(delta, stderr, low, high, len(pairs), p)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar p value: were gains and losses equally likely?

    With b problems lost and c gained, min(b, c) ~ Binomial(b + c, 1/2) under the null:
    p = min(1, 2 sum_{i <= min(b,c)} C(b+c, i) / 2^(b+c)).

    Raises:
        DataError: different lengths.
    """
    if len(before) != len(after):
        raise DataError(f"cannot pair {len(before)} problems with {len(after)}")
    lost = sum(x and not y for x, y in zip(before, after, strict=True))
    gained = sum(y and not x for x, y in zip(before, after, strict=True))
    total = lost + gained
    tail = sum(math.comb(total, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**total)


def pooled(values: Sequence[float]) -> Pooled:
    """One number measured with several seeds: mean, sample standard deviation between seeds, range.

    The spread holds everything a seed changes (initialisation, order, sampling); it is not a
    standard error over problems and must not be printed as one.
    """
    if not values:
        raise DataError("no seeds to pool")
    spread = stdev(values) if len(values) > 1 else None
    return Pooled(fmean(values), spread, min(values), max(values), len(values))


def _means(outcomes: Outcomes) -> list[float]:
    if not outcomes:
        raise DataError("no problems to average over", fix="check the task's data")
    for i, replies in enumerate(outcomes):
        if not replies:
            raise DataError(f"problem {i} has no replies")
    return [fmean(replies) for replies in outcomes]


def _stderr(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _need(outcomes: Outcomes, n: int, what: str) -> None:
    for i, replies in enumerate(outcomes):
        if len(replies) < n:
            raise DataError(
                f"{what} needs {n} replies, problem {i} has {len(replies)}",
                fix=f"set num_samples to at least {n}",
            )
