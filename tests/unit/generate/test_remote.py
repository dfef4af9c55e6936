import gzip
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from tests.stub_endpoint import (
    StubServer,
    completion,
    endless,
    fails,
    hangs_up,
    raw,
    says,
    slow,
    stub_endpoint,
    trickle,
)

from phikit.base.errors import (
    ConfigError,
    RemoteError,
    RemoteUnavailableError,
    ReplyTimeoutError,
)
from phikit.chat.message import Message
from phikit.chat.tools import ToolCall, ToolDefinition
from phikit.generate import remote
from phikit.generate.chat import ChatOptions, ChatReply
from phikit.generate.remote import Remote, RemoteConfig, retry_after_s
from phikit.generate.reply import Piece

KEY = "sk-very-secret-0123456789"
ASK = [Message("user", "What is 3 + 4?")]


@pytest.fixture
def server() -> Iterator[StubServer]:
    with stub_endpoint() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


def connect(server: StubServer, **changes: Any) -> Remote:
    return Remote(RemoteConfig(base_url=server.url, model="big", timeout_s=5, **changes))


def test_a_reply_and_what_it_cost(server: StubServer):
    with connect(server, price_in=2.0, price_out=8.0, max_new_tokens=99) as cloud:
        [reply] = cloud.answer(ASK, ChatOptions(temperature=0.5, seed=3, stop=("END",), top_p=0.9))
        assert reply.message == Message("assistant", "Answer: \\boxed{7}")
        assert (reply.prompt_tokens, reply.reply_tokens, reply.finish_reason) == (11, 5, "stop")
        cloud.answer(ASK, ChatOptions(max_new_tokens=4))
        assert cloud.spent[:3] == (2, 22, 10)
        assert cloud.spent.cost == pytest.approx(2 * (11 * 2 + 5 * 8) / 1e6)
    (path, _, first), (_, _, second) = server.requests
    assert path == "/v1/chat/completions"
    assert first == {
        "model": "big",
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "temperature": 0.5,
        "seed": 3,
        "top_p": 0.9,
        "stop": ["END"],
        "max_tokens": 99,
    }
    assert second["max_tokens"] == 4


def test_thinking_tools_schema_and_log_probs(server: StubServer):
    call = {"id": "x", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    server.script = [
        says("7", reasoning_content="3 and 4"),
        says("<think>\n3 and 4\n</think>\n7"),
        says("", tool_calls=[call]),
        raw(
            json.dumps(
                {
                    "choices": [
                        {
                            "message": {"content": "7"},
                            "finish_reason": "length",
                            "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -3.0}]},
                        }
                    ]
                }
            ).encode()
        ),
    ]
    tool = ToolDefinition("add", "Adds.", {"type": "object"})
    talk = [
        Message("system", "Be brief.", tools=(tool,)),
        Message("user", "3 + 4?"),
        Message("assistant", "", thinking="hm", tool_calls=(ToolCall("add", {"a": 3}),)),
        Message("tool", "7"),
    ]
    with connect(server, log_probs=True) as cloud:
        for _ in range(2):
            [reply] = cloud.answer(ASK, ChatOptions())
            assert reply.message == Message("assistant", "7", "3 and 4")
        [reply] = cloud.answer(talk, ChatOptions(schema={"type": "object"}))
        assert reply.message.tool_calls == (ToolCall("add", {"a": 3, "b": 4}),)
        [reply] = cloud.answer(ASK, ChatOptions())
        assert (reply.finish_reason, reply.mean_log_prob, reply.min_log_prob) == ("length", -2, -3)
        assert reply.prompt_tokens > 40 and reply.reply_tokens > 40  # bytes, where none are counted
    body = server.requests[2][2]
    assert body["tools"][0]["function"]["name"] == "add" and body["logprobs"] is True
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["messages"][2]["tool_calls"][0]["id"] == body["messages"][3]["tool_call_id"]
    assert "hm" not in json.dumps(body)


def test_several_replies(server: StubServer):
    many = json.dumps(
        {
            "choices": [{"message": {"content": str(i)}} for i in range(3)],
            "usage": {"prompt_tokens": 5, "completion_tokens": 10},
        }
    ).encode()
    server.script = [raw(many)]
    with connect(server) as cloud:
        replies = cloud.answer(ASK, ChatOptions(num_samples=3))
        assert [reply.message.content for reply in replies] == ["0", "1", "2"]
        assert sum(reply.reply_tokens for reply in replies) == 10
        with pytest.raises(RemoteError, match="1 replies came, 3 were asked for"):
            cloud.answer(ASK, ChatOptions(num_samples=3))


def test_streams(server: StubServer):
    with connect(server) as cloud:
        *pieces, reply = cloud.stream(ASK, ChatOptions())
        assert isinstance(reply, ChatReply)
        assert "".join(p.content for p in pieces if isinstance(p, Piece)) == "Answer: \\boxed{7}"
        assert len(pieces) == 2 and reply.message.content == "Answer: \\boxed{7}"
        assert cloud.spent[:3] == (1, 11, 5)
        server.script = [fails(503), says("again")]
        assert [*cloud.stream(ASK, ChatOptions())][-1].message.content == "again"  # pyright: ignore


@pytest.mark.parametrize("broken", [raw(b"data: {}\n\n"), raw(b"data: nonsense\n\n"), raw(b"")])
def test_broken_streams(server: StubServer, broken: Any):
    server.script = [broken]
    with connect(server) as cloud, pytest.raises(RemoteError) as caught:
        list(cloud.stream(ASK, ChatOptions()))
    assert caught.value.may_be_billed


def test_asks_again_and_waits_as_told(server: StubServer):
    server.script = [fails(429, Retry_After="1"), fails(500), fails(503), says("at last")]
    with connect(server) as cloud:
        started = time.monotonic()
        [reply] = cloud.answer(ASK, ChatOptions())
    assert reply.message.content == "at last" and len(server.requests) == 4
    assert time.monotonic() - started >= 1.0


def test_gives_up(server: StubServer):
    server.default = fails(500)
    with connect(server, retries=2) as cloud:
        with pytest.raises(RemoteUnavailableError, match="status 500") as caught:
            cloud.answer(ASK, ChatOptions())
        assert len(server.requests) == 3 and not caught.value.may_be_billed
        server.default = fails(429, Retry_After="3600")
        started = time.monotonic()
        with pytest.raises(RemoteUnavailableError) as caught:
            cloud.answer(ASK, ChatOptions())
        assert caught.value.retry_after_s == 3600 and time.monotonic() - started < 60
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "words", "billed"),
    [
        (fails(400, b'{"error": "bad \x1b[31m field"}'), r"status 400\): {\"error\"", False),
        (fails(302, Location="https://elsewhere.example"), "sends us elsewhere", False),
        (raw(b"<html>hello</html>"), "no chat completion", True),
        (raw(b"\xff\xfe"), "no chat completion", True),
        (raw(b"[" * 1900), "no chat completion", True),
        (raw(b'{"choices": []}'), "0 replies came", True),
        (raw(b'{"choices": [{"message": {"content": 7}}]}'), "content", True),
        (raw(completion("x").replace(b"11,", b"-11,")), "prompt_tokens", True),
        (raw(completion("x").replace(b"11,", b"1e99,")), "prompt_tokens", True),
        (raw(gzip.compress(completion("x")), Content_Encoding="gzip"), "packed", True),
        (raw(b" " * 3000), "more than 2000 bytes", True),
        (endless, "more than 2000 bytes", True),
    ],
)
def test_bad_answers(server: StubServer, answer: Any, words: str, billed: bool):
    server.default = answer
    cloud = connect(server, max_reply_bytes=2000)
    with cloud, pytest.raises(RemoteError, match=words) as caught:
        cloud.answer(ASK, ChatOptions())
    assert caught.value.may_be_billed is billed and len(server.requests) == 1
    assert caught.value.what.isprintable() and len(caught.value.what) < 400


def test_hanging_up_is_tried_again(server: StubServer):
    server.script = [hangs_up, says("whole")]
    with connect(server, retries=1) as cloud:
        assert cloud.answer(ASK, ChatOptions())[0].message.content == "whole"
        server.script = [hangs_up, hangs_up]
        with pytest.raises(RemoteUnavailableError, match="broke off") as caught:
            cloud.answer(ASK, ChatOptions())
        assert caught.value.may_be_billed


@pytest.mark.parametrize("answer", [slow(30), trickle(0.05)])
def test_deadlines(server: StubServer, answer: Any):
    server.default = answer
    with connect(server) as cloud:
        started = time.monotonic()
        with pytest.raises(ReplyTimeoutError, match="in 0.4 s"):
            cloud.answer(ASK, ChatOptions(timeout_s=0.4))
        assert time.monotonic() - started < 15


def test_nobody_there(server: StubServer):
    server.server_close()
    server.shutdown()
    with connect(server, retries=1) as cloud, pytest.raises(RemoteUnavailableError) as caught:
        cloud.answer(ASK, ChatOptions())
    assert not caught.value.may_be_billed


def test_no_more_calls_at_once_than_allowed(server: StubServer):
    server.default = slow(0.05)
    with connect(server, max_concurrent=2) as cloud, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: cloud.answer(ASK, ChatOptions()), range(8)))
        assert server.most_at_once == 2 and cloud.spent.calls == 8
        inside = threading.Semaphore(0)
        server.default = lambda request: (inside.release(), slow(1.0)(request))[1]
        running = [threads.submit(cloud.answer, ASK, ChatOptions()) for _ in range(2)]
        for _ in running:
            inside.acquire()
        with pytest.raises(RemoteUnavailableError, match="under way already"):
            cloud.answer(ASK, ChatOptions(timeout_s=0.1))
        for call in running:
            call.result()


def test_the_key_goes_out_and_is_seen_nowhere(
    server: StubServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("CLOUD_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echoes = [fails(400, KEY.encode()), fails(401, KEY.encode()), fails(500, KEY.encode())]
    server.script = [says("hello"), *echoes]
    seen = []
    with connect(server, api_key_env="CLOUD_KEY", retries=0) as cloud:
        cloud.answer(ASK, ChatOptions())
        for _ in echoes:
            with pytest.raises(RemoteError) as caught:
                cloud.answer(ASK, ChatOptions())
            seen += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
        seen += [repr(cloud), repr(cloud.config), cloud.config.model_dump_json()]
    assert all(sent["Authorization"] == f"Bearer {KEY}" for _, sent, _ in server.requests)
    assert KEY not in "".join([*seen, caplog.text, *capfd.readouterr()])
    assert "[key]" in seen[0] and "CLOUD_KEY" in seen[3]


def test_keys_that_are_not_there(server: StubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CLOUD_KEY", raising=False)
    with pytest.raises(ConfigError, match="CLOUD_KEY is not set"):
        connect(server, api_key_env="CLOUD_KEY")
    monkeypatch.setenv("CLOUD_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="holds no key"):
        connect(server, api_key_env="CLOUD_KEY")
    with pytest.raises(ConfigError) as caught:
        connect(server, api_key_env=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("ftp://host/v1", "give http"),
        ("host/v1", "give http"),
        ("https://host:99999/v1", "base_url"),
        (f"https://user:{KEY}@host/v1", "holds a user"),
        (f"https://host/v1?key={KEY}", "a query"),
        ("http://example.com/v1", "use https"),
        ("http://192.168.1.5/v1", "use https"),
    ],
)
def test_addresses_refused(url: str, word: str):
    with pytest.raises(ConfigError, match=word) as caught:
        RemoteConfig.resolve({"base_url": url, "model": "m", "api_key_env": "CLOUD_KEY"})
    assert KEY not in str(caught.value)


def test_addresses_allowed():
    for url in ("http://localhost:1/v1", "http://[::1]:1/v1", "https://example.com/v1/"):
        config = RemoteConfig(base_url=url, model="m", api_key_env="CLOUD_KEY")
        assert config.base_url == url.rstrip("/")
    RemoteConfig(base_url="http://192.168.1.5:11434/v1", model="m")  # no key to lose


def test_retry_after():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_s("7") == 7 and retry_after_s(None) is None
    assert retry_after_s("soon") is None and retry_after_s("-3") is None
    assert 25 < (retry_after_s(soon) or 0) <= 30
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_the_worst_cost_is_never_less():
    config = RemoteConfig(base_url="https://h/v1", model="m", price_in=1.0, price_out=1.0)
    talk = [Message("system", "ä" * 50), Message("user", "\ud800 half a character")]
    assert config.worst_cost(talk, ChatOptions(max_new_tokens=10)) * 1e6 > 10 + 100
    assert config.worst_cost(talk, ChatOptions()) * 1e6 > 1024
