"""What can be done in a conversation besides asking, and what of it is written down."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from phikit.base.errors import ChatError
from phikit.chat.history import History, Recorder
from phikit.chat.message import Message
from phikit.cli.conversation import Conversation, Exchange, Settings, _messages
from phikit.generate.engine import Engine
from phikit.generate.language_model import of
from phikit.generate.speculate import PromptLookup
from phikit.weights.load import Loaded


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[History]:
    monkeypatch.delenv("PHIKIT_HISTORY")
    opened = History(tmp_path / "history")
    yield opened
    opened.close()


def talk(loaded: Loaded, history: History | None = None, **more) -> Conversation:
    recorder = None
    if history is not None:
        recorder = Recorder(model="m", source="chat", warn=pytest.fail, history=history)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    settings = Settings(temperature=1.0, max_new_tokens=6)
    return Conversation(loaded, settings, console=console, recorder=recorder, **more)


def contents(history: History, number: int = 0) -> list[str]:
    turns = history.turns(history.conversations()[number].id)
    return [turn.message.content for turn in turns]


def test_undo_and_retry_here_and_in_the_history(loaded: Loaded, history: History):
    conversation = talk(loaded, history)
    for command in ("/undo", "/retry", "/think"):
        with pytest.raises(ChatError, match="nothing"):
            conversation.take(command)
    conversation.take("one")
    conversation.take("two")
    said = [turn.content for turn in conversation.turns]
    assert contents(history) == said
    conversation.take("/retry")
    again = [turn.content for turn in conversation.turns]
    assert again[:3] == said[:3] and again[3] != said[3]
    conversation.take("/undo")
    assert contents(history) == [turn.content for turn in conversation.turns] == said[:2]
    conversation.take("/reset")
    conversation.take("/system Be brief.")
    conversation.take("three")
    assert [c.turns for c in history.conversations()] == [3, 2]
    assert contents(history)[:2] == ["Be brief.", "three"]


def test_a_reply_is_kept_with_how_it_was_made(loaded: Loaded, history: History):
    conversation = talk(loaded, history)
    conversation.take("/set top_k 5")
    conversation.take("Hello")
    question, reply = history.turns(history.conversations()[0].id)
    assert question.settings == {}
    assert reply.settings["top_k"] == 5 and reply.settings["temperature"] == 1.0
    assert reply.finish_reason in ("stop", "length")
    assert reply.tokens and reply.prompt_tokens and reply.seconds


def test_ctrl_c_keeps_what_was_said(loaded: Loaded, history: History, monkeypatch):
    conversation = talk(loaded, history)

    def stream(request):
        yield from conversation_tokens
        raise KeyboardInterrupt

    conversation_tokens = loaded.tokenizer.encode("What is")
    monkeypatch.setattr(conversation.model.engine, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        conversation.take("Hello")
    assert conversation.turns == [Message("user", "Hello"), Message("assistant", "What is")]
    assert history.turns(history.conversations()[0].id)[1].finish_reason == "cancelled"
    conversation_tokens = []
    with pytest.raises(KeyboardInterrupt):
        conversation.take("Nothing came")
    assert len(conversation.turns) == 2 == history.conversations()[0].turns


def test_set_changes_and_refuses(loaded: Loaded):
    conversation = talk(loaded)
    for line in ("top_p 0.5", "min_p 0.1", "max_new_tokens 3", "seed 7", "top_k 3", "top_k off"):
        conversation.take(f"/set {line}")
    request = conversation._request([Message("user", "Hello")])
    found = (request.top_p, request.min_p, request.max_new_tokens, request.seed, request.top_k)
    assert found == (0.5, 0.1, 3, 7, None)
    for line in ("top_p 2", "temperature off", "seed x", "top_q 1", "max_new_tokens 0"):
        with pytest.raises(ChatError):
            conversation.take(f"/set {line}")
    conversation.take("/set")
    assert isinstance(conversation.console.file, io.StringIO)
    assert "top_p 0.5" in conversation.console.file.getvalue()


def test_media_are_numbered_through_the_conversation():
    reply = Message("assistant", "yes")
    exchanges = [
        Exchange("a", ("1.png", "2.png"), (), reply),
        Exchange("b", (), ("1.wav",), reply),
        Exchange("c", ("3.png",), ("2.wav",), reply),
    ]
    assert [message.content for message in _messages(exchanges)[::2]] == [
        "<|image_1|><|image_2|>a",
        "<|audio_1|>b",
        "<|image_3|><|audio_2|>c",
    ]


def test_a_file_that_cannot_be_shown_is_not_shown_again(loaded: Loaded, tmp_path: Path):
    conversation = talk(loaded)
    with pytest.raises(ChatError, match="there is no file"):
        conversation.take("/image nowhere.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    conversation.take(f"/image {tmp_path / 'a.png'}")
    with pytest.raises(ChatError, match="text only"):
        conversation.take("What is this?")
    assert conversation.take("Hello") and len(conversation.turns) == 2


def test_model_goes_on_with_another(loaded: Loaded, history: History):
    names = []

    def load(name: str) -> Loaded:
        names.append(name)
        return loaded

    conversation = talk(loaded, history, load=load)
    conversation.take("one")
    conversation.take("/model other")
    conversation.take("two")
    assert names == ["other"] and len(conversation.turns) == 4
    assert [turn.model for turn in history.turns(history.conversations()[0].id)][::2] == [
        "m",
        "other",
    ]
    with pytest.raises(ChatError, match="phikit ls"):
        talk(loaded).take("/model x")


def test_another_engine_gives_the_same_text(loaded: Loaded):
    plain, guessing = of(loaded), of(loaded)
    guessing.use(Engine(loaded.model, drafter=PromptLookup()))
    prompt = "What is 12 + 7? What is 12 + "
    assert plain.generate(prompt, max_new_tokens=20).tokens == (
        guessing.generate(prompt, max_new_tokens=20).tokens
    )
    assert guessing.engine.drafter is not None
