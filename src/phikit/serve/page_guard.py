"""What stands between the chat page and the web: who may ask, and what the page may load.

What a model writes is not to be trusted. Gradio's page cleans it before it is shown; should that
ever fail, the content security policy set here lets no script run that is not the page's own, and
lets nothing be fetched from, or sent to, another machine, be it an image that a reply names.

Requests must name this machine as their host, so that no foreign site can reach the page by a name
that it resolves to loopback (DNS rebinding), and must not come from another site's page.
"""

import re
import secrets
from urllib.parse import urlsplit

from phikit.base.errors import MissingExtraError
from phikit.serve.guard import LOCAL_HOSTS

try:
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise MissingExtraError("starlette", "ui") from error

_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'nonce-{nonce}'",
        "style-src 'self' 'unsafe-inline'",  # Gradio sets colours and sizes so
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'none'",
    )
)


class PageGuard:
    """An ASGI application around the page's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        fault = self._fault(Headers(scope=scope))
        if fault is not None:
            await PlainTextResponse(fault, status_code=403)(scope, receive, send)
            return
        if scope.get("path") == "/":
            # What is compressed cannot be given nonces below.
            kept = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, _Guarded(send))

    def _fault(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            if urlsplit(f"//{host}").hostname not in LOCAL_HOSTS:
                return f"this page does not go by the name {host!r}"
            if origin is not None and urlsplit(origin).netloc != host:
                return f"pages of {origin!r} may not use this one"
        except ValueError:
            return "a header is malformed"
        return None


class _Guarded:
    """Sends a response on, with its policy; the scripts of a page get the nonce that allows them.

    Only what stands in the page as the server made it has a nonce: nothing a model said is in it.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._nonce = secrets.token_urlsafe(16)
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = _POLICY.format(nonce=self._nonce)
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            if headers.get("content-type", "").startswith("text/html"):
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            nonce = f'<script nonce="{self._nonce}"'.encode()
            message["body"] = re.sub(rb"<script\b", nonce, self._body)
            MutableHeaders(scope=self._start)["content-length"] = str(len(message["body"]))
            await self._send(self._start)
            self._start = None
        await self._send(message)
