"""Many clients at once, some gone, some slow: each text its own, and nothing left behind."""

import asyncio
import gc
import json
import socket
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.unit.serve.house import House, at_hand, running, small_engine

from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf

MANY = 64
KILLED, AT_ONCE = 200, 50


def body(number: int, **more: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": f"What is {number} + 7?"}]
    return {"model": "tiny", "messages": talk, "temperature": 0, "stream": True, **more}


async def read(client: httpx2.AsyncClient, number: int, length: int) -> str:
    text = ""
    ask = client.stream("POST", "/v1/chat/completions", json=body(number, max_tokens=length))
    async with ask as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("content") or ""
    return text


def test_many_streams_each_say_what_they_say_alone(house: House, alone: Callable[..., str]):
    async def ask_all() -> list[str]:
        limits = httpx2.Limits(max_connections=MANY)
        async with httpx2.AsyncClient(base_url=house.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(read(client, number, 12) for number in range(MANY)))

    texts = asyncio.run(ask_all())
    assert texts == [alone(house.loaded, f"What is {n} + 7?", 12) for n in range(MANY)]
    assert house.rests()


def raw_request(request: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def dial(house: House, *, buffer_bytes: int | None = None) -> socket.socket:
    """A connection; with few bytes of buffer its other side soon notices that nobody reads."""
    wire = socket.socket()
    wire.settimeout(20)
    if buffer_bytes is not None:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    wire.connect(("127.0.0.1", int(house.url.rpartition(":")[2])))
    return wire


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_leave_no_block(house: House, stream: bool):
    """Killed at once, in the middle of the reply, or after its first bytes."""
    for first in range(0, KILLED if stream else AT_ONCE, AT_ONCE):
        wires = []
        for number in range(first, first + AT_ONCE):
            wire = dial(house)
            asked = body(number, max_tokens=900, stream=stream, stop="never said")
            wire.sendall(raw_request(asked))
            wires.append(wire)
        for number, wire in enumerate(wires):
            if stream and number % 2:
                assert wire.recv(100)
            if number % 3 == 0:  # a reset in place of an orderly end
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            wire.close()
        assert house.rests()


def test_a_slow_reader_stalls_nobody(house: House, alone: Callable[..., str]):
    slow = dial(house, buffer_bytes=4096)
    slow.sendall(raw_request(body(1, n=16, max_tokens=900, stop="never said", logprobs=True)))
    started = time.monotonic()
    with httpx2.Client(base_url=house.url, timeout=30) as client:
        answer = client.post("/v1/chat/completions", json=body(2, max_tokens=8, stream=False))
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == alone(house.loaded, "What is 2 + 7?", 8)
    assert time.monotonic() - started < 15
    slow.close()
    assert house.rests()


def test_a_reader_that_takes_nothing_is_given_up(tiny):
    """While its connection stays open: what holds blocks is its reply, not its wire."""
    shelf = ModelShelf({"tiny": at_hand(tiny)}, make_engine=small_engine)
    with running(shelf, limits=Limits(shutdown_s=1, write_timeout_s=0.5)) as url:
        house = House(url, shelf, tiny)
        idle = dial(house, buffer_bytes=4096)
        long = {"n": 16, "max_tokens": 900, "stop": "never said"}
        idle.sendall(raw_request(body(1, **long, logprobs=True, top_logprobs=20)))
        assert idle.recv(100)
        assert not house.rests(0.3)
        assert house.rests(60)
        [model] = shelf.loaded
        assert model.worker.stats().sampled_tokens < 16 * 900
        counted = httpx2.get(f"{url}/metrics").text
        assert 'path="/v1/chat/completions",status="200"' in counted
        idle.close()


def test_requests_leave_no_memory_behind(house: House):
    """After the first ones, which fill caches, a hundred more add next to nothing."""

    async def ask(first: int) -> None:
        async with httpx2.AsyncClient(base_url=house.url, timeout=60) as client:
            for start in range(first, first + 100, 20):
                numbers = range(start, start + 20)
                await asyncio.gather(*(read(client, number, 6) for number in numbers))

    def traced(first: int) -> int:
        asyncio.run(ask(first))
        assert house.rests()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        traced(1000)
        before = traced(1100)
        after = traced(1200)
    finally:
        tracemalloc.stop()
    assert after - before < 100 * 1024  # one kB a request; its tokens alone would be more


def test_a_server_that_stops_lets_replies_finish_or_cuts_them(tiny):
    shelf = ModelShelf({"tiny": at_hand(tiny)}, make_engine=small_engine)
    with running(shelf, limits=Limits(shutdown_s=3)) as url:
        house = House(url, shelf, tiny)
        short, long, whole = dial(house), dial(house), dial(house)
        endless = {"max_tokens": 900, "stop": "never said", "n": 16}
        short.sendall(raw_request(body(1, max_tokens=5, stream=False)))
        long.sendall(raw_request(body(2, **endless)))
        whole.sendall(raw_request(body(3, **endless, stream=False)))
        assert long.recv(100)
        engine = house.engine
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert b'"finish_reason"' in short.recv(65536)
    assert whole.recv(65536).startswith(b"HTTP/1.1 503")
    assert engine.pool.available == engine.pool.size
    for wire in (short, long, whole):
        wire.close()
