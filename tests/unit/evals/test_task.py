"""Evaluation end to end on scripted replies, and the record it leaves."""

import json

import pytest

from phikit.base.errors import DataError
from phikit.evals import stats
from phikit.evals.scorer import math_scorer
from phikit.evals.task import EvalResult, Task, evaluate
from phikit.evals.transcripts import render_transcript, transcripts, write_transcripts


@pytest.fixture
def result(problem, reply):
    problems = [
        problem("1 + 1?", "2", steps=1, family="sums"),
        problem("2 * 3 + 1?", "7", steps=2, family="products"),
        problem("<b>long</b>?", "5", steps=2, family="sums"),
    ]
    script = {
        "1 + 1?": [reply(r"\boxed{2}", thinking="1 + 1 = 2"), reply(r"so \boxed{3}")],
        "2 * 3 + 1?": [reply(r"\boxed{7}"), reply(r"\boxed{7}")],
        "<b>long</b>?": [reply("five"), reply("", finished=False, error="600 tokens of 512")],
    }
    return evaluate(Task("t", problems, lambda ps: [script[p.question] for p in ps], math_scorer()))


def test_the_summary_counts_every_reply_once(result):
    assert result.accuracy.mean == pytest.approx(0.5) and result.accuracy.n == 3
    assert result.statuses == {"correct": 3, "wrong": 1, "unparsed": 1, "truncated": 0, "error": 1}
    assert sum(result.statuses.values()) == 6
    assert {steps: cell.mean for steps, cell in result.by_steps().items()} == {"1": 0.5, "2": 0.5}
    assert {name: cell.n for name, cell in result.by_family().items()} == {"products": 1, "sums": 2}
    assert result.mean_tokens == pytest.approx((1 + 2 + 1 + 1 + 1 + 0) / 6)


def test_groups_recompose_the_whole(result):
    for groups in (result.by_steps(), result.by_family()):
        weighted = sum(cell.mean * cell.n for cell in groups.values())
        assert weighted / sum(cell.n for cell in groups.values()) == pytest.approx(
            result.accuracy.mean
        )


def test_the_record_survives_json(result):
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert EvalResult.from_dict(plain) == result
    plain["records"][0]["colour"] = "red"
    with pytest.raises(DataError, match="colour"):
        EvalResult.from_dict(plain)
    with pytest.raises(DataError, match="records"):
        EvalResult.from_dict({"task": "t"})


def test_the_record_feeds_the_statistics(result):
    assert stats.paired_difference(result.scores(), result.scores()).delta == 0.0
    assert stats.maj_at_n(result.votes()).mean == pytest.approx((0.5 + 1 + 0) / 3)
    assert stats.pass_at(result.outcomes(), 2).mean == pytest.approx(2 / 3)  # type: ignore[arg-type]


def test_the_order_of_problems_does_not_change_a_record(problem, reply):
    problems = [problem(f"{i}?", str(i), steps=i % 3) for i in range(6)]

    def solver(asked):
        return [[reply(rf"\boxed{{{int(p.answer) % 4}}}")] for p in asked]

    forward = evaluate(Task("t", problems, solver, math_scorer()))
    backward = evaluate(Task("t", problems[::-1], solver, math_scorer()))
    assert forward.records == backward.records[::-1]
    assert forward.summary() == backward.summary()


def test_a_solver_that_loses_a_problem_is_a_bug(problem):
    with pytest.raises(AssertionError):
        evaluate(Task("t", [problem("a", "1")], lambda _: [], math_scorer()))


def test_a_task_without_problems_is_refused():
    with pytest.raises(DataError, match="'t' has no problems"):
        evaluate(Task("t", [], lambda _: [], math_scorer()))


def test_transcripts_show_each_status_and_keep_the_text(result, tmp_path):
    kept = transcripts(result, per_status=1)
    assert [t.status for t in kept] == ["correct", "wrong", "unparsed", "error"]
    assert len(transcripts(result)) == 6
    text = render_transcript(kept[0])
    assert "Thinking\n1 + 1 = 2" in text and r"\boxed{2}" in text and "gold: 2" in text
    write_transcripts(tmp_path / "t.txt", kept)
    written = (tmp_path / "t.txt").read_text()
    assert "<b>long</b>?" in written and "reason: 600 tokens of 512" in written
