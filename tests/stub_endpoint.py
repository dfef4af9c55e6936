"""A small HTTP server in the role of the cloud, which answers, or fails, as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request: `body` is its JSON."""

    protocol_version = "HTTP/1.1"
    server: "StubServer"
    body: dict[str, Any]

    def do_POST(self) -> None:
        stub = self.server
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.requests.append((self.path, dict(self.headers), self.body))
            answer = stub.script.pop(0) if stub.script else stub.default
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
        try:
            answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with stub.lock:
                stub.at_once -= 1

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


class StubServer(ThreadingHTTPServer):
    """Answers by `script`, one entry a request, and then by `default`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: list[Answer] = []
        self.default: Answer = says("Answer: \\boxed{7}")
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def stub_endpoint() -> Iterator[StubServer]:
    """A server on a free port of this machine."""
    with StubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def completion(text: str, *, usage: bool = True, **changes: Any) -> bytes:
    """The body of a whole answer of 11 + 5 tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | changes}
    body: dict[str, Any] = {"choices": [choice | {"finish_reason": "stop"}]}
    if usage:
        body["usage"] = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return json.dumps(body).encode()


def says(text: str, **changes: Any) -> Answer:
    """Answers with this text; in pieces if it is asked to."""

    def answer(request: Handler) -> None:
        if not request.body.get("stream"):
            request.send(200, completion(text, **changes))
            return
        half = len(text) // 2
        events = [
            {"choices": [{"delta": {"role": "assistant", "content": text[:half]}}]},
            {"choices": [{"delta": {"content": text[half:]}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}},
        ]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        request.send(200, "".join(lines).encode(), Content_Type="text/event-stream")

    return answer


def fails(status: int, content: bytes = b'{"error": "no"}', **headers: str) -> Answer:
    """Answers with a status."""
    return lambda request: request.send(status, content, **headers)


def raw(content: bytes, **headers: str) -> Answer:
    """Answers 200 with any bytes."""
    return lambda request: request.send(200, content, **headers)


def slow(seconds: float) -> Answer:
    """Answers late."""

    def answer(request: Handler) -> None:
        time.sleep(seconds)
        says("late")(request)

    return answer


def trickle(pause_s: float) -> Answer:
    """Answers a byte at a time, without end."""

    def answer(request: Handler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000000")
        request.end_headers()
        while True:
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(pause_s)

    return answer


def endless(request: Handler) -> None:
    """Answers without end, as fast as it can."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    while True:
        request.wfile.write(b" " * 65536)


def hangs_up(request: Handler) -> None:
    """Promises more than it sends."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"choices"')
    request.close_connection = True
