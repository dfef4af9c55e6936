import sys
from dataclasses import replace

import pytest

from phikit.base.errors import DataError, MissingExtraError
from phikit.data import reasoning_gym as adapter
from phikit.data.problem import assert_disjoint
from phikit.data.reasoning_gym import INTEGER_TASKS, reasoning_gym_problems, score_exact
from phikit.data.split import SHARES, split_of

CHEAP = ("chain_sum", "simple_equations")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    adapter._dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingExtraError, match=r"phikit\[eval\]"):
        reasoning_gym_problems(seed=0, count=1, split="test")


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

    def test_the_trap_neighbouring_seeds_share_nearly_everything(self):
        """What the adapter is for: the package's own data sets of seeds 42 and 43."""
        import reasoning_gym

        first, second = (
            {
                item["question"]
                for item in reasoning_gym.create_dataset("chain_sum", seed=s, size=50)
            }
            for s in (42, 43)
        )
        assert len(first & second) >= 49

    def test_neighbouring_seeds_share_nothing_here(self):
        first, second = (
            {p.question for p in reasoning_gym_problems(CHEAP, seed=seed, count=60, split="train")}
            for seed in (42, 43)
        )
        assert not first & second

    def test_splits_are_disjoint(self):
        tasks = (*CHEAP, "number_sequence")
        sets = {s: reasoning_gym_problems(tasks, seed=0, count=45, split=s) for s in SHARES}
        assert_disjoint(**sets)
        for split, problems in sets.items():
            assert len(problems) == 45
            assert {split_of(problem.signature) for problem in problems} == {split}

    def test_the_default_tasks_have_integer_answers_and_full_scores(self):
        problems = reasoning_gym_problems(seed=0, count=48, split="train")
        assert [p.provenance.family for p in problems[:8]] == list(INTEGER_TASKS)
        for problem in problems:
            assert problem.answer.removeprefix("-").isdigit(), problem
            assert score_exact(problem, problem.answer)
            assert not score_exact(problem, str(int(problem.answer) + 1))

    def test_partial_credit_is_no_credit(self):
        problem = reasoning_gym_problems(CHEAP, seed=0, count=1, split="train")[0]
        dataset = adapter._dataset(problem.provenance.family, problem.provenance.seed)
        hedged = f"{problem.answer} or 7"
        assert 0 < dataset.score_answer(hedged, dataset[problem.provenance.index]) < 1
        assert not score_exact(problem, hedged)

    def test_the_same_arguments_give_the_same_problems(self):
        long = reasoning_gym_problems(CHEAP, seed=3, count=20, split="rl")
        assert reasoning_gym_problems(CHEAP, seed=3, count=20, split="rl") == long
        assert reasoning_gym_problems(CHEAP, seed=3, count=8, split="rl") == long[:8]

    def test_impossible_requests_are_refused(self):
        with pytest.raises(DataError, match="did you mean 'chain_sum'"):
            reasoning_gym_problems(["chainsum"], seed=0, count=1, split="train")
        with pytest.raises(DataError, match="no reasoning-gym tasks"):
            reasoning_gym_problems([], seed=0, count=1, split="train")
        with pytest.raises(DataError, match="seed -1"):
            reasoning_gym_problems(CHEAP, seed=-1, count=1, split="train")
        with pytest.raises(DataError, match="cannot draw 1000000"):
            reasoning_gym_problems(CHEAP, seed=0, count=1_000_000, split="train")

    def test_a_problem_of_another_source_is_refused(self):
        problem = reasoning_gym_problems(CHEAP, seed=0, count=1, split="train")[0]
        foreign = replace(problem, provenance=replace(problem.provenance, source="elsewhere"))
        with pytest.raises(DataError, match="cannot be scored by reasoning-gym"):
            score_exact(foreign, "1")
