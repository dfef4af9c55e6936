import pytest

from phikit.base.errors import ChatError
from phikit.chat.chatml import SMOLLM2_SYSTEM, ChatMLRenderer
from phikit.chat.message import Message
from phikit.chat.phi import PhiRenderer
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer

ASK = Message("user", "What is 1 + 2?")
REPLY = Message("assistant", "3", thinking="1 + 2 = 3")


def text(tokenizer: Tokenizer, ids) -> str:
    return tokenizer.decode(ids, keep_special=True)


def test_phi_text_and_mask(nano_tokenizer: Tokenizer):
    renderer = PhiRenderer(nano_tokenizer)
    example = renderer.example([Message("system", "Be brief."), ASK, REPLY])
    assert text(nano_tokenizer, example.tokens) == (
        "<|system|>Be brief.<|end|><|user|>What is 1 + 2?<|end|>"
        "<|assistant|><think>\n1 + 2 = 3\n</think>\n3<|end|>"
    )
    learnt = text(nano_tokenizer, example.tokens[example.loss_mask])
    assert learnt == "<think>\n1 + 2 = 3\n</think>\n3<|end|>"
    assert example.tokens[example.loss_mask][0] == nano_tokenizer.special("<think>")


def test_chatml_text_mask_and_default_system(chatml_tokenizer: Tokenizer):
    renderer = ChatMLRenderer(chatml_tokenizer)
    example = renderer.example([ASK, REPLY])
    assert text(chatml_tokenizer, example.tokens) == (
        f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n1 + 2 = 3\n</think>\n3<|im_end|>\n"
    )
    learnt = text(chatml_tokenizer, example.tokens[example.loss_mask])
    assert learnt == "<think>\n1 + 2 = 3\n</think>\n3<|im_end|>"


def test_own_system_message_and_no_default(chatml_tokenizer: Tokenizer):
    own = ChatMLRenderer(chatml_tokenizer).prompt([Message("system", "x"), ASK])
    assert text(chatml_tokenizer, own).startswith("<|im_start|>system\nx<|im_end|>")
    bare = ChatMLRenderer(chatml_tokenizer, default_system=None).prompt([ASK])
    assert text(chatml_tokenizer, bare).startswith("<|im_start|>user\n")


def test_parse_of_an_unfinished_thought(nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer):
    marked = [nano_tokenizer.special("<think>"), *nano_tokenizer.encode("\n1 + 2")]
    written = chatml_tokenizer.encode("<think>\n1 + 2")
    cut = Message("assistant", "", thinking="1 + 2")
    assert PhiRenderer(nano_tokenizer).parse(marked) == cut
    assert ChatMLRenderer(chatml_tokenizer).parse(written) == cut


def test_parse_stops_at_the_first_stop_token(nano_tokenizer: Tokenizer):
    renderer = PhiRenderer(nano_tokenizer)
    ids = [*nano_tokenizer.encode("3"), renderer.stop_ids[1], *nano_tokenizer.encode("junk")]
    assert renderer.parse(ids) == Message("assistant", "3")
    assert renderer.parse([]) == Message("assistant", "")


def test_conversations_that_make_no_sense(nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    with pytest.raises(ChatError, match="empty"):
        renderer.prompt([])
    with pytest.raises(ChatError, match="nothing is left to answer"):
        renderer.prompt([ASK, REPLY])
    with pytest.raises(ChatError, match="nothing to learn"):
        renderer.example([ASK])
    with pytest.raises(ChatError, match="only the assistant thinks"):
        renderer.prompt([Message("user", "a", thinking="b")])
    with pytest.raises(ChatError, match=r"no special token '<\|tool\|>'"):
        renderer.prompt([ASK, REPLY, Message("tool", "3")])
    with pytest.raises(ChatError, match="cannot tell"):
        renderer_for(chatml_tokenizer, "smollm2").example(
            [ASK, Message("assistant", "a", thinking="</think>")]
        )


def test_renderer_for_refuses_misfits(nano_tokenizer: Tokenizer):
    with pytest.raises(ChatError, match="unknown renderer 'phi5'"):
        renderer_for(nano_tokenizer, "phi5")
    with pytest.raises(ChatError, match=r"no special token '<\|im_start\|>'"):
        renderer_for(nano_tokenizer, "smollm2")
