"""URLs that a stranger names: read where they are harmless, and nowhere else."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from phikit.serve import media
from phikit.serve.errors import RefusedError
from phikit.serve.media import Fetcher, decode_data_url, is_public

CLOSED, OPEN = Fetcher(), Fetcher(allows_remote=True, max_bytes=100)


def read(url: str, fetcher: Fetcher = OPEN) -> bytes:
    return asyncio.run(fetcher.read(url, param="image"))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool):
    assert is_public(address) is public


def test_data_urls():
    assert decode_data_url("data:image/png;base64,aGk=", param="x") == b"hi"
    assert decode_data_url("DATA:;base64,aGk=", param="x") == b"hi"
    assert read("data:audio/wav;charset=x;base64,aGk=", CLOSED) == b"hi"
    for bad in (
        "data:image/png,hi",
        "data:image/png;base64,a",
        "data:;base64,",
        "data:;base64,a b=",
    ):
        with pytest.raises(RefusedError) as caught:
            decode_data_url(bad, param="messages.0")
        assert caught.value.param == "messages.0"


def test_nothing_is_fetched_unless_allowed(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was resolved"))
    for url in ("http://example.com/a.png", "https://8.8.8.8/", "HTTP://localhost"):
        with pytest.raises(RefusedError, match="fetches nothing"):
            read(url, CLOSED)
    for url in (
        "file:///etc/passwd",
        "ftp://example.com/a",
        "gopher://x",
        "//example.com",
        "a.png",
    ):
        with pytest.raises(RefusedError, match="no data URL"):
            read(url)


async def flow(content: bytes) -> AsyncIterator[bytes]:
    yield content


class Web:
    """Names with addresses, and answers by (address, Host)."""

    def __init__(self, monkeypatch: Any, names: dict[str, list[str]]) -> None:
        self.names, self.asked = names, list[tuple[str, str]]()
        self.answers: dict[str, httpx2.Response] = {}
        real = httpx2.AsyncClient

        async def handle(request: httpx2.Request) -> httpx2.Response:
            assert request.extensions["sni_hostname"] == request.headers["host"]
            self.asked.append((request.url.host, request.headers["host"]))
            return self.answers[request.headers["host"]]

        def client(**options: Any) -> httpx2.AsyncClient:
            assert options["trust_env"] is False and options["follow_redirects"] is False
            return real(transport=httpx2.MockTransport(handle), **options)

        async def resolve(_: Any, host: str, port: int, **__: Any) -> list[Any]:
            if host not in self.names:
                raise socket.gaierror
            return [(0, 0, 0, "", (address, port)) for address in self.names[host]]

        monkeypatch.setattr(media.httpx2, "AsyncClient", client)
        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)


def test_a_name_is_pinned_to_its_public_address(monkeypatch):
    web = Web(monkeypatch, {"a.example": ["8.8.8.8"], "b.example": ["2606:4700::1"]})
    moved = {"location": "https://b.example/there"}
    web.answers = {
        "a.example": httpx2.Response(302, headers=moved),
        "b.example": httpx2.Response(200, content=flow(b"picture")),
    }
    assert read("http://a.example/here") == b"picture"
    assert web.asked == [("8.8.8.8", "a.example"), ("2606:4700::1", "b.example")]


@pytest.mark.parametrize(
    "url",
    [
        "http://inside.example/",
        "http://half.example/",
        "http://moved.example/",
        "http://metadata.example/",
        "http://a.example:8080/",
        "http://user:pass@a.example/",
        "http://nowhere.example/",
        "http://round.example/",
        "http://large.example/",
        "http://absent.example/",
        "http://[::1/",
        "http://",
    ],
)
def test_what_is_not_fetched(monkeypatch, url: str):
    names = ("a", "moved", "round", "large", "absent")
    web = Web(
        monkeypatch,
        {
            **{f"{name}.example": ["8.8.8.8"] for name in names},
            "inside.example": ["10.0.0.1"],
            "half.example": ["8.8.8.8", "127.0.0.1"],
            "metadata.example": ["169.254.169.254"],
        },
    )
    web.answers = {
        "a.example": httpx2.Response(200, content=flow(b"picture")),
        "moved.example": httpx2.Response(307, headers={"location": "http://inside.example/"}),
        "round.example": httpx2.Response(301, headers={"location": "/again"}),
        "large.example": httpx2.Response(200, content=flow(b"x" * 101)),
        "absent.example": httpx2.Response(404),
    }
    with pytest.raises(RefusedError):
        read(url)
    assert all(address == "8.8.8.8" for address, _ in web.asked)
