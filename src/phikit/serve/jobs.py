"""From a request to its replies: find the model, queue, read, and leave nothing behind.

Everything a request holds (the model, its place in the batch, the right to bring media) hangs on an
`AsyncExitStack` that the guard closes when the connection ends, however it ends. So a client that
goes away frees its blocks at once.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from phikit.base.errors import PhikitError, ReplyTimeoutError
from phikit.generate.language_model import LanguageModel, stop_strings
from phikit.generate.reply import ReplyReader
from phikit.generate.request import Completion, Request
from phikit.generate.sequence import Event
from phikit.serve.errors import (
    ClientGoneError,
    ClosingError,
    ModelUnavailableError,
    QueueFullError,
    UnknownModelError,
)
from phikit.serve.limits import Limits
from phikit.serve.metrics import Metrics
from phikit.serve.models import ModelShelf, ServedModel
from phikit.serve.worker import RETRY_AFTER_S, Stream

log = logging.getLogger("phikit.serve")

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
"""What a server calls for the next message of a connection."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for the engine, and how its replies are to be read."""

    request: Request
    is_chat: bool
    opening: tuple[int, ...] = ()
    """Ids at the end of the prompt that belong to the reply."""
    closes: tuple[int, ...] = ()
    """Ids that complete a reply which ended by itself."""

    def reader(self, loaded: LanguageModel) -> ReplyReader:
        """Reads one sample."""
        strings = stop_strings(self.request)
        return ReplyReader(loaded, strings=strings, is_chat=self.is_chat, opening=self.opening)


class Heard(NamedTuple):
    """Events that have come together, all of one prompt."""

    prompt: int
    events: list[Event]


@dataclass
class Job:
    """What one HTTP request has running."""

    served: ServedModel
    asked: list[Asked]
    """One for each prompt."""
    streams: list[Stream]
    metrics: Metrics
    started: float
    timeout_s: float
    first_token_s: float | None = None
    """From the start to the first token, in seconds."""
    is_late: bool = field(default=False, init=False)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(asked.request.prompt) for asked in self.asked)

    @property
    def sampled_tokens(self) -> int:
        """So far."""
        return sum(
            sample.said
            for stream in self.streams
            if stream.ticket is not None
            for sample in stream.ticket.samples
        )

    async def hear(self) -> AsyncIterator[Heard]:
        """All events as they come.

        Raises ReplyTimeoutError when time is up, and what the engine fails with.
        """
        timer = asyncio.get_running_loop().call_later(
            max(0.0, self.started + self.timeout_s - time.monotonic()), self._give_up
        )
        try:
            async for heard in _merged(self.streams):
                if self.first_token_s is None:
                    self.first_token_s = time.monotonic() - self.started
                    self.metrics.first_token(self.served.name, self.first_token_s)
                yield heard
        finally:
            timer.cancel()
        if self.is_late:
            raise ReplyTimeoutError(
                f"the reply was not finished within {self.timeout_s:g} s",
                fix="ask for fewer tokens, or stream",
            )
        if any(c.finish_reason == "cancelled" for s in self.streams for c in s.completions):
            raise ClosingError

    async def completions(self) -> list[list[Completion]]:
        """The samples of each prompt, when all are done; raises as `hear`."""
        async for _ in self.hear():
            pass
        return [stream.completions for stream in self.streams]

    def _give_up(self) -> None:
        self.is_late = True
        for stream in self.streams:
            stream.cancel()


class Service:
    """The models behind a server, and what it lets one request have."""

    def __init__(self, shelf: ModelShelf, limits: Limits, metrics: Metrics) -> None:
        self.shelf, self.limits, self.metrics = shelf, limits, metrics
        self._running = Counter[str]()

    async def model(self, exits: AsyncExitStack, name: str) -> ServedModel:
        """A model, held until the request ends.

        Raises:
            UnknownModelError: there is none of this name.
            ModelUnavailableError: it cannot be loaded; the log says why.
            QueueFullError: there is no room for it now.
        """
        try:
            return await exits.enter_async_context(self.shelf.acquire_async(name))
        except (UnknownModelError, QueueFullError, ClosingError):
            raise
        except PhikitError as error:
            log.exception("the model %r cannot be loaded", name)
            raise ModelUnavailableError(
                f"the model {name!r} cannot be loaded: {error.what}", fix=error.fix
            ) from error

    async def start(
        self,
        exits: AsyncExitStack,
        name: str,
        ask: Callable[[LanguageModel], list[Asked]],
        *,
        has_media: bool = False,
    ) -> Job:
        """Find the model, make the requests in a thread, and queue them.

        Raises:
            QueueFullError: too many wait, or too many with media run.
            PhikitError: as `model`, and whatever `ask` and the engine refuse.
        """
        started = time.monotonic()
        if has_media:
            most = self.limits.max_media_requests
            exits.enter_context(self.place("with images or audio", most))
        served = await self.model(exits, name)
        asked = await asyncio.to_thread(ask, served.loaded)
        streams = [exits.enter_context(served.worker.submit(each.request)) for each in asked]
        timeout_s = self.limits.request_timeout_s
        return Job(served, asked, streams, self.metrics, started, timeout_s)

    @contextmanager
    def place(self, kind: str, most: int) -> Iterator[None]:
        """The right to be one of at most so many requests of a kind.

        Raises QueueFullError if that many run already.
        """
        if self._running[kind] >= most:
            raise QueueFullError(
                f"{most} requests {kind} run already",
                retry_after_s=RETRY_AFTER_S,
                fix="ask again later",
            )
        self._running[kind] += 1
        try:
            yield
        finally:
            self._running[kind] -= 1


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, given up when the client closes its connection.

    Raises ClientGoneError if it does.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("the client has closed its connection")
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[Heard]:
    """Events of all streams, those of one that came together in one piece."""
    if len(streams) == 1:
        async for events in streams[0].batches():
            yield Heard(0, events)
        return
    heard: asyncio.Queue[Heard | BaseException | None] = asyncio.Queue()

    async def read(prompt: int, stream: Stream) -> None:
        try:
            async for events in stream.batches():
                heard.put_nowait(Heard(prompt, events))
        except Exception as error:
            heard.put_nowait(error)
        heard.put_nowait(None)

    tasks = [asyncio.create_task(read(*each)) for each in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            item = await heard.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
