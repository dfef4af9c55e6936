"""Which rows a step sees, which replies it weighs and how, and what training refuses."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.training import examples, grpo_config, problems

from phikit.base.device import Rank
from phikit.base.errors import DataError
from phikit.base.types import Example
from phikit.chat.message import Message
from phikit.data.loader import Loader, LoaderState
from phikit.solve.solver import Reply
from phikit.train.dpo import Rollout, match_rollouts
from phikit.train.grpo import (
    PromptSelection,
    Rated,
    advantages,
    are_even,
    select_prompts,
)
from phikit.train.sft import SFTConfig, SFTObjective

REWARDS = st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=16)


def reply(length: int) -> Reply:
    return Reply(Message("assistant", ""), [0] * length, [0.0] * length, True)


@given(
    rows=st.integers(1, 30),
    count=st.integers(1, 20),
    seed=st.integers(0, 5),
    size=st.sampled_from([2, 3, 4]),
)
def test_the_loader_is_elastic(rows: int, count: int, seed: int, size: int):
    """Any number of processes sees together, step by step, what one process sees alone."""
    alone = Loader(rows, seed=seed)
    ranks = [Loader(rows, seed=seed, rank=Rank(i, size)) for i in range(size)]
    state = LoaderState()
    for _ in range(4):
        expected, after = alone.take(state, count)
        shares = [rank.take(state, count) for rank in ranks]
        assert {next_state for _, next_state in shares} == {after}
        assert sorted(chain(*(taken for taken, _ in shares))) == sorted(expected)
        state = after


@given(rows=st.integers(1, 30), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_deals_every_row_once(rows: int, epochs: int, seed: int):
    dealt, _ = Loader(rows, seed=seed).take(LoaderState(), rows * epochs)
    for epoch in range(epochs):
        assert sorted(dealt[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(rewards=REWARDS, seed=st.integers(0, 9), weight=st.sampled_from([1.0, 0.25]))
def test_balanced_advantages_have_equal_numbers_of_both_signs(
    rewards: list[float], seed: int, weight: float
):
    config = grpo_config(advantage="balanced", negative_weight=weight)
    result = advantages(rewards, config, np.random.default_rng(seed))
    share = min(rewards.count(1.0), rewards.count(-1.0))
    assert result.count(1.0) == share
    assert result.count(-weight) == share
    assert result.count(0.0) == len(rewards) - 2 * share
    assert all(a == 0 or (a > 0) == (r > 0) for a, r in zip(result, rewards, strict=True))


@given(rewards=REWARDS, kind=st.sampled_from(["group_mean", "group_std"]))
def test_group_advantages_sum_to_zero(rewards: list[float], kind: str):
    result = advantages(rewards, grpo_config(advantage=kind), np.random.default_rng(0))
    assert sum(result) == pytest.approx(0.0, abs=1e-9)
    if kind == "group_std" and len(set(rewards)) > 1:
        assert np.std(result) == pytest.approx(1.0)


@given(rewards=REWARDS)
def test_groups_that_are_solved_too_often_are_left_out(rewards: list[float]):
    config = grpo_config(max_group_accuracy=0.5)
    if rewards.count(1.0) > 0.5 * len(rewards):
        assert not any(advantages(rewards, config, np.random.default_rng(0)))


def test_groups_of_unlike_lengths_are_left_out():
    """Deviation over mean: 1/11 for lengths 10 and 12, more than 0.9 for 1 and 30."""
    assert are_even([reply(10), reply(12)], 0.1)
    assert not are_even([reply(10), reply(12)], 0.05)
    assert not are_even([reply(1), reply(30)], 0.9)
    assert are_even([reply(1), reply(30)], None)
    assert are_even([reply(0), reply(0)], 0.5)


@given(steps=st.integers(1, 200), data=st.data())
def test_the_temperature_falls_over_the_first_half(steps: int, data: st.DataObject):
    step = data.draw(st.integers(0, steps - 1))
    expected = 1.0 - 0.4 * min(1.0, step / (0.5 * steps))
    assert grpo_config().temperature_at(step, steps) == pytest.approx(expected, abs=1e-12)


def test_prompt_selection_wants_replies_of_like_length_and_mixed_success():
    alike, unlike, solved = problems(3)
    groups = [
        Rated(alike, [reply(10), reply(12)], [1.0, -1.0]),
        Rated(unlike, [reply(1), reply(30)], [1.0, -1.0]),
        Rated(solved, [reply(10), reply(12)], [1.0, 1.0]),
    ]
    strict = PromptSelection(candidates=3, max_length_cv=0.5, max_accuracy=0.9)
    assert select_prompts(groups, strict) == [alike]
    anything = PromptSelection(candidates=3, max_length_cv=None)
    assert select_prompts(groups, anything) == [alike, unlike, solved]
    with pytest.raises(DataError, match="kept none of 1"):
        select_prompts(groups[1:2], strict)


def test_pairs_are_the_closest_in_length_and_no_rollout_serves_twice():
    def rollout(length: int, *, is_correct: bool, is_finished: bool = True) -> Rollout:
        mask = np.ones(length, np.bool_)
        return Rollout(Example(np.zeros(length, np.int32), mask), is_correct, is_finished)

    group = [
        rollout(10, is_correct=True),
        rollout(20, is_correct=True),
        rollout(19, is_correct=False),
        rollout(12, is_correct=False),
        rollout(10, is_correct=False, is_finished=False),
    ]
    lengths = [(len(a), len(b)) for a, b in match_rollouts([group], max_pairs=3)]
    assert lengths == [(20, 19), (10, 12)]
    assert len(match_rollouts([group], max_pairs=1)) == 1
    assert match_rollouts([group[:2], group[2:]], max_pairs=3) == []


def test_sft_refuses_examples_with_nothing_to_learn():
    """The first token has no predecessor, so a mask on it alone teaches nothing."""
    tokens = np.arange(7, 12, dtype=np.int32)
    only_first = Example(tokens, np.arange(5) == 0)
    config = SFTConfig(examples_per_step=2, micro_examples=2)
    with pytest.raises(DataError, match="1 of 4 examples have no reply to learn.* number 3"):
        SFTObjective([*examples(3), only_first], config, seed=0)
    with pytest.raises(DataError, match="no row"):
        SFTObjective([], config, seed=0)
