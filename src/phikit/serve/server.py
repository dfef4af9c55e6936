"""Uvicorn, with the bounds it does not have by itself, told to stop in good time.

Uvicorn waits for the headers of a request as long as the client likes; here there is a deadline.
Their size is bounded by h11, which refuses the rest unread.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phikit.base.errors import MissingExtraError, RunError
from phikit.serve.guard import App
from phikit.serve.limits import Limits

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("phikit.serve")


def make_server(app: App, limits: Limits) -> "uvicorn.Server":
    """A server for an app; `run(sockets=[...])` serves until SIGTERM or SIGINT.

    Then it takes no more connections, lets running replies finish for `limits.shutdown_s`, and
    cancels the rest.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve") from error
    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        http=_protocol(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=max(1, int(limits.header_timeout_s)),
        timeout_graceful_shutdown=limits.shutdown_s,
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        RunError: the address is taken, or not one of this machine.
    """
    try:
        [(family, kind, proto, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            fix="choose another --port, or stop what listens there",
        ) from error
    return listener


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 with a deadline for the headers of each request."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            self._expect_headers()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._cancel_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            super().connection_lost(exc)

        def _expect_headers(self) -> None:
            if self._deadline is None and self.conn.their_state is h11.IDLE:
                self._deadline = self.loop.call_later(limits.header_timeout_s, self._give_up)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            self.transport.close()

    return BoundedProtocol


def serve(app: App, limits: Limits, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serve until told to stop; `ready` is called once requests are taken.

    Raises KeyboardInterrupt when it was told so by SIGINT or SIGTERM, after all is done.
    """
    server = make_server(app, limits)
    # uvicorn raises what it was stopped by once more; so both end as Ctrl-C does, by an exception
    # that lets others tidy up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await serving

    asyncio.run(run())
