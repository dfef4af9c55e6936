"""Against values worked out by hand."""

import pytest

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data.problem import Problem, Provenance
from phikit.evals.metrics import (
    anls,
    character_error_rate,
    choice_of,
    exact_match,
    metric_scorer,
    multiple_choice,
    normalise_speech,
    relaxed_accuracy,
    word_error_rate,
)
from phikit.solve.solver import Reply


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Don't STOP!", "dont stop"),
        ("  well-known,  e.g. [noise] (laughs) <unk> this ", "well known e g this"),
        ("Ｆｕｌｌ width café", "full width café"),
        ("3.5 % of $4", "3 5 of 4"),
        ("...", ""),
    ],
)
def test_transcripts_are_normalised(text: str, normal: str):
    assert normalise_speech(text) == normal
    assert normalise_speech(normal) == normal


def test_word_error_rate():
    # One substitution, one deletion and one insertion in 4 + 2 words.
    references = ["the cat sat down", "go on"]
    replies = ["the bat sat", "Go on, now"]
    assert word_error_rate(references, replies) == pytest.approx(3 / 6)
    assert word_error_rate(references, references) == 0
    assert word_error_rate(["one"], [""]) == 1
    assert word_error_rate(["one"], ["two three four"]) == 3
    assert word_error_rate(["Hi."], ["hi"], normalise=str.strip) == 1


def test_character_error_rate():
    # "kitten" to "sitting": two substitutions and one insertion, of 6; and 4 right ones.
    assert character_error_rate(["kitten"], ["sitting"]) == pytest.approx(3 / 6)
    assert character_error_rate(["kitten", "Abcd"], ["sitting", "Abcd"]) == pytest.approx(3 / 10)
    assert character_error_rate(["Abcd"], ["abcd"]) == pytest.approx(1 / 4)
    assert character_error_rate(["a b"], ["ab"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("rate", [word_error_rate, character_error_rate])
def test_rates_of_nothing_are_refused(rate):
    with pytest.raises(DataError, match="2 references and 1 replies"):
        rate(["a", "b"], ["a"])
    with pytest.raises(DataError, match="reference 1 has no words"):
        rate(["a", "  "], ["a", "b"])
    with pytest.raises(DataError, match="there are no words"):
        rate([], [])


@pytest.mark.parametrize(
    ("reference", "reply", "is_right"),
    [("Paris", " paris. ", 1), ("New  York", "new york", 1), ("7", "7.0", 0), ("a", "a b", 0)],
)
def test_exact_match(reference: str, reply: str, is_right: int):
    assert exact_match(reference, reply) == is_right


@pytest.mark.parametrize(
    ("reference", "reply", "is_right"),
    [
        ("100", "105", 1),
        ("100", "95", 1),
        ("100", "105.1", 0),
        ("100", "94.9", 0),
        ("1,000", "1,040", 1),
        ("50%", "0.51", 1),
        ("50%", "50", 0),
        ("$3.20", "3.3", 1),
        ("0", "0.0", 1),
        ("0", "0.001", 0),
        ("-20", "-21", 1),
        ("-20", "20", 0),
        ("7", "about 7", 0),
        ("A", "a", 1),
        ("A", "B", 0),
        ("12", "", 0),
    ],
)
def test_relaxed_accuracy(reference: str, reply: str, is_right: int):
    assert relaxed_accuracy(reference, reply) == is_right


def test_anls():
    assert anls("Hello", "hello") == 1
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert anls("abcd", "abxy") == pytest.approx(0.5)
    assert anls("abcd", "axyz") == 0  # a similarity of 1/4 lies below the threshold
    assert anls(["abcd", "axyz"], "axyz") == 1
    assert anls("abc", "") == 0
    assert anls([], "abc") == 0


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("B. a dog", "B"),
        ("B) a dog", "B"),
        ("The answer is B.", "B"),
        ("The answer is B, not A? No: A", "A"),
        ("I think C", "C"),
        ("none of them", None),
        ("", None),
    ],
)
def test_multiple_choice(reply: str, letter: str | None):
    assert choice_of(reply) == letter
    assert multiple_choice("b", reply) == (letter == "B")


def test_metrics_judge_replies():
    nowhere = Provenance("test", "", "", "test", "test", "1", 0, 0)
    problem = Problem("?", "100", None, None, None, "s", nowhere)
    replies = [
        Reply(Message("assistant", "103"), [1], [0.0], True),
        Reply(Message("assistant", "90"), [1], [0.0], True),
        Reply(Message("assistant", "100"), [1], [0.0], False),
        Reply(Message("assistant", " "), [1], [0.0], True),
        Reply(Message("assistant", ""), [], [], True, error="too long"),
    ]
    scores = metric_scorer(relaxed_accuracy)([(problem, reply) for reply in replies])
    assert [score.status for score in scores] == [
        "correct", "wrong", "truncated", "unparsed", "error",
    ]  # fmt: skip
    near = metric_scorer(anls, at_least=0.6)([(problem, replies[0])])
    assert near[0].value == 1 and near[0].extracted == "103"
