"""Strangers at the door: keys, names, sizes, slowness; each refused in bounded time."""

import base64
import http.client
import json
import socket
import threading
import time
from typing import Any

import httpx2
import pytest
from tests.unit.serve.house import House, at_hand, running, small_engine

from phikit.base.errors import ConfigError
from phikit.serve.guard import Policy
from phikit.serve.keys import VARIABLE, Keys, read_keys
from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf

KEYS = ("k" * 20, "other-key-0123456789")
ASK: Any = [{"role": "user", "content": "What is 12 + 7?"}]
CHAT: Any = {"model": "tiny", "messages": ASK, "temperature": 0}
POST = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Authorization: Bearer {KEYS[0]}\r\n"
)
LIMITS = Limits(
    max_body_bytes=1 << 20,
    max_header_bytes=8 << 10,
    header_timeout_s=1,
    body_timeout_s=1,
    write_timeout_s=1,
    request_timeout_s=30,
    shutdown_s=1,
)


@pytest.fixture(scope="module")
def shelf(tiny, seeing) -> ModelShelf:
    sources = {"tiny": at_hand(tiny), "org/seeing": at_hand(seeing)}
    return ModelShelf(sources, make_engine=small_engine)


@pytest.fixture(scope="module")
def url(shelf):
    """A server with keys and short limits."""
    with running(shelf, limits=LIMITS, policy=Policy(Keys(KEYS))) as url:
        yield url


@pytest.fixture
def client(url: str):
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def stranger(url: str):
    """Without a key."""
    with httpx2.Client(base_url=url, timeout=20) as client:
        yield client


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", "\xff"]
)
def test_a_wrong_key_opens_nothing(stranger: httpx2.Client, header: str | None):
    headers: Any = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        answer = stranger.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "no_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert isinstance(stranger.get("/api/tags", headers=headers).json()["error"], str)
    assert stranger.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(stranger: httpx2.Client, key: str):
    answer = stranger.get("/v1/models", headers={"Authorization": f"bearer {key}"})
    assert answer.status_code == 200


def test_keys_come_from_a_file_and_the_environment_and_are_never_printed(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEYS[0]}\n\n")
    monkeypatch.setenv(VARIABLE, f"{KEYS[1]},")
    keys = read_keys(file)
    assert all(keys.open(f"Bearer {key}".encode()) for key in KEYS)
    assert not any(key in f"{keys!r} {vars(keys)}" for key in KEYS)
    for bad in ("tiny", "with a blank inside it"):
        file.write_text(bad + "\n")
        with pytest.raises(ConfigError) as caught:
            read_keys(file)
        assert bad not in str(caught.value)
    file.write_text("")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_other_names_and_other_pages_are_refused(client: httpx2.Client, url: str):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/health", headers={"Host": "localhost:99"}).status_code == 200
    assert client.get("/health", headers={"Host": "[::1]:99"}).status_code == 200
    assert client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.get("/health", headers={"Origin": "null"}).status_code == 403
    assert client.get("/health", headers={"Origin": url}).status_code == 200


def test_a_page_that_may_ask_is_told_so(shelf):
    page = "https://page.example"
    sources = ModelShelf(shelf.sources)
    with running(sources, policy=Policy(Keys(KEYS), origins=[page])) as url:
        asks = {"Origin": page, "Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization, content-type"
        answer = httpx2.request("OPTIONS", url + "/v1/chat/completions", headers=asks)
        assert answer.headers["Access-Control-Allow-Origin"] == page
        other = httpx2.get(url + "/health", headers={"Origin": "https://other.example"})
        assert other.status_code == 403


def test_a_form_of_a_page_is_no_request(client: httpx2.Client):
    body = json.dumps(CHAT)
    answer = client.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("says_so", [True, False])
def test_a_large_body_is_refused_unread(url: str, says_so: bool):
    """By its announced length at once, by what comes as soon as it is too much."""
    started = time.monotonic()
    with connect(url) as wire:
        head = POST
        if says_so:
            wire.sendall(f"{head}Content-Length: 1000000000000\r\n\r\n".encode())
        else:
            wire.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
            try:
                for _ in range(1000):
                    wire.sendall(chunk)
            except OSError:  # the server has hung up
                return
        answer = http.client.HTTPResponse(wire)
        answer.begin()
        assert answer.status == 413
        assert "larger than" in json.loads(answer.read())["error"]["message"]
    assert time.monotonic() - started < 5


def test_a_header_without_end_is_refused_in_bounded_memory(url: str):
    sent = 0
    with connect(url) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        try:
            while sent < 1 << 30:
                wire.sendall(b"x" * (1 << 16))
                sent += 1 << 16
        except OSError:
            pass
    assert sent < 64 << 20


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
    ],
)
def test_headers_that_do_not_come_are_not_waited_for(url: str, begin: bytes):
    started = time.monotonic()
    with connect(url) as wire:
        wire.sendall(begin)
        while wire.recv(4096):
            pass
    assert time.monotonic() - started < 15


def test_a_body_that_does_not_come_is_not_waited_for(url: str):
    with connect(url) as wire:
        wire.sendall(f"{POST}Content-Length: 50\r\n\r\n{{".encode())
        answer = http.client.HTTPResponse(wire)
        answer.begin()
        assert answer.status == 408


def test_broken_media_are_refused(client: httpx2.Client, png: bytes):
    def ask(url: str) -> httpx2.Response:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "org/seeing", "messages": [{"role": "user", "content": content}]}
        return client.post("/v1/chat/completions", json=body)

    def data(content: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    broken = (
        data(png[: len(png) // 2]),
        data(b"GIF89a" + png),
        data(b""),
        "data:image/png;base64,&&&&",
        "data:image/png,plain",
        "data:",
        "file:///etc/passwd",
        "/etc/passwd",
        "https://example.com/cat.png",
        "http://127.0.0.1/cat.png",
    )
    for url in broken:
        answer = ask(url)
        assert answer.status_code == 400, url
        assert answer.json()["error"]["type"] == "invalid_request_error"
    body = {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data(png)}}]}
        ],
    }
    assert "reads text only" in client.post("/v1/chat/completions", json=body).text


def test_a_full_queue_says_when_to_ask_again(shelf: ModelShelf):
    one = ModelShelf({"tiny": shelf.sources["tiny"]}, make_engine=small_engine, max_queue=1)
    with running(one) as url, one.acquire("tiny") as model:
        release, held = threading.Event(), threading.Event()
        model.worker.call(lambda: (held.set(), release.wait()))
        assert held.wait(5)
        answers: list[httpx2.Response] = []
        ask = lambda: answers.append(  # noqa: E731
            httpx2.post(url + "/v1/chat/completions", json={**CHAT, "max_tokens": 3}, timeout=20)
        )
        waiting = threading.Thread(target=ask)
        waiting.start()
        while not model.worker.stats().waiting:
            time.sleep(0.01)
        ask()
        release.set()
        waiting.join()
    refused, served = answers
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert served.status_code == 200


def test_a_reply_that_takes_too_long_is_given_up(shelf: ModelShelf):
    own = ModelShelf({"tiny": shelf.sources["tiny"]}, make_engine=small_engine)
    limits = LIMITS.model_copy(update={"request_timeout_s": 0.2})
    body = {**CHAT, "max_tokens": 990, "stop": ["never said by anybody"]}
    with running(own, limits=limits) as url:
        answer = httpx2.post(url + "/v1/chat/completions", json=body, timeout=20)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        with httpx2.stream(
            "POST", url + "/v1/chat/completions", json={**body, "stream": True}
        ) as s:
            last = [line for line in s.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        [model] = own.loaded
        assert House(url, own, model.loaded).rests()


def test_metrics_count(client: httpx2.Client):
    client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3})
    client.get("/no/such/path/chosen/by/a/stranger")
    text = client.get("/metrics").text
    assert 'phikit_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'phikit_engine_sampled_tokens_total{model="tiny"}' in text
    assert "stranger" not in text and 'path="other"' in text


def test_keys_are_in_no_answer_and_no_log(client: httpx2.Client, caplog):
    texts = [client.get(path).text for path in ("/metrics", "/openapi.json", "/v1/models")]
    client.post("/v1/chat/completions", content=b"{")
    assert not any(key in text for key in KEYS for text in [*texts, caplog.text])
