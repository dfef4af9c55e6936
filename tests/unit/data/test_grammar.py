from random import Random

import pytest

from phikit.data.procedural.grammar import capitalise_sentences, expand


def phrasings(template: str, **slots: object) -> set[str]:
    rng = Random(0)
    return {expand(template, rng, slots) for _ in range(200)}


def test_alternatives_nest_and_may_be_empty():
    assert phrasings("a{b|c{d|}}e") == {"abe", "acde", "ace"}
    assert phrasings("a|b {c|d}") == {"a", "b c", "b d"}
    assert phrasings("") == {""}


def test_alternatives_are_equally_likely():
    rng = Random(0)
    counts = [expand("{a|b|c d}", rng, {}) for _ in range(3000)]
    assert all(900 < counts.count(phrase) < 1100 for phrase in ("a", "b", "c d"))


def test_slots_are_filled():
    assert phrasings("{<he>|<who>} has <n>.", he="she", who="Ann", n=3) == {
        "she has 3.",
        "Ann has 3.",
    }
    with pytest.raises(KeyError):
        phrasings("<nobody>")


@pytest.mark.parametrize("template", ["{a", "a}", "{a|{b}", "}{"])
def test_unmatched_braces_are_refused(template: str):
    with pytest.raises(ValueError, match="brace"):
        phrasings(template)


def test_sentences_start_in_upper_case():
    assert (
        capitalise_sentences("ann has 3. she left? 7 pens. x") == "Ann has 3. She left? 7 pens. X"
    )
