"""Pieces of a growing reply, put together, are what `parse` says of the whole."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer, train_tokenizer
from phikit.generate.language_model import cut_message
from phikit.generate.reply import ReplyReader, token_text

SPECIALS = {
    "phi4-mini": (
        "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|> <|tool|> <|/tool|> "
        "<|tool_call|> <|/tool_call|>"
    ),
    "phi4-mini marked": (
        "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|> <|tool|> <|/tool|> "
        "<|tool_call|> <|/tool_call|> <think> </think>"
    ),
    "smollm2": "<|endoftext|> <|im_start|> <|im_end|>",
    "phi3": "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
}
TEXTS = (
    "<think>",
    "\n",
    "</think>",
    "</thi",
    "Is it 12? Yé 😀 it is.",
    '[{"name": "add", "arguments": {"a": 1}}]',
    "{",
    "<|end",
    " ",
)


@pytest.fixture(scope="module", params=list(SPECIALS))
def loaded(request) -> Any:
    tokenizer = train_tokenizer(
        ["Is it 12? Yes, it is.\n", "Ans is 19 here."],
        size=270,
        specials=SPECIALS[request.param].split(),
    )
    renderer = renderer_for(tokenizer, request.param.split()[0])
    return SimpleNamespace(tokenizer=tokenizer, renderer=renderer)


def pieces_of(tokenizer: Tokenizer):
    special = st.sampled_from(sorted(tokenizer.specials.values())).map(lambda id_: [id_])
    text = st.sampled_from(TEXTS).map(tokenizer.encode)
    byte = st.integers(0, tokenizer.size - 1).map(lambda id_: [id_])
    return st.lists(st.one_of(special, text, text, byte), max_size=12).map(
        lambda parts: [id_ for part in parts for id_ in part]
    )


@pytest.mark.parametrize("strings", [(), ("12?", "</think>\nI", "a")])
def test_pieces_join_to_what_parse_says(loaded, strings):
    @settings(max_examples=50)
    @given(tokens=pieces_of(loaded.tokenizer))
    def check(tokens):
        reader = ReplyReader(cast(Any, loaded), strings=strings)
        shown = [reader.push(token) for token in tokens]
        last, message = reader.finish()
        assert message == cut_message(loaded.renderer.parse(tokens), strings)
        thinking = "".join(piece.thinking for piece in [*shown, last])
        content = "".join(piece.content for piece in [*shown, last])
        assert thinking == (message.thinking or "")
        if message.note is None:
            assert content == message.content
        else:  # the text of a call that nobody can read may come at the end alone, or not
            assert message.content.startswith(content) or content == "".join(
                p.content for p in shown
            )

    check()


def test_most_of_a_reply_is_shown_at_once(loaded):
    tokens = loaded.tokenizer.encode("Is it 12? Yes, it is. 19 here.")
    reader = ReplyReader(cast(Any, loaded))
    early = "".join(reader.push(token).content for token in tokens)
    assert len(early) >= len("Is it 12? Yes, it is. 19 here.") - 1


def test_bare_text_has_no_tags(loaded):
    tokens = loaded.tokenizer.encode("<think>no</think> 12")
    reader = ReplyReader(cast(Any, loaded), is_chat=False)
    shown = "".join(reader.push(token).content for token in tokens)
    last, message = reader.finish()
    assert shown + last.content == message.content == "<think>no</think> 12"


def test_the_text_of_a_token_keeps_its_space(loaded):
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode("Is it 12")
    assert "".join(token_text(tokenizer, id_) for id_ in ids) == "Is it 12"
    assert token_text(tokenizer, tokenizer.special("<|endoftext|>")) == "<|endoftext|>"
