"""The five statuses, and that they never fold into one another."""

import pytest

from phikit.evals.scorer import STATUSES, Score, math_scorer
from phikit.evals.verify import Verifier


def score_one(scorer, problem, reply):
    (score,) = scorer([(problem, reply)])
    return score


def test_each_status(problem, reply):
    scorer, seven = math_scorer(), problem("3 + 4?", "7")
    assert score_one(scorer, seven, reply(r"\boxed{7}")) == Score("correct", "7")
    assert score_one(scorer, seven, reply(r"\boxed{8}")) == Score("wrong", "8")
    assert score_one(scorer, seven, reply("seven, or 7")) == Score("unparsed")
    assert score_one(scorer, seven, reply(r"\boxed{7}", finished=False)) == Score("truncated", "7")
    no_reply = reply("", finished=False, error="612 tokens, context 512")
    assert score_one(scorer, seven, no_reply) == Score("error", None, "612 tokens, context 512")


def test_only_correct_is_worth_anything():
    assert [Score(status).value for status in STATUSES] == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_box_in_the_thinking_does_not_count(problem, reply):
    thought = reply("I do not know", thinking=r"\boxed{7}")
    assert score_one(math_scorer(), problem("3 + 4?", "7"), thought).status == "unparsed"


def test_lenient_reads_the_last_number_and_strict_does_not(problem, reply):
    seven, text = problem("3 + 4?", "7"), reply("3 and 4 make 7.")
    assert score_one(math_scorer(lenient=True), seven, text) == Score("correct", "7")
    assert score_one(math_scorer(), seven, text) == Score("unparsed")


def test_without_a_verifier_only_arithmetic_counts(problem, reply):
    root = problem("root of 8?", r"2\sqrt{2}")
    assert score_one(math_scorer(), root, reply(r"\boxed{\sqrt{8}}")).status == "wrong"


def test_scores_keep_the_order_of_their_pairs(problem, reply):
    pairs = [
        (problem(f"{i}?", str(i)), reply(text))
        for i in range(4)
        for text in (rf"\boxed{{{i}}}", "nothing", r"\boxed{9}")
    ]
    statuses = [score.status for score in math_scorer()(pairs)]
    assert statuses == ["correct", "unparsed", "wrong"] * 4
    assert math_scorer()([]) == []


def test_a_comparison_that_times_out_is_an_error_and_not_a_wrong_answer(problem, reply):
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    with Verifier(timeout_s=2.0) as verifier:
        scorer = math_scorer(verifier=verifier)
        bomb, fine = reply(r"\boxed{9^{9^{9^{9}}}}"), reply(r"\boxed{\sqrt{8}}")
        scores = scorer([(problem("a", "9"), bomb), (problem("b", r"2\sqrt{2}"), fine)])
    assert scores[0] == Score("error", "9^{9^{9^{9}}}", "timed out after 2 s")
    assert scores[1].status == "correct"
