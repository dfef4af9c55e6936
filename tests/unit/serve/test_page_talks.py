"""The chat page without a browser: conversations, replies in the background, exports, the guard."""

import asyncio
import json
import re
import wave
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.scripted import scripted, shelf_of, sizes

from phikit.base.errors import ChatError, ContextOverflowError
from phikit.chat.history import History
from phikit.chat.message import Message
from phikit.models.dense import DenseModel
from phikit.models.multimodal import MultimodalModel
from phikit.serve.page_export import to_json, to_markdown
from phikit.serve.page_guard import PageGuard
from phikit.serve.page_reply import LiveReply, Progress, Settings
from phikit.serve.page_talks import Choice, Talks
from phikit.serve.page_view import view

pytestmark = pytest.mark.anyio
REPLIES = {
    "add": Message("assistant", "It is **19**.", "12 + 7 = 19"),
    "look": Message("assistant", "I see noise."),
    "long": Message("assistant", "on and on " * 40),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def picture(folder: Path) -> str:
    path = folder / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def sound(folder: Path) -> str:
    path = folder / "tone.wav"
    samples = (8000 * np.sin(np.arange(8000) / 8)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return str(path)


@pytest.fixture
def talks(tiny_model, tiny_multimodal, tmp_path):
    text = scripted(tiny_model(**sizes(DenseModel)), REPLIES)
    senses = scripted(tiny_multimodal(**sizes(MultimodalModel)), REPLIES)
    choices = [Choice("text"), Choice("senses", True, True, ("vision", "speech"))]
    shelf = shelf_of(text=text, senses=senses)
    yield Talks(shelf, choices, history=History(tmp_path / "h.sqlite3"), media=tmp_path / "media")
    shelf.close()


SETTINGS = Settings(max_new_tokens=400)


async def ended(talks: Talks, id_: str) -> list[Progress]:
    """What a tab sees of the reply until it ends."""
    reply = talks.reply(id_)
    assert isinstance(reply, LiveReply)
    return [progress async for progress in reply.watch()]


async def asked(talks: Talks, text: str, id_: str | None = None, **settings: Any) -> str:
    chosen = Settings(**{"max_new_tokens": 400, **settings})
    id_ = talks.ask(id_, text, (), model="text", settings=chosen)
    await ended(talks, id_)
    return id_


def said(talks: Talks, id_: str) -> list[str]:
    return [turn.message.content for turn in talks.turns(id_)]


async def test_a_question_and_its_reply_are_kept(talks):
    id_ = talks.ask(None, "add 12 and 7", (), model="text", settings=SETTINGS)
    seen = await ended(talks, id_)
    assert seen[0].phase == "loading" and seen[-1].phase == "done" and seen[-1].error is None
    question, reply = talks.turns(id_)
    assert question.message == Message("user", "add 12 and 7")
    assert reply.message == REPLIES["add"]
    assert reply.model == "text" and reply.finish_reason == "stop"
    assert reply.tokens and reply.prompt_tokens and reply.seconds
    assert reply.settings["temperature"] == 0.6 and reply.settings["seed"] == 0
    [listed] = talks.listed()
    assert (listed.id, listed.title, listed.source) == (id_, "add 12 and 7", "page")


async def test_thinking_is_shown_apart_and_timed(talks):
    id_ = await asked(talks, "add")
    shown = view(talks.turns(id_), talks.reply(id_))
    titles = [message.get("metadata", {}).get("title") for message in shown.messages]
    assert titles[0] is titles[2] is titles[3] is None
    assert re.fullmatch(r"Thought for \d+ s", titles[1])
    assert shown.places == [0, 1, 1, 1]
    assert shown.messages[1]["content"] == "12 + 7 = 19"
    assert shown.messages[2]["content"] == "It is **19**."
    assert "tokens/s" in shown.messages[3]["content"]


async def test_turns_before_are_sent_unless_told_otherwise(talks):
    id_ = await asked(talks, "add")
    both = await asked(talks, "look", id_)
    alone = await asked(talks, "look", id_, remembers=False)
    assert id_ == both == alone
    prompts = [turn.prompt_tokens for turn in talks.turns(id_) if turn.message.role == "assistant"]
    assert prompts[1] > prompts[0] > 0 and prompts[2] < prompts[1]


async def test_asked_again_it_draws_anew(talks):
    id_ = await asked(talks, "add")
    await asked(talks, "look", id_)
    for expected in (1, 2):
        talks.ask_again(id_, 1, model="text", settings=SETTINGS)
        await ended(talks, id_)
        assert said(talks, id_) == ["add", "It is **19**."]
        assert talks.turns(id_)[1].settings["seed"] == expected


async def test_an_edited_question_takes_back_what_followed(talks):
    id_ = await asked(talks, "add")
    await asked(talks, "look", id_)
    talks.edit(id_, 0, "look again", model="text", settings=SETTINGS)
    await ended(talks, id_)
    assert said(talks, id_) == ["look again", "I see noise."]
    with pytest.raises(ChatError, match="empty"):
        talks.edit(id_, 0, " ", model="text", settings=SETTINGS)


async def test_a_stopped_reply_is_kept_as_far_as_it_came(talks, tiny_model):
    slow = scripted(tiny_model(**sizes(DenseModel)), REPLIES, pause_s=0.02)
    talks.shelf = shelf_of(text=slow)
    id_ = talks.ask(None, "long", (), model="text", settings=SETTINGS)
    reply = talks.reply(id_)
    async for progress in reply.watch():
        if len(progress.text) > 20 and not reply.done:
            with pytest.raises(ChatError, match="still being made"):
                talks.ask(id_, "add", (), model="text", settings=SETTINGS)
            reply.stop()
    _, kept = talks.turns(id_)
    assert kept.finish_reason == "cancelled"
    assert 20 < len(kept.message.content) < len(REPLIES["long"].content)
    [served] = talks.shelf.loaded
    while not served.worker.idle:
        await asyncio.sleep(0.01)
    assert served.worker.stats().blocks_held == 0
    talks.shelf.close()


async def test_a_question_too_long_names_both_numbers_and_makes_room(talks):
    id_ = talks.ask(None, "word " * 2500, (), model="text", settings=SETTINGS)
    error = (await ended(talks, id_))[-1].error
    assert isinstance(error, ContextOverflowError)
    assert "new tokens" in error.what and "context is 2048" in error.what
    assert "failure" in view(talks.turns(id_), talks.reply(id_)).messages[-1]["content"]
    assert await asked(talks, "add", id_) == id_
    assert said(talks, id_) == ["add", "It is **19**."]


async def test_media_are_copied_numbered_and_forgotten_with_their_conversation(talks, tmp_path):
    files = [picture(tmp_path), sound(tmp_path)]
    id_ = talks.ask(None, "look", files, model="senses", settings=SETTINGS)
    assert (await ended(talks, id_))[-1].error is None
    plain = talks.turns(id_)[1].prompt_tokens
    talks.ask(id_, "look", files[:1], model="senses", settings=SETTINGS)
    assert (await ended(talks, id_))[-1].error is None
    question = talks.turns(id_)[0]
    assert [medium.kind for medium in question.media] == ["image", "audio"]
    assert all(Path(medium.path).is_file() for medium in question.media)
    assert talks.turns(id_)[3].prompt_tokens > plain > 20
    shown = view(talks.turns(id_), None)
    assert shown.messages[0]["content"] == {"path": question.media[0].path}
    talks.delete(id_)
    assert talks.listed() == [] and not (talks.media / id_).exists()


async def test_what_a_model_cannot_take_is_refused_before_anything_is_kept(talks, tmp_path):
    for file, what in ((picture(tmp_path), "see images"), (sound(tmp_path), "hear sounds")):
        with pytest.raises(ChatError, match=f"text does not {what}"):
            talks.ask(None, "look", [file], model="text", settings=SETTINGS)
    with pytest.raises(ChatError, match="neither an image nor a sound"):
        talks.ask(None, "look", ["notes.pdf"], model="senses", settings=SETTINGS)
    assert talks.listed() == []


async def test_a_conversation_deleted_in_mid_reply_stays_deleted(talks, tiny_model):
    slow = scripted(tiny_model(**sizes(DenseModel)), REPLIES, pause_s=0.01)
    talks.shelf = shelf_of(text=slow)
    id_ = talks.ask(None, "long", (), model="text", settings=SETTINGS)
    reply = talks.reply(id_)
    await asyncio.sleep(0.3)
    talks.delete(id_)
    seen = [progress async for progress in reply.watch()]
    assert seen[-1].error is None and talks.listed() == []
    talks.shelf.close()


async def test_exports(talks):
    id_ = await asked(talks, "add")
    talk, turns = talks.history.find(id_), talks.turns(id_)
    text = to_markdown(talk, turns)
    assert text.startswith("# add\n") and "## You\n\nadd\n" in text
    assert "> Thinking:\n>\n> 12 + 7 = 19" in text and "It is **19**." in text
    values = json.loads(to_json(talk, turns))
    assert values["id"] == id_ and values["model"] == "text"
    assert [turn["role"] for turn in values["turns"]] == ["user", "assistant"]
    assert values["turns"][1]["thinking"] == "12 + 7 = 19"


async def page(scope: Any, receive: Any, send: Any) -> None:
    from starlette.responses import HTMLResponse

    await HTMLResponse("<script>one()</script><script src=x></script>")(scope, receive, send)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "["}, 403),
        ({"host": "127.0.0.1.evil.example:7860"}, 403),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:7860", "origin": "null"}, 403),
    ],
)
async def test_only_this_machine_and_the_page_itself_may_ask(headers, status):
    transport = httpx.ASGITransport(app=PageGuard(page))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/", headers=headers)
    assert answer.status_code == status


async def test_scripts_of_the_page_have_a_nonce_of_their_own_each_time():
    transport = httpx.ASGITransport(app=PageGuard(page))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        first, second = [await client.get("/") for _ in range(2)]
    policies = [answer.headers["content-security-policy"] for answer in (first, second)]
    assert policies[0] != policies[1]
    nonce = policies[0].partition("'nonce-")[2].partition("'")[0]
    assert first.text.count(f'<script nonce="{nonce}"') == 2
    assert "unsafe-eval" not in policies[0] and "https:" not in policies[0]
