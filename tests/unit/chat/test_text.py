"""Checkpoints without a chat template go on with text and refuse to converse."""

import pytest

from phikit.base.errors import ChatError
from phikit.chat.message import Message
from phikit.chat.render import NANO_SPECIALS, renderer_for
from phikit.chat.text import TextRenderer
from phikit.chat.tokenizer import train_tokenizer
from phikit.weights.load import Loaded, load
from phikit.weights.save import save


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from"] * 3, size=263, specials=NANO_SPECIALS)


def test_a_conversation_is_refused(tokenizer):
    renderer = TextRenderer(tokenizer)
    for render in (renderer.prompt, renderer.example):
        with pytest.raises(ChatError, match="no chat template.*\n.*give text"):
            render([Message("user", "one")])


def test_a_text_ends_at_its_stop_token(tokenizer):
    renderer = TextRenderer(tokenizer, end="<|end|>")
    assert renderer.stop_ids == (tokenizer.special("<|end|>"),)
    assert TextRenderer(tokenizer, end="<|none|>").stop_ids == (tokenizer.special("<|endoftext|>"),)
    reply = [*tokenizer.encode("a b"), *renderer.stop_ids, *tokenizer.encode("c")]
    assert renderer.parse(reply) == Message("assistant", "a b")
    assert renderer.parse(tokenizer.encode("a b")) == Message("assistant", "a b")


def test_a_folder_without_a_template(tokenizer, tiny_model, tmp_path):
    """Loads as a text model, and stays one when it is saved again."""
    save(tmp_path / "chat", Loaded(tiny_model(), tokenizer, renderer_for(tokenizer, "phi4-mini")))
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    (tmp_path / "chat" / "tokenizer_config.json").write_text("{}")
    base = load(tmp_path / "chat")
    assert isinstance(base.renderer, TextRenderer)
    save(tmp_path / "again", base)
    assert not (tmp_path / "again" / "chat_template.jinja").exists()
    assert isinstance(load(tmp_path / "again").renderer, TextRenderer)
