"""What went wrong, as HTTP says it: a status, and a body in the shape a client knows.

OpenAI's clients read `{"error": {"message", "type", "param", "code"}}`, Ollama's `{"error": text}`.
"""

import json
from typing import Any, NamedTuple

from pydantic import BaseModel

from phikit.base.errors import (
    ChatError,
    ConfigError,
    ContextOverflowError,
    PhikitError,
    ReplyTimeoutError,
)
from phikit.serve.errors import (
    ClientGoneError,
    ClosingError,
    ModelUnavailableError,
    QueueFullError,
    RefusedError,
    UnknownModelError,
)

OLLAMA = "/api/"
"""Paths that Ollama's clients ask."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Fault(NamedTuple):
    """An answer that is an error."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None

    def body(self, path: str) -> bytes:
        """The JSON for whoever asks this path."""
        error: Any = self.message
        if not path.startswith(OLLAMA):
            fields = {"type": self.type, "param": self.param, "code": self.code}
            error = {"message": self.message, **fields}
        return encode({"error": error})

    @property
    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class OllamaErrorBody(BaseModel):
    """Ollama's shape of an error."""

    error: str


def fault_of(error: BaseException) -> Fault:
    """The fault that an error is to the client; what is not ours to tell is a plain 500."""
    if not isinstance(error, PhikitError):
        return Fault(500, "the server failed; its log says why", "server_error", "internal_error")
    message = error.what if error.fix is None else f"{error.what}. Next: {error.fix}"
    match error:
        case ClientGoneError():
            return Fault(499, message)
        case UnknownModelError():
            return Fault(404, message, code="model_not_found", param="model")
        case ContextOverflowError():
            return Fault(400, message, code="context_length_exceeded")
        case QueueFullError():
            return Fault(429, message, "rate_limit_error", "queue_full", None, error.retry_after_s)
        case ClosingError():
            return Fault(503, message, "server_error", "shutting_down", None, 1)
        case ReplyTimeoutError():
            return Fault(504, message, "server_error", "timeout")
        case ModelUnavailableError():
            return Fault(503, message, "server_error", "model_unavailable")
        case RefusedError():
            return Fault(400, message, param=error.param)
        case ChatError() | ConfigError():
            return Fault(400, message)
        case _:
            return Fault(500, message, "server_error", type(error).__name__)


def encode(value: Any) -> bytes:
    """JSON in UTF-8, on one line; half a surrogate pair stays the escape it came as.

    Raises ValueError for numbers that JSON does not have.
    """
    return _ENCODER.encode(value).encode(errors="backslashreplace")
