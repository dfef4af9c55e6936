"""The thread that owns an engine: streams in order, cancelled, bounded, and never waited for."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from phikit.base.errors import ContextOverflowError
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.generate.sequence import Event
from phikit.serve.errors import ClosingError, QueueFullError
from phikit.serve.worker import WAKES_PER_S, EngineWorker, Stream

LONG = Request([1, 2, 3], 100, temperature=0.0)


@pytest.fixture
def engine(tiny_model) -> Engine:
    return Engine(tiny_model(), max_rows=8)


@pytest.fixture
def worker(engine: Engine):
    worker = EngineWorker(engine, max_queue=40)
    yield worker
    worker.close()
    assert engine.pool.available == engine.pool.size


def requests(count: int) -> list[Request]:
    return [
        Request([1 + i, 2, 3], 5 + i % 7, temperature=i % 2, seed=i, num_samples=1 + i % 3)
        for i in range(count)
    ]


def test_streams_read_in_threads_have_every_event_in_order(worker: EngineWorker, engine: Engine):
    asked = requests(20)
    expected = [Engine(engine.model).generate([request])[0] for request in asked]
    streams = [worker.submit(request) for request in asked]
    for stream, completions in zip(streams, expected, strict=True):
        tokens: dict[int, list[int]] = {}
        for event in stream:
            tokens.setdefault(event.sample, []).append(event.token)
        assert tokens == {i: c.tokens for i, c in enumerate(completions)}
        assert [c.tokens for c in stream.completions] == [c.tokens for c in completions]


def test_streams_read_in_an_event_loop(worker: EngineWorker, engine: Engine):
    asked = requests(20)
    expected = [Engine(engine.model).generate([request])[0] for request in asked]

    async def read(request: Request) -> int:
        return len([event async for event in worker.submit(request)])

    async def read_all() -> list[int]:
        return await asyncio.gather(*map(read, asked))

    counts = asyncio.run(read_all())
    assert counts == [sum(len(c.tokens) for c in completions) for completions in expected]


def test_readers_are_woken_only_so_often_and_at_once_for_a_beginning_and_an_end(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
):
    woken: list[int] = []
    wake = Stream._wake
    monkeypatch.setattr(Stream, "_wake", lambda self: (woken.append(id(self)), wake(self))[1])
    streams = [worker.submit(replace(LONG, seed=i)) for i in range(8)]
    began = time.monotonic()

    async def read(stream: Stream) -> list[int]:
        return [len(events) async for events in stream.batches()]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*map(read, streams))

    pieces = asyncio.run(read_all())
    seconds = time.monotonic() - began
    assert all(sum(of_one) == 100 for of_one in pieces)
    assert len(woken) <= seconds * WAKES_PER_S + 3 * len(streams)
    assert 2 * len(streams) <= sum(map(len, pieces)) < 800


def test_one_stream_at_a_time_is_told_before_its_end(worker: EngineWorker):
    """A first token is never held until the reply is whole."""

    async def first() -> list[Event]:
        async for events in worker.submit(LONG).batches():
            return events
        return []

    assert len(asyncio.run(first())) < 100


def test_a_reader_that_takes_nothing_holds_up_nobody(worker: EngineWorker):
    idle = worker.submit(LONG)
    assert len(list(worker.submit(LONG))) == 100
    assert len(list(idle)) == 100


def test_cancelling_ends_the_stream_and_frees_its_blocks(worker: EngineWorker, engine: Engine):
    with worker.submit(LONG) as stream:
        events = iter(stream)
        next(events)
    rest = list(events)
    assert len(rest) < 99
    assert stream.completions[0].finish_reason == "cancelled"
    assert worker.call(lambda: engine.pool.available == engine.pool.size).result()
    stream.cancel()


def test_the_queue_is_bounded_by_requests_without_a_token(engine: Engine):
    worker = EngineWorker(engine, max_queue=2)
    release, held = threading.Event(), threading.Event()
    worker.call(lambda: (held.set(), release.wait()))
    assert held.wait(5)
    streams = [worker.submit(LONG) for _ in range(2)]
    with pytest.raises(QueueFullError) as caught:
        worker.submit(LONG)
    assert caught.value.retry_after_s > 0
    assert worker.stats().waiting == 2
    release.set()
    assert [len(list(stream)) for stream in streams] == [100, 100]
    assert worker.stats().waiting == 0
    worker.close()


def test_what_cannot_run_is_refused_at_once(worker: EngineWorker):
    with pytest.raises(ContextOverflowError):
        worker.submit(Request([1], 1000))
    assert worker.stats() == worker.stats()._replace(running=0, waiting=0, requests=0)


def test_an_error_of_the_engine_reaches_every_stream_and_no_later_one(worker: EngineWorker):
    def broken(_: object) -> bool:
        raise ArithmeticError("a fault")

    streams = [worker.submit(LONG), worker.submit(Request([1], 9, stops=broken))]
    for stream in streams:
        with pytest.raises(ArithmeticError):
            list(stream)
    assert len(list(worker.submit(LONG))) == 100


def test_an_error_at_admission_concerns_one_stream(worker: EngineWorker):
    def broken() -> object:
        raise ArithmeticError("a fault")

    good, bad = worker.submit(LONG), worker.submit(Request([1], 9, constraint=broken))  # pyright: ignore
    with pytest.raises(ArithmeticError):
        list(bad)
    assert len(list(good)) == 100


def test_closing_drains_or_cancels(engine: Engine):
    worker = EngineWorker(engine)
    stream = worker.submit(LONG)
    worker.close(timeout_s=30)
    assert stream.completions[0].finish_reason == "length"
    with pytest.raises(ClosingError):
        worker.submit(LONG)

    worker = EngineWorker(engine)
    stream = worker.submit(LONG)
    worker.close()
    assert stream.done and stream.completions[0].finish_reason == "cancelled"
    assert engine.pool.available == engine.pool.size
