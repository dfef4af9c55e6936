"""What each Phi model line writes, and the tokens that end its replies."""

from pathlib import Path

import pytest
import tokenizers
from tests.unit.chat.vocabularies import PHI4_MINI, llama_bpe, real_json, small
from tokenizers import AddedToken

from phikit.base.errors import ChatError
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer

REASONING = Path(__file__).parents[2] / "data" / "templates" / "phi4-reasoning.jinja"
SYSTEM, ASK = Message("system", "s"), Message("user", " u")
REPLY = Message("assistant", "3", thinking="1 + 2")


def text(kind: str, ids) -> str:
    return small(kind).decode(ids, keep_special=True)


def test_phi3_tokens_swallow_the_newlines_of_its_template():
    tokenizer = small("phi3")
    prompt = renderer_for(tokenizer, "phi3").prompt([SYSTEM, ASK])
    special = tokenizer.special
    assert prompt == [
        *[special("<|system|>"), *tokenizer.encode("s"), special("<|end|>")],
        *[special("<|user|>"), *tokenizer.encode("u"), special("<|end|>")],
        special("<|assistant|>"),
    ]


def test_phi3_on_a_tokenizer_that_keeps_newlines():
    """A reply then reads on from the newline, and is parsed as it reads on."""
    tokenizer = Tokenizer(llama_bpe(["a b c"], specials=PHI4_MINI, rstrip=False))
    renderer = renderer_for(tokenizer, "phi3")
    said = Message("assistant", "  two  spaces")
    example = renderer.example([ASK, said])
    assert renderer.parse(example.tokens[example.loss_mask].tolist()) == said
    assert tokenizer.decode(example.tokens.tolist()).endswith("\n  two  spaces \n")


def test_phi3_small_begins_with_the_end_of_text():
    prompt = renderer_for(small("phi3-small"), "phi3-small").prompt([SYSTEM, ASK])
    assert text("phi3-small", prompt) == (
        "<|endoftext|><|system|>\ns<|end|>\n<|user|>\n u<|end|>\n<|assistant|>\n"
    )


def test_system_messages_that_phi3_has_no_turn_for():
    empty = [Message("system", ""), ASK]
    tokenizer = small("phi3")
    with_turn = renderer_for(tokenizer, "phi3").prompt(empty)
    for name in ("phi3.5", "phi3-medium"):
        assert renderer_for(tokenizer, name).prompt(empty) == with_turn[2:]
    with pytest.raises(ChatError, match="phi3-medium has no system turns"):
        renderer_for(tokenizer, "phi3-medium").prompt([SYSTEM, ASK])
    with pytest.raises(ChatError, match="phi3 has no tool turns"):
        renderer_for(tokenizer, "phi3").prompt([Message("tool", "3")])


def test_phi4_mini_reasoning_has_one_system_turn():
    renderer = renderer_for(small("phi4-mini"), "phi4-mini-reasoning")
    identity = "<|system|>Your name is Phi, an AI math expert developed by Microsoft."
    assert text("phi4-mini", renderer.prompt([ASK])) == (
        identity + "<|end|><|user|> u<|end|><|assistant|>"
    )
    assert text("phi4-mini", renderer.prompt([SYSTEM, ASK, SYSTEM])) == (
        identity + " s s<|end|><|user|> u<|end|><|assistant|>"
    )
    example = renderer.example([ASK, REPLY])
    learnt = example.tokens[example.loss_mask].tolist()
    assert text("phi4-mini", learnt) == "<think>\n1 + 2\n</think>\n3<|end|>"
    assert renderer.parse(learnt) == REPLY


def test_phi4_reasoning_opens_with_the_text_of_its_template():
    tokenizer = small("phi4-reasoning")
    renderer = renderer_for(tokenizer, "phi4-reasoning", template=REASONING.read_text())
    prompt = renderer.prompt([ASK])
    opening = REASONING.read_text().split("<|im_end|>")[0]
    assert text("phi4-reasoning", prompt).startswith(opening.replace("<think> {", "<think>{")[:40])
    assert prompt.count(tokenizer.special("<think>")) == 1
    fixed = opening.removeprefix("<|im_start|>system<|im_sep|>")
    assert renderer.prompt([Message("system", fixed), ASK]) == prompt
    with pytest.raises(ChatError, match="its own system text"):
        renderer.prompt([SYSTEM, ASK])
    example = renderer.example([ASK, REPLY])
    learnt = example.tokens[example.loss_mask].tolist()
    assert learnt[0] == tokenizer.special("<think>")
    assert renderer.parse(learnt) == REPLY


def test_phi4_reasoning_needs_its_template():
    with pytest.raises(ChatError, match="there is none"):
        renderer_for(small("phi4"), "phi4-reasoning")
    with pytest.raises(ChatError, match="opens with no system text"):
        renderer_for(small("phi4"), "phi4-reasoning", template="{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("kind", "name", "stops"),
    [
        ("phi3", "phi3", ["<|end|>", "<|assistant|>", "<|endoftext|>"]),
        ("phi4", "phi4", ["<|im_end|>", "<|endoftext|>"]),
        ("phi4-mini", "phi4-mini", ["<|end|>", "<|endoftext|>"]),
        ("chatml", "smollm2", ["<|im_end|>", "<|endoftext|>"]),
    ],
)
def test_stop_tokens(kind: str, name: str, stops: list[str]):
    renderer = renderer_for(small(kind), name)
    assert renderer.stop_ids == tuple(small(kind).special(stop) for stop in stops)


def test_phi3_ids_on_a_vocabulary_of_its_size():
    """The special tokens that Phi-3 adds to 32,000 have its published ids and habits."""
    inner = tokenizers.Tokenizer.from_str(real_json("llama_bpe").read_text(encoding="utf-8"))
    names = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{n}|>" for n in range(1, 5))]
    names += ["<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    inner.add_special_tokens(
        [AddedToken(n, special=True, normalized=False, rstrip="text" not in n) for n in names]
    )
    tokenizer = Tokenizer(inner)
    renderer = renderer_for(tokenizer, "phi3")
    assert renderer.stop_ids == (32007, 32001, 32000)
    [hello] = tokenizer.encode("Hello")
    assert renderer.prompt([Message("user", "Hello")]) == [32010, hello, 32007, 32001]
