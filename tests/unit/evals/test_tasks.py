"""The table of tasks: held-out, reproducible, answerable by the gold answers."""

import json

import pytest

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data.problem import assert_disjoint
from phikit.data.procedural import generate
from phikit.evals.scorer import math_scorer
from phikit.evals.task import Task, evaluate
from phikit.evals.tasks import TASKS, task_problems
from phikit.solve.solver import Reply


@pytest.fixture(params=sorted(TASKS))
def drawn(request, tmp_path):
    path = None
    if request.param == "transfer":
        pytest.importorskip("reasoning_gym", reason="needs the extra `eval`")
    if request.param == "jsonl":
        path = tmp_path / "mine.jsonl"
        rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(30)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return task_problems(request.param, count=24, path=path)


def test_the_gold_answers_score_as_correct(drawn):
    def oracle(problems):
        return [
            [Reply(Message("assistant", rf"\boxed{{{p.answer}}}"), [1], [0.0], True)]
            for p in problems
        ]

    result = evaluate(Task("oracle", drawn, oracle, math_scorer()))
    assert result.accuracy == (1.0, 0.0, 24)


def test_problems_are_distinct(drawn):
    assert len({problem.content_hash for problem in drawn}) == 24


def test_procedural_problems_are_reproducible_and_never_trained_on():
    drawn = task_problems("procedural", count=60, seed=1)
    assert drawn == task_problems("procedural", count=60, seed=1)
    assert_disjoint(test=drawn, train=generate(seed=1, count=60, split="train"))


def test_a_file_is_for_the_task_that_reads_one(tmp_path):
    with pytest.raises(DataError, match="needs a file"):
        task_problems("jsonl", count=1)
    with pytest.raises(DataError, match="takes no file"):
        task_problems("procedural", count=1, path=tmp_path)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'procedural'"):
        task_problems("procedure", count=1)
