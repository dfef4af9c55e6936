import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from phikit.base.errors import ChatError, ConfigError, ContextOverflowError, StorageError
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.cli.conversation import Conversation, ReplyView, Settings
from phikit.weights.load import Loaded


def silent(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def talk(loaded: Loaded, **settings: object) -> Conversation:
    values = {"temperature": 1.0, "max_new_tokens": 8} | settings
    return Conversation(loaded, Settings(**values), console=silent())  # pyright: ignore


def test_turns_are_kept_and_asked_with_only_when_it_remembers(loaded: Loaded):
    conversation = talk(loaded)
    assert conversation.take("What is 1 + 1?")
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
    assert conversation._before() == conversation.turns
    conversation.take("/memory off")
    assert conversation._before() == []
    conversation.take("/system Be brief.")
    assert conversation._before() == [Message("system", "Be brief.")]
    assert conversation.turns == []


def test_every_answer_draws_anew_and_the_seed_decides_them(loaded: Loaded):
    def said(seed: int) -> list[str]:
        conversation = talk(loaded, remembers=False, seed=seed)
        for _ in range(2):
            conversation.take("Hello")
        return [turn.content for turn in conversation.turns[1::2]]

    assert said(1) == said(1) != said(2)
    assert len(set(said(1))) == 2


def test_temperature_zero_repeats_itself(loaded: Loaded):
    conversation = talk(loaded, remembers=False)
    conversation.take("/temperature 0")
    for _ in range(2):
        conversation.take("Hello")
    assert conversation.turns[1] == conversation.turns[3]


def test_a_long_question_names_both_numbers_and_leaves_no_turn(loaded: Loaded):
    conversation = talk(loaded)
    with pytest.raises(ContextOverflowError, match=r"model's context is 160(.|\n)*shorter"):
        conversation.take("What is 12 + 7? " * 40)
    assert conversation.turns == []
    conversation.take("What is 12 + 7? " * 4)
    with pytest.raises(ContextOverflowError, match="/reset"):
        conversation.take("What is 12 + 7? " * 12)


def test_a_stop_string_ends_an_answer_and_is_not_seen(loaded: Loaded):
    free = talk(loaded, max_new_tokens=40)
    free.take("Hello")
    answer = free.turns[1].content
    stop = answer[len(answer) // 2 :][:3]
    stopped = talk(loaded, max_new_tokens=40, others={"stop": [stop]})
    stopped.take("Hello")
    assert stopped.turns[1].content == answer[: answer.index(stop)]
    assert stop not in shown(stopped.console)


def test_options_reach_the_engine(loaded: Loaded):
    options = {"top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    request = talk(loaded, others=options)._request([Message("user", "Hello")])
    assert {name: getattr(request, name) for name in options} == options
    with pytest.raises(ConfigError, match="top_p is 0"):
        talk(loaded, others={"top_p": 0.0}).take("Hello")


def test_save_writes_messages(loaded: Loaded, tmp_path: Path):
    conversation = talk(loaded)
    conversation.take("Hello")
    conversation.take(f"/save {tmp_path / 'talk.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert rows[0] == {"role": "user", "content": "Hello"}
    assert Message(**rows[1]) == conversation.turns[1]
    with pytest.raises(StorageError):
        conversation.take(f"/save {tmp_path / 'talk.jsonl' / 'inside'}")


@pytest.mark.parametrize("line", ["/think maybe", "/temperature warm", "/temperature -1", "/save"])
def test_commands_refuse_what_makes_no_sense(loaded: Loaded, line: str):
    with pytest.raises(ChatError):
        talk(loaded).take(line)


def test_unknown_commands_name_the_nearest_and_quit_ends(loaded: Loaded):
    conversation = talk(loaded)
    with pytest.raises(ChatError, match="did you mean /reset"):
        conversation.take("/rest")
    assert conversation.take("   ")
    assert conversation.take("/help")
    assert "/think on|off" in shown(conversation.console)
    assert not conversation.take("/quit")


REPLIES = [
    Message("assistant", "Answer: 19", "first: 12 + 7 = 19\nso: 19"),
    Message("assistant", "a < b, and <th is no tag\n\n", None),
    Message("assistant", "", "only thoughts"),
    Message("assistant", "naïve ✓ 🙂", "élan </thin or not\n"),
    Message("assistant", "text", ""),
]


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
@pytest.mark.parametrize("kind", ["nano", "chatml"])
def test_pieces_shown_one_by_one_make_the_whole(
    reply: Message, kind: str, nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer
):
    tokenizer, name = (
        (nano_tokenizer, "phi4-mini") if kind == "nano" else (chatml_tokenizer, "smollm2")
    )
    renderer = renderer_for(tokenizer, name)
    example = renderer.example([Message("user", "?"), reply])
    tokens = example.tokens[example.loss_mask].tolist()
    console = silent()
    view = ReplyView(console, shows_thinking=True)
    for end in range(1, len(tokens) + 1):
        view.show(renderer.parse(tokens[:end]))
    view.finish(renderer.parse(tokens))
    thought = "" if reply.thinking is None else f"<think>\n{reply.thinking}\n</think>\n"
    assert shown(console) == f"{thought}{reply.content}\n\n"


def test_folded_thinking_is_one_line_and_control_characters_are_disarmed():
    console = silent(terminal=True)
    view = ReplyView(console, shows_thinking=False)
    view.show(Message("assistant", "", "secret"))
    view.finish(Message("assistant", "an\x1b[2Jswer", "secret thought"))
    assert "secret" not in shown(console)
    assert shown(console).startswith("thinking; /think on shows it\n")
    assert "an\ufffd[2Jswer" in shown(console)
