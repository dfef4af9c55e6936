"""A stop string is found at the token that completes it, and no part of it is ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phikit.base.errors import ConfigError
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.stops import StopStrings, certain, cut, visible

STRINGS = ("\n\n", "Übung", "🙂🙃", "ab", "abc", "aab", "answer is")
TEXTS = st.text(st.sampled_from("ab c\nÜÜbung🙂🙃answer is"), max_size=40)


@given(text=TEXTS, strings=st.lists(st.sampled_from(STRINGS), min_size=1, max_size=3))
@pytest.mark.parametrize("pieces", [1, 3])
def test_it_stops_at_the_token_that_completes_a_string(
    text: str, strings: list[str], pieces: int, nano_tokenizer: Tokenizer
):
    """Against decoding everything each time; in single bytes, and as the text is encoded."""
    tokenizer = nano_tokenizer
    if pieces == 1:
        tokens = [id_ for byte in text.encode() for id_ in byte_tokens(tokenizer, byte)]
    else:
        tokens = tokenizer.encode(text)
    stops = StopStrings(tokenizer, strings)
    for end in range(len(tokens) + 1):
        whole = tokenizer.decode(tokens[:end])
        found = any(string in whole for string in strings)
        assert stops(tokens[:end]) == found
        if found:
            break


def byte_tokens(tokenizer: Tokenizer, byte: int) -> list[int]:
    """The token of a single byte, by the table of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    id_ = tokenizer._inner.token_to_id(bytes_to_unicode()[byte])
    return [] if id_ is None else [id_]


def test_special_tokens_and_padding_ids_are_no_text(nano_tokenizer: Tokenizer):
    stops = StopStrings(nano_tokenizer, ["a b"])
    special, beyond = nano_tokenizer.special("<think>"), nano_tokenizer.size + 5
    [a], [b] = nano_tokenizer.encode("a"), nano_tokenizer.encode(" b")[-1:]
    space = nano_tokenizer.encode(" b")[:-1]
    assert stops([a, *[special, beyond] * 20, *space, *[special] * 20, b])
    assert not stops([a, *[special] * 20])


def test_its_look_back_is_bounded(nano_tokenizer: Tokenizer):
    stops = StopStrings(nano_tokenizer, ["stop"])
    tokens = nano_tokenizer.encode("What is 12 + 7? " * 500)
    assert len(tokens) - stops._start(tokens) == 5


def test_empty_strings_are_refused(nano_tokenizer: Tokenizer):
    for strings in ([], [""], ["a", ""]):
        with pytest.raises(ConfigError, match="stop is"):
            StopStrings(nano_tokenizer, strings)


def test_cut_is_at_the_first_of_all():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one two", ["three"]) == "one two"
    assert cut("one two", []) == "one two"
    assert cut("aab", ["ab", "aab"]) == ""


def test_an_end_that_may_become_a_string_is_held_back():
    assert certain("12\n", ["\n\n"]) == "12"
    assert certain("12\n3", ["\n\n"]) == "12\n3"
    assert certain("so ans", ["answer", "sold"]) == "so "
    assert certain("caf\ufffd", []) == "caf"
    assert visible("12\n\n3", ["\n\n"]) == "12"
    assert visible("12 <thi", []) == "12 "
    assert visible("12 <thi", [], tags=()) == "12 <thi"


@given(text=TEXTS, strings=st.lists(st.sampled_from(STRINGS), max_size=3))
def test_what_is_shown_only_grows_and_never_shows_a_stop_string(text: str, strings: list[str]):
    final, shown = cut(text, strings), ""
    for end in range(len(text) + 1):
        now = visible(text[:end], strings)
        assert now.startswith(shown)
        assert final.startswith(now)
        shown = now
    assert final.startswith(shown)
