import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.stub_endpoint import StubServer, fails, hangs_up, says, slow, stub_endpoint

from phikit.base.errors import (
    ChatError,
    ConfigError,
    ContextOverflowError,
    RemoteError,
    ReplyTimeoutError,
    WeightsError,
)
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.chat import ChatOptions, ChatReply, LocalChat
from phikit.generate.language_model import LanguageModel
from phikit.generate.reply import Piece
from phikit.models.dense import DenseModel
from phikit.serve.hybrid import open_router, read_router_config
from phikit.serve.router import RoutedReply, Router, RouterConfig

KEY = "sk-very-secret-0123456789"
CLOUD = '[cloud]\nbase_url = "https://h/v1"\nmodel = "m"\n'
ASK = [Message("user", "What is 3 + 4? It is my secret.")]


def reply(text: str, *, mean: float = -0.1, least: float = -1.0, **changes: Any) -> ChatReply:
    values = {"finish_reason": "stop", "prompt_tokens": 9, "reply_tokens": 4} | changes
    return ChatReply(Message("assistant", text), mean_log_prob=mean, min_log_prob=least, **values)


@dataclass
class Scripted:
    """A `Chat` that says what it is told, or raises it."""

    says: Sequence[ChatReply] | Exception
    asked: list[ChatOptions] = field(default_factory=list)

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        self.asked.append(options)
        if isinstance(self.says, Exception):
            raise self.says
        return list(self.says)

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        [whole] = self.answer(messages, options)
        yield Piece(whole.message.content[:3])
        yield Piece(whole.message.content[3:])
        yield whole


Make = Callable[..., Router]


@pytest.fixture
def server() -> Iterator[StubServer]:
    with stub_endpoint() as server:
        yield server


@pytest.fixture
def make(server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a router of a scripted local side and the stub as its cloud."""
    monkeypatch.setenv("CLOUD_KEY", KEY)

    def make(says: Any, *, score: Any = None, **changes: Any) -> Router:
        cloud = {"base_url": server.url, "model": "big", "api_key_env": "CLOUD_KEY"}
        cloud |= {"price_in": 1.0, "price_out": 2.0, "retries": 0, "timeout_s": 0.5}
        values = {"local": "small", "cloud": cloud, "budget": {"calls_per_run": 100}}
        config = RouterConfig.resolve(values | {"log": tmp_path / "log.jsonl"} | changes)
        return open_router(config, None if says is None else Scripted(says), score=score)

    return make


def log(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def unsure_below(threshold: float, signal: str = "log_prob", **changes: Any) -> dict[str, Any]:
    return {"signal": signal, "threshold": threshold, **changes}


def test_local_first(make: Make, server: StubServer, tmp_path: Path):
    routed = make([reply("7")]).answer(ASK, ChatOptions(seed=5))
    assert (routed.route, routed.reason, routed.cost, routed.note) == ("local", None, 0.0, None)
    assert routed.reply.message.content == "7" and not server.requests
    [line] = log(tmp_path)
    assert (line["route"], line["reason"], line["local_tokens"], line["cost"]) == (
        "local",
        None,
        4,
        0,
    )


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (None, "absent"),
        (WeightsError("no such model"), "absent"),
        (ContextOverflowError("too long"), "context"),
        (ReplyTimeoutError("too slow"), "failure"),
        (RuntimeError("out of memory"), "failure"),
        (ChatError("no words for tools"), "failure"),
    ],
)
def test_why_the_cloud_is_asked(
    make: Make, server: StubServer, tmp_path: Path, says: Any, reason: str
):
    router = make(says)
    routed = router.answer(ASK, ChatOptions(max_new_tokens=33))
    assert (routed.route, routed.reason, routed.note) == ("cloud", reason, None)
    assert routed.cost == pytest.approx((11 + 2 * 5) / 1e6)
    assert server.requests[0][2]["max_tokens"] == 33
    [line] = log(tmp_path)
    wanted = {"route": "cloud", "reason": reason, "cloud_tokens_in": 11, "cloud_tokens_out": 5}
    assert wanted.items() <= line.items() and line["cost"] == routed.cost
    assert 0 <= line["local_s"] <= line["seconds"] and line["time"].startswith("20")
    everything = tuple({"absent", "context", "failure", "unsure"} - {reason})
    router = make(says, reasons=everything)
    with pytest.raises(Exception, match=str(says) if says else "is not here"):
        router.answer(ASK, ChatOptions())
    assert len(server.requests) == 1
    line = log(tmp_path)[-1]
    assert (line["route"], line["reason"]) == (None, reason)
    assert line["error"] == (type(says).__name__ if says else "UnknownModelError")


def test_mistakes_of_the_user_cost_nothing(make: Make, server: StubServer):
    with pytest.raises(ConfigError, match="temperature"):
        make(ConfigError("temperature is -1")).answer(ASK, ChatOptions())
    with pytest.raises(ConfigError, match="one reply"):
        make([reply("7")]).answer(ASK, ChatOptions(num_samples=2))
    with pytest.raises(AssertionError):  # a bug of ours is no reason to spend money
        make(AssertionError()).answer(ASK, ChatOptions())
    assert not server.requests


@pytest.mark.parametrize(
    ("signal", "sure", "unsure"), [("log_prob", -0.2, -0.05), ("weakest", -1.5, -0.5)]
)
def test_likelihood(make: Make, signal: str, sure: float, unsure: float):
    says = [reply("7", mean=-0.1, least=-1.0)]
    routed = make(says, confidence=unsure_below(sure, signal)).answer(ASK, ChatOptions())
    assert (routed.route, routed.reason) == ("local", None)
    assert routed.confidence == (-0.1 if signal == "log_prob" else -1.0)
    routed = make(says, confidence=unsure_below(unsure, signal)).answer(ASK, ChatOptions())
    assert (routed.route, routed.reason) == ("cloud", "unsure")


def test_agreement(make: Make, tmp_path: Path):
    texts = ["It is \\boxed{7}.", "\\boxed{8}", "So $\\boxed{7.0}$", "\\boxed{7}", "no idea"]
    says = [reply(text, mean=-i / 10) for i, text in enumerate(texts)]
    says.append(reply("\\boxed{7", finish_reason="length"))
    router = make(says, confidence=unsure_below(0.3, "agreement", samples=6, temperature=0.7))
    routed = router.answer(ASK, ChatOptions(temperature=0.0))
    assert (routed.route, routed.confidence) == ("local", 2 / 6)
    assert routed.reply.message.content == texts[0]
    assert router.local.asked[0].num_samples == 6 and router.local.asked[0].temperature == 0.7  # type: ignore[union-attr]
    assert log(tmp_path)[0]["local_tokens"] == 24 and log(tmp_path)[0]["threshold"] == 0.3
    router = make(says, confidence=unsure_below(0.34, "agreement"))
    assert router.answer(ASK, ChatOptions()).route == "cloud"


def test_a_scorer_that_was_handed_in(make: Make):
    def score(messages: Sequence[Message], reply: ChatReply) -> float:
        return 0.9 if reply.message.content == "7" else 0.1

    policy = {"confidence": unsure_below(0.5, "scorer"), "score": score}
    assert make([reply("7")], **policy).answer(ASK, ChatOptions()).route == "local"
    routed = make([reply("8")], **policy).answer(ASK, ChatOptions())
    assert (routed.route, routed.confidence) == ("cloud", 0.1)
    with pytest.raises(ConfigError, match="needs a scorer"):
        make([reply("7")], confidence=unsure_below(0.5, "scorer"))


@pytest.mark.parametrize("failure", [fails(500), fails(401), hangs_up, slow(1.0)])
def test_the_local_answer_stands_in_for_a_cloud_that_fails(
    make: Make, server: StubServer, tmp_path: Path, failure: Any
):
    server.default = failure
    routed = make([reply("7")], confidence=unsure_below(0.0)).answer(ASK, ChatOptions())
    assert (routed.route, routed.reason, routed.cost) == ("local", "unsure", 0.0)
    assert routed.reply.message.content == "7" and "Error: " in (routed.note or "")
    [line] = log(tmp_path)
    assert (line["route"], line["note"], line["error"]) == ("local", routed.note, None)


def test_where_both_fail_the_local_error_is_told(make: Make, server: StubServer, tmp_path: Path):
    server.default = fails(500)
    with pytest.raises(ContextOverflowError, match="too long"):
        make(ContextOverflowError("too long")).answer(ASK, ChatOptions())
    [line] = log(tmp_path)
    assert line["route"] is None and line["error"] == "ContextOverflowError"
    assert "RemoteUnavailableError" in line["note"]


def test_a_spent_budget_keeps_requests_here(make: Make, server: StubServer, tmp_path: Path):
    router = make(
        [reply("7")], confidence=unsure_below(0.0), budget={"calls_per_run": 1, "cost_per_run": 1.0}
    )
    routes = [router.answer(ASK, ChatOptions()) for _ in range(3)]
    assert [routed.route for routed in routes] == ["cloud", "local", "local"]
    assert "BudgetError" in (routes[1].note or "") and len(server.requests) == 1
    assert [line["route"] for line in log(tmp_path)] == ["cloud", "local", "local"]


def test_streams(make: Make, server: StubServer, tmp_path: Path):
    def texts(router: Router) -> tuple[list[str], RoutedReply]:
        *pieces, routed = router.stream(ASK, ChatOptions())
        assert isinstance(routed, RoutedReply)
        return [piece.content for piece in pieces if isinstance(piece, Piece)], routed

    pieces, routed = texts(make([reply("It is 7")]))
    assert pieces == ["It ", "is 7"] and routed.route == "local"
    pieces, routed = texts(make(None))
    assert len(pieces) == 2 and "".join(pieces) == "Answer: \\boxed{7}"
    assert (routed.route, routed.cost) == ("cloud", pytest.approx(21 / 1e6))
    # What confidence decides is shown when it is known to stand.
    pieces, routed = texts(make([reply("It is 7")], confidence=unsure_below(-0.5)))
    assert pieces == ["It is 7"] and routed.route == "local"
    pieces, routed = texts(make([reply("It is 8")], confidence=unsure_below(0.0)))
    assert len(pieces) == 2 and routed.route == "cloud"
    server.default = fails(503)
    pieces, routed = texts(make([reply("It is 8")], confidence=unsure_below(0.0)))
    assert pieces == ["It is 8"] and routed.route == "local" and routed.note is not None
    assert [line["route"] for line in log(tmp_path)] == [
        "local",
        "cloud",
        "local",
        "cloud",
        "local",
    ]


def test_streams_that_break_or_are_left(make: Make, server: StubServer, tmp_path: Path):
    def half(request: Any) -> None:
        event = b'data: {"choices": [{"delta": {"content": "It"}}]}\n\n'
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(event)
        request.close_connection = True

    server.default = half
    stream = make([reply("7")], confidence=unsure_below(0.0)).stream(ASK, ChatOptions())
    assert next(stream) == Piece("It")
    with pytest.raises(RemoteError, match="broke off"):
        next(stream)
    stream = make([reply("It is 7")]).stream(ASK, ChatOptions())
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert [line["error"] for line in log(tmp_path)] == ["RemoteUnavailableError", "GeneratorExit"]


def test_the_log_holds_no_key_and_no_text(make: Make, server: StubServer, tmp_path: Path):
    server.script = [says("my answer"), fails(500, KEY.encode()), fails(400, KEY.encode())]
    router = make([reply("my answer")], confidence=unsure_below(0.0))
    threads = [threading.Thread(target=router.answer, args=(ASK, ChatOptions())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log(tmp_path)) == 3
    text = (tmp_path / "log.jsonl").read_text()
    assert KEY not in text and "secret" not in text and "my answer" not in text
    assert "[key]" in text
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o077 == 0


def test_without_a_cloud_no_socket_is_opened(tmp_path: Path):
    events: list[str] = []
    is_on = True

    def watch(event: str, _: object) -> None:
        if is_on and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            events.append(event)

    sys.addaudithook(watch)
    router = open_router(RouterConfig(local="small"), Scripted([reply("7")]))
    assert router.answer(ASK, ChatOptions()).route == "local"
    for failure in (WeightsError("a"), ContextOverflowError("b"), RuntimeError("c")):
        with pytest.raises(type(failure)):
            open_router(RouterConfig(local="small"), Scripted(failure)).answer(ASK, ChatOptions())
    config = RouterConfig.resolve({"local": "small", "confidence": unsure_below(0.0)})
    routed = open_router(config, Scripted([reply("7")])).answer(ASK, ChatOptions())
    assert (routed.route, routed.reason) == ("local", "unsure")
    is_on = False
    assert not events and list(tmp_path.iterdir()) == []


def test_configs_from_files(tmp_path: Path):
    toml = tmp_path / "router.toml"
    toml.write_text(
        'local = "smollm2"\nlog = "router.jsonl"\n'
        '[cloud]\nbase_url = "https://example.com/v1"\nmodel = "big"\nprice_in = 0.1\n'
        '[confidence]\nsignal = "log_prob"\nthreshold = -0.1\n'
        "[budget]\ncost_per_run = 0.5\n"
    )
    config = read_router_config(toml)
    assert config.cloud is not None and config.cloud.model == "big"
    plain = tmp_path / "router.json"
    plain.write_text(config.model_dump_json())
    assert read_router_config(plain) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("local = ", "neither TOML nor JSON"),
        ('locl = "a"', "did you mean"),
        (f'local = "a"\n{CLOUD}', "needs a budget"),
        (f'local = "a"\n{CLOUD}[budget]\ncost_per_run = 1', "price_in"),
        (f'local = "a"\n{CLOUD}api_key = "{KEY}"', "api_key: unknown setting"),
    ],
)
def test_bad_configs(tmp_path: Path, text: str, words: str):
    path = tmp_path / "router.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_router_config(path)
    assert KEY not in str(caught.value)


def test_a_real_model_and_a_timeout(
    nano_tokenizer: Tokenizer, tiny_model: Callable[..., DenseModel]
):
    model = LanguageModel(
        tiny_model(vocab_size=nano_tokenizer.size, max_context=128),
        nano_tokenizer,
        renderer_for(nano_tokenizer, "phi4-mini"),
        Path("here"),
    )
    chat = LocalChat(model)
    ask = [Message("user", "3 + 4?")]
    options = ChatOptions(max_new_tokens=20, temperature=0.8, num_samples=3)
    whole = chat.answer(ask, options)
    assert len(whole) == 3 and whole[0].prompt_tokens > 3
    assert all(r.mean_log_prob is not None and r.min_log_prob is not None for r in whole)
    *pieces, streamed = chat.stream(ask, options)
    assert streamed == whole[0]
    said = "".join(piece.content for piece in pieces if isinstance(piece, Piece))
    thought = "".join(piece.thinking for piece in pieces if isinstance(piece, Piece))
    assert (said, thought or None) == (whole[0].message.content, whole[0].message.thinking)
    with pytest.raises(ContextOverflowError):
        chat.answer([Message("user", "too long " * 100)], options)
    with pytest.raises(ReplyTimeoutError, match="1e-06 s"):
        chat.answer(ask, ChatOptions(max_new_tokens=100, timeout_s=1e-6))
    assert chat.answer(ask, options) == whole  # nothing is left behind
