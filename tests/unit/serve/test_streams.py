"""Many clients at once, some gone, some slow: each text its own, and nothing left behind."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.unit.serve.house import House, at_hand, running, small_engine

from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf

MANY = 64


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


def dial(house: House) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(house.url.rpartition(":")[2])), timeout=20)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_leave_no_block(house: House, stream: bool):
    """Killed at once, in the middle of the reply, or after its first bytes."""
    wires = []
    for number in range(20):
        wire = dial(house)
        wire.sendall(raw_request(body(number, max_tokens=900, stream=stream, stop="never said")))
        wires.append(wire)
    for number, wire in enumerate(wires):
        if stream and number % 2:
            assert wire.recv(100)
        if number % 3 == 0:  # a reset in place of an orderly end
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wire.close()
    assert house.rests()


def test_a_slow_reader_stalls_nobody(house: House, alone: Callable[..., str]):
    slow = dial(house)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.sendall(raw_request(body(1, n=16, max_tokens=900, stop="never said", logprobs=True)))
    started = time.monotonic()
    with httpx2.Client(base_url=house.url, timeout=30) as client:
        answer = client.post("/v1/chat/completions", json=body(2, max_tokens=8, stream=False))
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == alone(house.loaded, "What is 2 + 7?", 8)
    assert time.monotonic() - started < 15
    slow.close()
    assert house.rests()


def test_a_server_that_stops_lets_replies_finish_or_cuts_them(tiny):

    shelf = ModelShelf({"tiny": at_hand(tiny)}, make_engine=small_engine)
    with running(shelf, limits=Limits(shutdown_s=1)) as url:
        house = House(url, shelf, tiny)
        short, long = dial(house), dial(house)
        short.sendall(raw_request(body(1, max_tokens=5, stream=False)))
        long.sendall(raw_request(body(2, max_tokens=900, stop="never said", n=16)))
        assert long.recv(100)
        engine = house.engine
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert b'"finish_reason"' in short.recv(65536)
    assert engine.pool.available == engine.pool.size
    short.close()
    long.close()
