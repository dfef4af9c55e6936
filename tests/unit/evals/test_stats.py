"""Every estimator against plain enumeration."""

import itertools
import math
import random
from fractions import Fraction
from statistics import NormalDist, fmean, pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phikit.base.errors import DataError
from phikit.evals import stats
from phikit.evals.stats import Z95, Vote, bootstrap

replies = st.lists(st.lists(st.booleans(), min_size=3, max_size=5), min_size=2, max_size=8)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_reply(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    expected = Fraction(sum(map(any, subsets)), len(subsets))
    assert stats.pass_at_k(n, c, k=k) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_are_huge():
    assert stats.pass_at_k(100_000, 1, k=1) == pytest.approx(1e-5, rel=1e-9)
    assert stats.pass_at_k(100_000, 10, k=50_000) == pytest.approx(1 - 2**-10, rel=1e-3)
    assert stats.pass_at_k(100_000, 0, k=100_000) == 0.0


@given(replies)
def test_pass_at_one_is_the_mean(outcomes):
    expected = stats.mean_stderr(outcomes)
    assert stats.pass_at(outcomes, 1) == pytest.approx(expected)


@given(replies)
def test_clustered_error_ignores_that_replies_are_repeated(outcomes):
    """Copying every reply adds no evidence, so the error must not shrink."""
    once = stats.mean_stderr(outcomes)
    twice = stats.mean_stderr([group * 2 for group in outcomes])
    assert twice.mean == pytest.approx(once.mean)
    assert twice.stderr == pytest.approx(once.stderr)


def test_clustered_error_equals_the_published_formula():
    outcomes = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    n, mean = 12, fmean(x for group in outcomes for x in group)
    published = math.sqrt(sum(sum(x - mean for x in group) ** 2 for group in outcomes)) / n
    assert stats.mean_stderr(outcomes).stderr == pytest.approx(published * math.sqrt(4 / 3))


def test_error_bars_have_the_spread_of_repeated_experiments():
    rng = random.Random(0)
    estimates = [
        stats.mean_stderr([[float(rng.random() < 0.3)] for _ in range(200)]) for _ in range(600)
    ]
    spread = pstdev([estimate.mean for estimate in estimates])
    assert fmean(e.stderr or 0.0 for e in estimates) == pytest.approx(spread, rel=0.1)


def test_one_problem_has_no_standard_error():
    assert stats.mean_stderr([[1.0, 0.0]]) == (0.5, None, 1)


@pytest.mark.parametrize("outcomes", [[], [[1.0], []]])
def test_nothing_to_average_is_an_error(outcomes):
    with pytest.raises(DataError):
        stats.mean_stderr(outcomes)


@given(st.integers(1, 300), st.data())
def test_wilson_inverts_the_score_test(n, data):
    """At each end p of the interval, |p_hat - p| is exactly z standard errors under p."""
    k = data.draw(st.integers(0, n))
    for p in stats.wilson(k, n):
        if 0 < p < 1:
            assert abs(k / n - p) == pytest.approx(stats.Z95 * math.sqrt(p * (1 - p) / n), rel=1e-6)


def test_wilson_at_the_edges():
    assert pytest.approx(NormalDist().inv_cdf(0.975)) == stats.Z95
    assert stats.wilson(0, 10).low == 0.0 and 0.2 < stats.wilson(0, 10).high < 0.3
    assert stats.wilson(10, 10).high == 1.0
    with pytest.raises(DataError):
        stats.wilson(0, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1, max_size=7
    )
)
def test_majority_is_the_mean_over_all_tie_breaks(raw):
    # One answer is right or wrong, never both: "a" is the gold answer here.
    votes = [Vote(answer, answer == "a") for answer, _ in raw]
    cast = [vote.answer for vote in votes if vote.answer is not None]
    winners = [a for a in set(cast) if cast.count(a) == max(map(cast.count, cast))]
    expected = fmean(winner == "a" for winner in winners) if winners else 0.0
    assert stats.majority(votes) == pytest.approx(expected)


def test_spellings_of_the_right_answer_vote_together():
    votes = [Vote("1/2", True), Vote("0.5", True), Vote("3", False), Vote("3", False)]
    assert stats.majority(votes) == 0.5
    assert stats.maj_at_n([votes, [Vote("7", True)]]).mean == 0.75


def test_avg_at_n_takes_the_first_n_and_refuses_fewer():
    outcomes = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert stats.avg_at(outcomes, 2).mean == 0.25
    with pytest.raises(DataError, match="avg@4 needs 4 replies"):
        stats.avg_at(outcomes, 4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(pairs):
    before, after = [x for x, _ in pairs], [y for _, y in pairs]
    gained = sum(y > x for x, y in pairs)
    changed = sum(x != y for x, y in pairs)
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=changed)]
    extreme = sum(abs(2 * t - changed) >= abs(2 * gained - changed) for t in tosses)
    assert stats.mcnemar(before, after) == pytest.approx(extreme / len(tosses))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=20))
def test_paired_difference_is_the_difference_of_means_and_antisymmetric(pairs):
    before = [(str(i), float(x)) for i, (x, _) in enumerate(pairs)]
    after = [(str(i), float(y)) for i, (_, y) in enumerate(pairs)]
    there, back = stats.paired_difference(before, after), stats.paired_difference(after, before)
    assert there.delta == pytest.approx(fmean(y for _, y in pairs) - fmean(x for x, _ in pairs))
    assert back.delta == pytest.approx(-there.delta) and back.stderr == there.stderr
    assert there.within_noise == back.within_noise


def test_pairing_sees_what_two_separate_errors_cannot():
    rng = random.Random(1)
    before = [(str(i), float(rng.random() < 0.5)) for i in range(400)]
    after = [(key, 1.0 if int(key) < 12 else value) for key, value in before]
    paired = stats.paired_difference(before, after)
    alone = stats.mean_stderr([[value] for _, value in before]).stderr
    assert not paired.within_noise and paired.stderr is not None and alone is not None
    assert paired.stderr < alone / 3


def test_pairing_refuses_other_problems_and_other_orders():
    with pytest.raises(DataError, match="problem 0 differs"):
        stats.paired_difference([("a", 1.0), ("b", 1.0)], [("b", 1.0), ("a", 1.0)])
    with pytest.raises(DataError, match="2 problems with 1"):
        stats.paired_difference([("a", 1.0), ("b", 1.0)], [("a", 1.0)])


def test_pairing_of_one_problem_is_noise_and_of_shares_has_no_mcnemar():
    assert stats.paired_difference([("a", 0.0)], [("a", 1.0)]).within_noise
    assert stats.paired_difference([("a", 0.5)], [("a", 1.0)]).mcnemar_p is None


def test_pooled_reports_the_spread_between_seeds():
    assert stats.pooled([0.4, 0.5, 0.6]) == (0.5, pytest.approx(0.1), 0.4, 0.6, 3)
    assert stats.pooled([0.4]).spread is None


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.poisson(1.5, size=400).astype(float)
    low, high = bootstrap(values)
    half = Z95 * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_the_bootstrap_draws_whole_rows_and_leaves_out_what_is_no_number():
    rows = [[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]]

    def ratio(drawn: np.ndarray) -> float:
        below, above = drawn.sum(0)
        return above / below if below else math.nan

    assert bootstrap(rows, ratio) == (2.0, 2.0)
    for bad in ([], [math.nan]):
        with pytest.raises(DataError):
            bootstrap(bad)
