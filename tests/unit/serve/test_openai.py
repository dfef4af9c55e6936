"""The official OpenAI client against the server, and what it is told beside the engine alone."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel
from tests.unit.serve.house import House

from phikit.serve import openai_schema as wire

ASK: Any = [{"role": "user", "content": "What is 12 + 7?"}]
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [12, 3]}, "b": {"enum": [1, 7]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Answer(BaseModel):
    """A small schema that a random model fills in a few tokens."""

    is_even: bool
    parity: bool


@pytest.fixture(scope="module")
def client(house: House) -> OpenAI:
    return OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)


def test_models(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny", "org/seeing"]
    assert client.models.retrieve("org/seeing").id == "org/seeing"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tinny")
    assert caught.value.code == "model_not_found"


def test_a_chat_is_what_the_engine_alone_says(client: OpenAI, house: House, alone: Callable):
    reply = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_tokens=30, user="someone", store=False
    )
    expected = house.loaded.generate(ASK, max_new_tokens=30)
    [choice] = reply.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == len(expected.tokens)


def test_a_stream_says_the_same_in_pieces(client: OpenAI, house: House):
    stream = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    expected = house.loaded.generate(ASK, max_new_tokens=60)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len(chunks) > 3  # a role, a first token, an end, the counts
    assert len({chunk.id for chunk in chunks}) == 1


def test_samples_are_those_of_the_seed(client: OpenAI):
    def ask(**more: Any) -> list[str | None]:
        reply = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=12, temperature=1.5, **more
        )
        return [choice.message.content for choice in reply.choices]

    three = ask(n=3, seed=7)
    assert len(set(three)) == 3
    assert ask(n=3, seed=7) == three
    assert ask(n=1, seed=7) == three[:1]
    assert ask(n=3, seed=8) != three
    assert ask() != ask()


def test_streams_of_several_samples_interleave(client: OpenAI):
    options: Any = {"model": "tiny", "messages": ASK, "n": 3, "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_log_probs(client: OpenAI, house: House):
    options: Any = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 15}
    reply = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    expected = house.loaded.generate(ASK, max_new_tokens=15, top_log_probs=3)
    log_probs = reply.choices[0].logprobs
    assert log_probs is not None and log_probs.content is not None
    ends = house.loaded.renderer.stop_ids
    kept = [place for place, token in enumerate(expected.tokens) if token not in ends]
    assert [t.logprob for t in log_probs.content] == pytest.approx(
        [expected.log_probs[place] for place in kept], abs=1e-4
    )
    for token, place in zip(log_probs.content, kept, strict=True):
        values = [value for _, value in expected.top_log_probs[place]]
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(values, abs=1e-4)
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    streamed = [
        token.logprob
        for chunk in client.chat.completions.create(**options, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == pytest.approx([t.logprob for t in log_probs.content], abs=1e-4)


def test_stop_strings_are_cut_and_never_shown_in_part(client: OpenAI, house: House):
    expected = house.loaded.generate(ASK, max_new_tokens=40).text
    stop = expected[12:15]
    options: Any = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 40}
    reply = client.chat.completions.create(**options, stop=[stop])
    cut = expected[: expected.index(stop)]
    assert reply.choices[0].message.content == cut
    assert reply.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_obeyed(client: OpenAI, temperature: float):
    reply = client.chat.completions.parse(
        model="tiny",
        messages=ASK,
        temperature=temperature,
        max_tokens=200,
        response_format=Answer,
        extra_body={"seed": 3},
    )
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_a_json_object_is_begun(client: OpenAI):
    reply = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        response_format={"type": "json_object"},
        max_tokens=100,
        temperature=0,
    )
    assert (reply.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_takes_what_the_tool_takes(client: OpenAI, choice: Any, stream: bool):
    options: Any = {
        "model": "tiny",
        "messages": ASK,
        "tools": [ADD],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "seed": 1,
    }
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        [delta] = [c.choices[0].delta for c in chunks if c.choices[0].delta.tool_calls]
        [call] = delta.tool_calls or []
        reason = chunks[-1].choices[0].finish_reason
    else:
        reply = client.chat.completions.create(**options)
        [call] = reply.choices[0].message.tool_calls or []
        reason = reply.choices[0].finish_reason
        assert reply.choices[0].message.content is None
    function: Any = call.function
    assert function.name == "add" and reason == "tool_calls" and call.id
    arguments = json.loads(function.arguments)
    assert arguments["a"] in (12, 3) and arguments["b"] in (1, 7)


def test_calls_and_their_results_go_back_into_the_conversation(client: OpenAI, house: House):
    first = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[ADD], tool_choice="required", max_tokens=300, seed=1
    )
    message = first.choices[0].message
    assert message.tool_calls
    talk = [*ASK, message]
    talk += [{"role": "tool", "tool_call_id": c.id, "content": "19"} for c in message.tool_calls]
    again = client.chat.completions.create(
        model="tiny", messages=talk, tools=[ADD], max_tokens=5, temperature=0
    )
    assert again.usage is not None and first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens + 5


def test_thinking_is_apart_from_the_answer(client: OpenAI, house: House, monkeypatch):
    """A model that says what it is told to: a thought and an answer."""
    said = _scripted(
        house, monkeypatch, "<think>", "\n12 and 7 make 19\n", "</think>", "\nIt is 19."
    )
    reply: Any = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=100)
    assert reply.choices[0].message.reasoning_content == "12 and 7 make 19"
    assert reply.choices[0].message.content == "It is 19."
    assert reply.usage.completion_tokens == said
    thinking = content = ""
    stream = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=100, stream=True)
    for chunk in stream:
        delta: Any = chunk.choices[0].delta
        thinking += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
    assert (thinking, content) == ("12 and 7 make 19", "It is 19.")


def test_a_free_call_is_read(client: OpenAI, house: House, monkeypatch):
    call = '[{"name": "add", "arguments": {"a": 12, "b": 7}}]'
    _scripted(house, monkeypatch, "Let me see.", "<|tool_call|>", call, "<|/tool_call|>")
    reply = client.chat.completions.create(model="tiny", messages=ASK, tools=[ADD], max_tokens=100)
    message = reply.choices[0].message
    assert message.content == "Let me see."
    calls: Any = message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 12, "b": 7}]
    assert reply.choices[0].finish_reason == "tool_calls"


def _scripted(house: House, monkeypatch: Any, *parts: str) -> int:
    """Make the tiny model say these texts and special tokens; returns how many tokens that is."""
    tokenizer = house.loaded.tokenizer
    ids = [
        id_
        for part in parts
        for id_ in (
            [tokenizer.specials[part]] if part in tokenizer.specials else tokenizer.encode(part)
        )
    ]
    ids.append(house.loaded.renderer.stop_ids[0])

    class Script:
        def __init__(self) -> None:
            self.place = 0
            self.finished = False

        def allowed(self) -> torch.Tensor:
            mask_V = torch.zeros(house.loaded.config.vocab_size, dtype=torch.bool)
            mask_V[ids[self.place]] = True
            return mask_V

        def accept(self, token: int) -> None:
            self.place += 1

    real = type(house.loaded).request

    def request(self: Any, *args: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(real(self, *args, **options), constraint=Script)

    monkeypatch.setattr(type(house.loaded), "request", request)
    return len(ids)


def test_images_and_sound(client: OpenAI, house: House, seeing, png: bytes, wav: bytes):
    def url(kind: str, content: bytes) -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    sound: Any = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    talks: Any = {
        "<|image_1|>What is it?": [
            {"type": "image_url", "image_url": {"url": url("image/png", png)}},
            {"type": "text", "text": "What is it?"},
        ],
        "Hear<|audio_1|>": [
            {"type": "text", "text": "Hear"},
            {"type": "input_audio", "input_audio": sound},
        ],
        "<|image_1|><|audio_1|>": [
            {"type": "image_url", "image_url": {"url": url("image/png", png)}},
            {"type": "audio_url", "audio_url": {"url": url("audio/wav", wav)}},
        ],
    }
    for text, content in talks.items():
        reply = client.chat.completions.create(
            model="org/seeing",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=10,
        )
        expected = seeing.generate(
            [{"role": "user", "content": text}],
            images=[png] if "image" in text else [],
            audio=[wav] if "audio" in text else [],
            max_new_tokens=10,
        )
        assert reply.choices[0].message.content == expected.text
        assert reply.usage is not None and reply.usage.prompt_tokens == expected.prompt_tokens


def test_text_completions(client: OpenAI, house: House):
    prompts = ["What is", "Anna has"]
    whole = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=9, temperature=0, logprobs=2
    )
    expected = [house.loaded.generate(prompt, max_new_tokens=9) for prompt in prompts]
    assert [choice.text for choice in whole.choices] == [reply.text for reply in expected]
    assert [choice.index for choice in whole.choices] == [0, 1]
    log_probs = whole.choices[1].logprobs
    assert log_probs is not None and log_probs.token_logprobs is not None
    assert log_probs.token_logprobs[:5] == pytest.approx(expected[1].log_probs[:5], abs=1e-4)
    texts = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=prompts, max_tokens=9, temperature=0, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [reply.text for reply in expected]
    ids = house.loaded.tokenizer.encode(prompts[0])
    of_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
    assert of_ids.choices[0].text == texts[0]


def test_embeddings(client: OpenAI, house: House):
    texts = ["What is 12 + 7?", "Anna has three apples"]
    both = client.embeddings.create(model="tiny", input=texts)
    listed = client.embeddings.create(model="tiny", input=texts[1], encoding_format="float")
    vectors = np.array([entry.embedding for entry in both.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert vectors[1] == pytest.approx(listed.data[0].embedding, abs=1e-6)
    ids_BT = torch.tensor([house.loaded.tokenizer.encode(texts[0])])
    with torch.inference_mode():
        mean_D = house.loaded.model.hidden(ids_BT)[0].mean(0)
    assert vectors[0] == pytest.approx((mean_D / mean_D.norm()).numpy(), abs=1e-5)
    assert both.usage.prompt_tokens == sum(len(house.loaded.tokenizer.encode(t)) for t in texts)


REFUSED: Any = [
    ("messages", {"messages": []}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "0.5"}),
    ("max_tokens", {"max_tokens": "5"}),
    ("stream", {"stream": 0.0}),
    ("logit_bias", {"logit_bias": {"5": 1.0}}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("n", {"n": 17}),
    ("n", {"n": 10_000}),
    ("seed", {"seed": 2**70}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": []}),
    ("messages.0.role", {"messages": [{"role": "king", "content": "x"}]}),
    (
        "messages.0.content.0.type",
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
    ),
    (
        "messages.1.tool_calls.0",
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{"}}
                    ],
                },
            ]
        },
    ),
]


@pytest.mark.parametrize(("param", "changes"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, param: str, changes: Any):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=ASK, extra_body=changes)
    assert (caught.value.param or "").startswith(param)
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_beyond_the_context_is_an_error_and_not_cut(client: OpenAI):
    long: Any = [{"role": "user", "content": "What is " * 900}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "1024" in caught.value.message


def test_numbers_and_texts_that_json_should_not_have(http: httpx2.Client):
    for body in (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"\xff\xfe",
        b"",
        b"7",
    ):
        path = "completions" if b"prompt" in body else "chat/completions"
        answer = http.post(
            f"/v1/{path}", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (400, 404), answer.text
        wire_error = answer.json()["error"]
        assert set(wire_error) == {"message", "type", "param", "code"}


def test_answers_have_the_documented_shape(http: httpx2.Client):
    chat = {"model": "tiny", "messages": ASK, "max_tokens": 4, "logprobs": True}
    shapes = {
        "chat/completions": (wire.ChatCompletion, chat),
        "completions": (wire.TextCompletion, {"model": "tiny", "prompt": "a", "max_tokens": 3}),
        "embeddings": (wire.EmbeddingList, {"model": "tiny", "input": "a"}),
    }
    for path, (shape, body) in shapes.items():
        answer = http.post(f"/v1/{path}", json=body)
        made = answer.json()
        dumped = shape.model_validate(made, strict=True).model_dump(exclude_unset=True)
        assert dumped == made
