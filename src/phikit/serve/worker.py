"""The thread that owns an engine, and the streams through which others hear from it.

An engine belongs to one thread. Requests come from event loops and from other threads; they are put
into an inbox, taken up between two steps, and their events handed to the stream of each. An event
is never waited for by the engine: a stream keeps what its reader has not taken, which is bounded by
the length of the reply. So a slow reader, or one that has gone, holds up nobody.

Readers are woken together, for a first token and for an end at once and else no more often than a
person sees: each time costs a chunk of HTTP, which takes a core from the step. So many streams come
in larger pieces, as with the `stream_interval` of vLLM and SGLang, and one stream token by token.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal, NamedTuple, Self, TypeVar

from phikit.generate.engine import Engine
from phikit.generate.request import Completion, Request
from phikit.generate.sequence import Event, Ticket
from phikit.serve.errors import ClosingError, QueueFullError

MAX_QUEUE = 256
"""Default bound on requests that wait for their first token."""
RETRY_AFTER_S = 2
WAKES_PER_S = 100
"""How often readers are woken, all streams together."""
LONGEST_HOLD_S = 0.1
"""A token is not held longer than this and one step, however many streams there are."""

T = TypeVar("T")


class Stats(NamedTuple):
    """How a worker is doing."""

    running: int
    """Samples in the batch."""
    waiting: int
    """Requests without a first token."""
    blocks_held: int
    blocks: int
    """Blocks of the cache in all."""
    requests: int
    """Taken so far."""
    prompt_tokens: int
    """Of the requests taken so far."""
    sampled_tokens: int
    """So far."""


class Stream:
    """The events of one request in order; those of several samples interleave.

    Iterate it once, in a thread (`for`) or in an event loop (`async for`, or `batches`). It ends
    after the last event, or when the request is cancelled; an error of the engine is raised.
    Leaving it as a context manager cancels what is left.
    """

    def __init__(self, request: Request, worker: "EngineWorker") -> None:
        self.request = request
        self.ticket: Ticket | None = None
        """None until the engine has taken the request up."""
        self._worker = worker
        self._events: deque[Event] = deque()
        self._state: Literal["open", "done", "cancelled"] = "open"
        self._error: BaseException | None = None
        self._has_news = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_heard = False
        """Its first token has come."""
        self._is_urgent = False
        """It has news that its reader is to have at once."""

    @property
    def done(self) -> bool:
        """Whether no more events will come."""
        return self._state != "open"

    @property
    def completions(self) -> list[Completion]:
        """The samples in order, once the stream is done; raises what ended it, if it failed."""
        assert self.done, "the stream still runs"
        if self._error is not None:
            raise self._error
        if self.ticket is None:
            return [Completion([], [], "cancelled", []) for _ in range(self.request.num_samples)]
        return self.ticket.completions

    def cancel(self) -> None:
        """End the request, from any thread; its blocks are free before the engine's next step."""
        if not self.done:
            self._worker._post(lambda: self._worker._drop(self))

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._has_news:
                self._has_news.wait_for(lambda: self._events or self.done)
            while self._events:
                yield self._events.popleft()
            if self.done and not self._events:
                break
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for events in self.batches():
            for event in events:
                yield event

    async def batches(self) -> AsyncIterator[list[Event]]:
        """The events in an event loop, those that have come by then together."""
        self._loop = asyncio.get_running_loop()
        while True:
            while self._events:
                yield self.take()
            if self.done and not self._events:
                break
            self._waiter = self._loop.create_future()
            # What came before the waiter was there has woken nobody.
            if not self._events and not self.done:
                await self._waiter
            self._waiter = None
        if self._error is not None:
            raise self._error

    def take(self) -> list[Event]:
        """What has come and was not taken yet, without waiting."""
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _end(self, state: Literal["done", "cancelled"], error: BaseException | None = None) -> None:
        self._error, self._state = error, state

    def _notify(self) -> None:
        """Wake readers in threads."""
        with self._has_news:
            self._has_news.notify_all()

    def _wake(self) -> None:
        """Wake the reader in an event loop; in the loop's own thread."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineWorker:
    """Runs an engine in a thread of its own; nothing else may step it.

    Args:
        max_queue: bounds the requests that wait for their first token.
        name: of the thread.
    """

    def __init__(self, engine: Engine, *, max_queue: int = MAX_QUEUE, name: str = "engine") -> None:
        self.engine, self.max_queue = engine, max_queue
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._streams: dict[Ticket, Stream] = {}
        self._news: set[Stream] = set()
        """Streams whose readers have something to take that they were not woken for."""
        self._rest_until = 0.0
        """Till when only urgent news is told, on the monotonic clock."""
        self._waiting = self._requests = self._prompt_tokens = self._sampled_tokens = 0
        self._is_closing = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request, from any thread.

        Raises:
            QueueFullError: `max_queue` requests wait already.
            ClosingError: the worker is closed, or about to be.
            PhikitError: as `Engine.check`.
        """
        self.engine.check(request)
        stream = Stream(request, self)
        with self._changed:
            self._check_open()
            if self._waiting >= self.max_queue:
                raise QueueFullError(
                    f"{self._waiting} requests wait already, as many as may",
                    retry_after_s=RETRY_AFTER_S,
                    fix="ask again later",
                )
            self._waiting += 1
            self._requests += 1
            self._prompt_tokens += len(request.prompt)
            self._inbox.append(lambda: self._admit(stream))
            self._changed.notify()
        return stream

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the engine's thread between two steps: anything else on its model.

        Raises:
            ClosingError: the worker is closed, or about to be.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            self._check_open()
            self._inbox.append(run)
            self._changed.notify()
        return future

    def stats(self) -> Stats:
        """Counts of this moment, from any thread."""
        pool = self.engine.pool
        return Stats(
            running=len(self.engine.scheduler.running),
            waiting=self._waiting,
            blocks_held=pool.size - pool.available,
            blocks=pool.size,
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            sampled_tokens=self._sampled_tokens,
        )

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self._inbox or self._streams or self.engine.busy)

    def close(self, timeout_s: float = 0.0) -> None:
        """Take no more requests, give those that run so long to finish, cancel the rest."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._is_closing:
            raise ClosingError

    def _post(self, action: Callable[[], None]) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._inbox.append(action)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            while self._inbox:
                self._inbox.popleft()()
            if self.engine.busy:
                self._step()
            self._wake_readers()
        for stream in list(self._streams.values()):
            self._drop(stream)
        while self._inbox:
            self._inbox.popleft()()
        for stream in list(self._streams.values()):
            self._drop(stream)
        self._wake_readers()

    def _wait(self) -> bool:
        """Until there is something to do; False when it is time to go."""
        with self._changed:
            while not (self._inbox or self.engine.busy or self._is_closing):
                self._changed.wait()
            has_work = bool(self._inbox or self.engine.busy)
            return not self._is_closed and (has_work or not self._is_closing)

    def _admit(self, stream: Stream) -> None:
        if stream.done:
            return
        try:
            ticket = self.engine.submit(stream.request)
        except BaseException as error:
            self._finish(stream, "done", error)
            return
        stream.ticket = ticket
        if ticket.done:
            self._finish(stream, "done")
        else:
            self._streams[ticket] = stream

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except BaseException as error:
            # Whose fault it was is not known, so all that run share the error; later ones do not.
            for stream in list(self._streams.values()):
                self._drop(stream, error)
            return
        self._sampled_tokens += len(events)
        for event in events:
            stream = self._streams.get(event.ticket)
            if stream is None:
                continue
            self._hear(stream)
            stream._events.append(event)
            self._news.add(stream)
        for ticket, stream in [(t, s) for t, s in self._streams.items() if t.done]:
            self._finish(stream, "done", ticket.error)

    def _drop(self, stream: Stream, error: BaseException | None = None) -> None:
        """Cancel a request, wherever it is."""
        if stream.done:
            return
        if stream.ticket is not None:
            self.engine.cancel(stream.ticket)
        self._finish(stream, "cancelled", error)

    def _finish(
        self,
        stream: Stream,
        state: Literal["done", "cancelled"],
        error: BaseException | None = None,
    ) -> None:
        self._hear(stream)
        if stream.ticket is not None:
            self._streams.pop(stream.ticket, None)
        stream._end(state, error)
        stream._is_urgent = True
        self._news.add(stream)

    def _hear(self, stream: Stream) -> None:
        """A stream waits no longer."""
        if not stream._is_heard:
            stream._is_heard = stream._is_urgent = True
            with self._changed:
                self._waiting -= 1

    def _wake_readers(self) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for stream in self._due():
            stream._is_urgent = False
            if stream._loop is None:
                stream._notify()
            else:
                by_loop.setdefault(stream._loop, []).append(stream)
        for loop, streams in by_loop.items():
            with suppress(RuntimeError):  # the loop has been closed, and its readers with it
                loop.call_soon_threadsafe(_wake_all, streams)

    def _due(self) -> set[Stream]:
        """The streams whose readers are to be woken now."""
        now = time.monotonic()
        if now >= self._rest_until:
            self._rest_until = now + min(LONGEST_HOLD_S, len(self._streams) / WAKES_PER_S)
            due = self._news
        else:
            due = {stream for stream in self._news if stream._is_urgent}
        self._news = self._news - due
        return due


def _wake_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream._wake()
