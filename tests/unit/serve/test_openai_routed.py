"""A router behind the server, and the server in the role of another's cloud."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.stub_endpoint import StubServer, fails, says, slow, stub_endpoint
from tests.unit.serve.house import House, at_hand, running, small_engine

from phikit.chat.message import Message
from phikit.generate.chat import ChatOptions, ChatReply, LocalChat
from phikit.generate.language_model import LanguageModel
from phikit.generate.remote import Remote, RemoteConfig
from phikit.generate.reply import Piece
from phikit.serve.hybrid import ShelfChat, open_router
from phikit.serve.models import ModelShelf
from phikit.serve.router import RouterConfig

ASK = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    with stub_endpoint() as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routed") / "router.jsonl"


@pytest.fixture(scope="module")
def routed(tiny: LanguageModel, stub: StubServer, log: Path) -> Iterator[House]:
    """A server whose model "hybrid" goes to the stub if "tiny" is less sure than it ever is."""
    shelf = ModelShelf({"tiny": at_hand(tiny)}, make_engine=small_engine)
    cloud = {"base_url": stub.url, "model": "big", "retries": 0, "timeout_s": 0.5}
    config = RouterConfig.resolve(
        {
            "local": "tiny",
            "cloud": cloud,
            "budget": {"calls_per_run": 100},
            "confidence": {"signal": "weakest", "threshold": 0.0},
            "log": str(log),
        }
    )
    router = open_router(config, ShelfChat(shelf, "tiny"))
    with running(shelf, router=router) as url:
        yield House(url, shelf, tiny)


def chat(house: House, **body: Any) -> httpx2.Response:
    values = {"model": "hybrid", "messages": ASK, "max_tokens": 8, "temperature": 0} | body
    return httpx2.post(f"{house.url}/v1/chat/completions", json=values, timeout=30)


def test_a_routed_chat(routed: House, stub: StubServer):
    answer = chat(routed).json()
    assert answer["model"] == "hybrid" and answer["usage"]["total_tokens"] == 16
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Answer: \\boxed{7}"}
    assert answer["routing"]["route"] == "cloud" and answer["routing"]["reason"] == "unsure"
    assert stub.requests[-1][2]["messages"] == ASK
    stub.script = [fails(500)]
    answer = chat(routed).json()
    assert answer["routing"]["route"] == "local"
    assert "RemoteUnavailableError" in answer["routing"]["note"]
    assert routed.rests()


def test_a_routed_stream(routed: House, stub: StubServer):
    stub.script = [says("It is 19.")]
    response = chat(routed, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    *events, done = lines
    chunks = [json.loads(event) for event in events]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "It is 19." and done == "[DONE]"
    assert chunks[-2]["routing"]["route"] == "cloud"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 16
    assert routed.rests()


def test_readers_who_leave_hold_nothing(routed: House, stub: StubServer):
    stub.script = [slow(0.3)]
    with (
        pytest.raises(httpx2.ReadTimeout),
        httpx2.Client(timeout=0.1) as client,
        client.stream(
            "POST",
            f"{routed.url}/v1/chat/completions",
            json={"model": "hybrid", "messages": ASK, "max_tokens": 500, "stream": True},
        ) as response,
    ):
        list(response.iter_raw())
    assert routed.rests()
    assert chat(routed).status_code == 200


def test_what_cannot_be_routed_is_answered_here(
    routed: House, stub: StubServer, png: bytes, log: Path
):
    asked = len(stub.requests)
    for field, value in {"n": 2, "logprobs": True, "top_k": 5, "min_p": 0.1}.items():
        answer = chat(routed, **{field: value}).json()
        assert answer["model"] == "tiny" and answer["choices"], field
        assert chat(routed, stream=True, **{field: value}).text.endswith("data: [DONE]\n\n")
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    # The errors are those of the local model.
    assert "image" in chat(routed, messages=picture).json()["error"]["message"]
    assert "adapter" in chat(routed, adapter="x").json()["error"]["message"]
    assert len(stub.requests) == asked
    notes = [json.loads(line)["note"] for line in log.read_text().splitlines()]
    assert "n: the local model answers alone" in notes
    assert routed.rests()


def test_without_a_local_model_they_are_refused(stub: StubServer, tiny: LanguageModel):
    shelf = ModelShelf({"other": at_hand(tiny)}, make_engine=small_engine)
    cloud = {"base_url": stub.url, "model": "big", "retries": 0, "timeout_s": 0.5}
    settings = {"local": "tiny", "cloud": cloud, "budget": {"calls_per_run": 100}}
    router = open_router(RouterConfig.resolve(settings), None)
    with running(shelf, router=router) as url:
        house = House(url, shelf, tiny)
        response = chat(house, n=2)
        assert response.status_code == 400 and response.json()["error"]["param"] == "n"
        assert "tiny" in response.json()["error"]["message"]


def test_the_router_is_one_of_the_models(routed: House):
    assert chat(routed, model="tiny").json().get("routing") is None
    names = httpx2.get(f"{routed.url}/v1/models").json()["data"]
    assert [each["id"] for each in names] == ["tiny", "hybrid"]
    assert httpx2.get(f"{routed.url}/v1/models/hybrid").json() == names[1]


def test_our_own_server_is_a_cloud(house: House, tiny: LanguageModel):
    """What comes over HTTP is what the model says in this process."""
    options = ChatOptions(max_new_tokens=12, temperature=0.7, seed=3)
    talk = [Message("system", "Be brief."), Message("user", "What is 12 + 7?")]
    config = RemoteConfig(base_url=f"{house.url}/v1", model="tiny", log_probs=True)
    [here] = LocalChat(tiny).answer(talk, options)
    with Remote(config) as cloud:
        [there] = cloud.answer(talk, options)
        assert (there.message, there.prompt_tokens, there.reply_tokens, there.finish_reason) == (
            here.message,
            here.prompt_tokens,
            here.reply_tokens,
            here.finish_reason,
        )
        *pieces, whole = cloud.stream(talk, options)
        assert isinstance(whole, ChatReply) and whole.message == here.message
        said = "".join(piece.content for piece in pieces if isinstance(piece, Piece))
        assert said == here.message.content
        assert len(cloud.answer(talk, ChatOptions(max_new_tokens=4, num_samples=3))) == 3
    assert house.rests()


def test_a_cloud_that_is_ours_with_the_local_model_absent(house: House, tmp_path: Path):
    config = RouterConfig.resolve(
        {
            "local": "not here",
            "cloud": {"base_url": f"{house.url}/v1", "model": "tiny"},
            "budget": {"calls_per_day": 5, "file": tmp_path / "budget.sqlite"},
        }
    )
    router = open_router(config, ShelfChat(house.shelf, "not here"))
    answer = router.answer([Message("user", "12 + 7?")], ChatOptions(max_new_tokens=5))
    assert (answer.route, answer.reason) == ("cloud", "absent")
