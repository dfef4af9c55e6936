"""The official Ollama client against the server."""

import json
from typing import Any

import ollama
import pytest
from tests.unit.serve.house import House

from phikit.chat.message import Message
from phikit.serve import ollama_schema as wire

ASK: Any = [{"role": "user", "content": "What is 12 + 7?"}]
GREEDY: Any = {"temperature": 0, "num_predict": 25, "num_thread": 4}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def client(house: House) -> ollama.Client:
    return ollama.Client(host=house.url)


def test_models_are_listed_and_shown(client: ollama.Client, house: House):
    assert [model.model for model in client.list().models] == ["tiny", "org/seeing"]
    shown = client.show("org/seeing")
    assert shown.capabilities is not None and "vision" in shown.capabilities
    assert shown.modelinfo is not None and shown.modelinfo["phikit.context_length"] == 256
    client.generate(model="tiny", prompt="")
    assert "tiny" in [model.model for model in client.ps().models]
    with pytest.raises(ollama.ResponseError) as caught:
        client.show("tinny")
    assert caught.value.status_code == 404


def test_chat_whole_and_in_pieces(client: ollama.Client, house: House):
    expected = house.loaded.generate(ASK, max_new_tokens=25)
    whole = client.chat(model="tiny", messages=ASK, options=GREEDY)
    assert whole.message.content == expected.text
    assert whole.done and whole.done_reason == expected.finish_reason
    assert whole.prompt_eval_count == expected.prompt_tokens
    assert whole.eval_count == len(expected.tokens)
    pieces = list(client.chat(model="tiny", messages=ASK, options=GREEDY, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == expected.text
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 1 and pieces[-1].eval_count == len(expected.tokens)


def test_generate_through_the_template_and_raw(client: ollama.Client, house: House):
    text = ASK[0]["content"]
    asked = client.generate(model="tiny", prompt=text, options=GREEDY)
    assert asked.response == house.loaded.generate(ASK, max_new_tokens=25).text
    system = [{"role": "system", "content": "Add."}, *ASK]
    told = client.generate(model="tiny", prompt=text, system="Add.", options=GREEDY)
    assert told.response == house.loaded.generate(system, max_new_tokens=25).text
    raw = client.generate(model="tiny", prompt=text, raw=True, options=GREEDY, stream=True)
    continued = house.loaded.generate(text, max_new_tokens=25).text
    assert "".join(piece.response or "" for piece in raw) == continued


def test_an_image_in_base64(client: ollama.Client, seeing, png: bytes):
    asked: Any = [{"role": "user", "content": "What is it?", "images": [png]}]
    reply = client.chat(model="org/seeing", messages=asked, options=GREEDY)
    expected = seeing.generate(
        [{"role": "user", "content": "What is it?"}], images=[png], max_new_tokens=25
    )
    assert reply.message.content == expected.text


def test_a_format_is_obeyed(client: ollama.Client):
    schema: Any = {
        "type": "object",
        "properties": {"even": {"type": "boolean"}},
        "required": ["even"],
        "additionalProperties": False,
    }
    reply = client.generate(
        model="tiny", prompt="12?", format=schema, options={"seed": 1, "num_predict": 200}
    )
    assert json.loads(reply.response or "") in ({"even": True}, {"even": False})


def test_tools_are_offered_and_answered(client: ollama.Client):
    talk: Any = [
        *ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "19", "tool_name": "add"},
    ]
    plain = client.chat(model="tiny", messages=ASK, options=GREEDY)
    offered = client.chat(model="tiny", messages=talk, tools=[ADD], options=GREEDY)
    assert offered.prompt_eval_count is not None and plain.prompt_eval_count is not None
    assert offered.prompt_eval_count > plain.prompt_eval_count + 30


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_ctx": 8}, "context"),
        ({"num_ctx": 4096}, "num_ctx is 4096"),
        ({"mirostat": 1}, "mirostat"),
        ({"repeat_last_n": 64}, "repeat_last_n"),
        ({"wishes": 3}, "wishes"),
    ],
)
def test_options_that_cannot_be_obeyed_are_errors(client: ollama.Client, options: Any, word: str):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat(model="tiny", messages=ASK, options=options)
    assert caught.value.status_code == 400
    assert word in caught.value.error


def test_a_reply_ends_at_num_ctx(client: ollama.Client, house: House):
    prompt = len(house.loaded.renderer.prompt([Message(**ASK[0])]))
    reply = client.chat(
        model="tiny", messages=ASK, options={"temperature": 0, "num_ctx": prompt + 6}
    )
    assert reply.eval_count is not None and reply.eval_count <= 6


def test_answers_have_the_documented_shape(http):
    asked = {"model": "tiny", "messages": ASK, "stream": False, "options": {"num_predict": 3}}
    answers = {
        wire.Version: http.get("/api/version"),
        wire.Tags: http.get("/api/tags"),
        wire.Running: http.get("/api/ps"),
        wire.Shown: http.post("/api/show", json={"model": "tiny"}),
        wire.ChatReply: http.post("/api/chat", json=asked),
    }
    for shape, answer in answers.items():
        made = answer.json()
        assert shape.model_validate(made, strict=True).model_dump(exclude_unset=True) == made
