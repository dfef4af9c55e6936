"""What every request passes before any other code sees it, and what cleans up after it. Plain ASGI.

In this order: the name the client called us by, the page it comes from, its key, the size of its
body. A body is read here, whole and bounded, so that what comes after can neither wait for it nor
be flooded by it; no key, no body.

Why the name is looked at: a page in the user's browser can make a name of its own point at this
machine (DNS rebinding) and then read what a server without keys answers. Its `Host` gives it away.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from phikit.serve.errors import ClientGoneError, ClosingError
from phikit.serve.faults import Fault, fault_of
from phikit.serve.keys import Keys
from phikit.serve.limits import Limits
from phikit.serve.metrics import Metrics
from phikit.serve.worker import RETRY_AFTER_S

log = logging.getLogger("phikit.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

EXITS = "phikit.exits"
"""Where a request's `AsyncExitStack` is in its scope."""
OPEN_PATHS = ("/health",)
"""What needs no key."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
BODIES = 8
"""So many bodies of the largest size may be held at once."""


@dataclass(frozen=True)
class Policy:
    """Who may ask."""

    keys: Keys = field(default_factory=Keys)
    hosts: Collection[str] | None = LOCAL_HOSTS
    """Names the server goes by; None for any."""
    origins: Collection[str] = ()
    """Web pages that may ask from a browser, beside those this server sends itself; "*" for all."""


class _Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Guard:
    """Wraps an app.

    Args:
        paths: those the app knows, by which answers are counted.
    """

    def __init__(
        self, app: App, policy: Policy, limits: Limits, metrics: Metrics, *, paths: Collection[str]
    ) -> None:
        self._app, self._policy, self._limits, self._metrics = app, policy, limits, metrics
        self._paths = frozenset(paths)
        self._held_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, _Answer(send, self._limits.write_timeout_s))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(
        self, scope: MutableMapping[str, Any], receive: Receive, answer: "_Answer"
    ) -> None:
        started, path, body = time.monotonic(), scope["path"], bytearray()
        try:
            async with AsyncExitStack() as exits, answer.patience():
                scope[EXITS] = exits
                try:
                    self._admit(scope)
                    await self._read(scope, receive, body)
                except _Refused as refused:
                    await answer.refuse(refused.fault, path)
                    return
                await self._app(scope, _replay(bytes(body), receive), answer.send)
        except ClientGoneError as gone:
            log.info("%s: %s", path, gone)
        except asyncio.CancelledError:
            # uvicorn's patience with what runs has ended, and it would say a plain 500.
            await answer.refuse(fault_of(ClosingError()), path)
            raise
        except Exception as error:
            # A reader that was given up shows as many kinds of error, all expected.
            if not answer.is_given_up:
                log.exception("%s failed", path)
                await answer.refuse(fault_of(error), path)
        finally:
            self._held_bytes -= len(body)
            label = path if path in self._paths else "other"
            self._metrics.answered(label, answer.status, time.monotonic() - started)

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if self._policy.hosts is not None and host not in self._policy.hosts:
            raise _Refused(
                Fault(403, f"this server does not go by the name {host!r}", code="unknown_host")
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        origins = self._policy.origins
        if origin and "*" not in origins and origin not in origins:
            own = headers.get(b"host", b"").decode("latin-1")
            if origin.partition("://")[2] != own:
                raise _Refused(
                    Fault(403, f"pages of {origin!r} may not ask here", code="unknown_origin")
                )
        is_open = scope["path"] in OPEN_PATHS
        if not is_open and not self._policy.keys.open(headers.get(b"authorization")):
            raise _Refused(
                Fault(401, "a valid API key is needed: Authorization: Bearer KEY", code="no_key")
            )

    async def _read(
        self, scope: MutableMapping[str, Any], receive: Receive, body: bytearray
    ) -> None:
        limits = self._limits
        too_large = Fault(413, f"the body is larger than {limits.max_body_bytes} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limits.max_body_bytes:
            raise _Refused(too_large)
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client has gone before its request was whole")
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > limits.max_body_bytes:
                        raise _Refused(too_large)
                    if self._held_bytes + len(chunk) > BODIES * limits.max_body_bytes:
                        busy = Fault(429, "too many large requests at once", "rate_limit_error")
                        raise _Refused(busy._replace(retry_after_s=RETRY_AFTER_S))
                    self._held_bytes += len(chunk)
                    body += chunk
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise _Refused(
                Fault(408, f"the body did not come within {limits.body_timeout_s:g} s")
            ) from None


class _Answer:
    """Sends, and gives a reader up that takes nothing."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.status = 499
        """499, nginx's number, if the client has gone before there was an answer."""
        self.is_given_up = False
        self._has_begun = False
        self._waits_since: float | None = None
        """When the message began that the reader has not taken yet, on the loop's clock."""

    @asynccontextmanager
    async def patience(self) -> AsyncIterator[None]:
        """Ends its block with TimeoutError when the reader is given up.

        One timer looks now and then: one for each message would cost more than to send it.
        """
        loop = asyncio.get_running_loop()

        def look() -> None:
            nonlocal timer
            now = loop.time()
            since = now if self._waits_since is None else self._waits_since
            if now >= since + self._timeout_s:
                self.is_given_up = True
                timeout.reschedule(now)
            else:
                timer = loop.call_at(since + self._timeout_s, look)

        timer = loop.call_later(self._timeout_s, look)
        try:
            async with asyncio.timeout(None) as timeout:
                yield
        finally:
            timer.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._has_begun = message["status"], True
            headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": headers}
        self._waits_since = asyncio.get_running_loop().time()
        try:
            await self._send(message)
        except OSError as error:
            self.is_given_up = True
            raise ClientGoneError("the reader has gone") from error
        self._waits_since = None

    async def refuse(self, fault: Fault, path: str) -> None:
        """Answer with a fault, unless another answer has begun."""
        if self._has_begun:
            return
        body = fault.body(path)
        headers = {**fault.headers, "Content-Type": "application/json"}
        # What is left of the body is not read, so the connection cannot be used again.
        headers |= {"Content-Length": str(len(body)), "Connection": "close"}
        plain = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": fault.status, "headers": plain})
        await self.send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and then whatever comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""
