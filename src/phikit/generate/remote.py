"""A model elsewhere: any endpoint that speaks OpenAI's chat completions.

What is unusual: everything is bounded. One deadline covers waiting in line, every attempt, the
pauses between them, and the body, looked at between reads; so neither a trickle of bytes nor a
generous Retry-After outlasts it. An answer may not be larger than `max_reply_bytes`, and is never
unpacked. The key is named in the config by its environment variable, goes nowhere but to
`base_url`, over TLS or inside this machine, and stands in no error, log or repr.

Source: RFC 9110, 10.2.3 (Retry-After); the backoff is "full jitter" (AWS Architecture Blog, 2015).
"""

import ipaddress
import itertools
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import Field, field_validator, model_validator

from phikit.base.config import Config
from phikit.base.errors import (
    ConfigError,
    RemoteError,
    RemoteUnavailableError,
    ReplyTimeoutError,
)
from phikit.chat.message import Message
from phikit.generate.chat import ChatOptions, ChatReply
from phikit.generate.openai_wire import malformed, read_answer, read_stream, request_body
from phikit.generate.reply import Piece

CONNECT_S = 10.0
"""Longest wait for a connection, of one attempt."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
_WORTH_ASKING_AGAIN = frozenset({408, 429, 500, 502, 503, 504, 529})
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")

Result = TypeVar("Result")


class RemoteConfig(Config):
    """An endpoint, and what it may take."""

    base_url: str
    """Up to and without `/chat/completions`: `https://api.openai.com/v1`."""
    model: str
    api_key_env: str | None = None
    """The environment variable that holds the key; None sends none."""
    timeout_s: float = Field(default=120.0, gt=0)
    """For one call, waiting and retries included."""
    retries: int = Field(default=3, ge=0, le=10)
    max_concurrent: int = Field(default=4, ge=1)
    max_reply_bytes: int = Field(default=4 << 20, ge=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest reply, if none is asked for; a bound on its cost too."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """OpenAI's newer models know the second alone, most others the first."""
    log_probs: bool = False
    """Ask for log-probabilities; not every endpoint has them."""
    price_in: float = Field(default=0.0, ge=0)
    """Per million tokens of the prompt, in any currency."""
    price_out: float = Field(default=0.0, ge=0)
    """Per million tokens of the reply, in the same."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("give http://HOST/... or https://HOST/...")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _nothing_secret_in_the_open(self) -> Self:
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url holds a user, a query or a fragment; keys go to api_key_env")
        if self.api_key_env and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise ValueError("a key over plain http can be read on its way; use https")
        return self

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float:
        """The price of one request."""
        return (prompt_tokens * self.price_in + reply_tokens * self.price_out) / 1e6

    def worst_cost(self, messages: Sequence[Message], options: ChatOptions) -> float:
        """No less than the price of answering: no token of the prompt has less than a byte."""
        prompt_bytes = len(json.dumps(request_body(messages, options)))
        length = options.max_new_tokens or self.max_new_tokens
        return self.cost(prompt_bytes, length * options.num_samples)


class Spent(NamedTuple):
    """What a `Remote` has used since it was made."""

    calls: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    cost: float = 0.0


class Remote:
    """An endpoint as a `Chat`; one object serves any number of threads.

    Raises:
        ConfigError: the environment variable for the key is not set.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self._key = _read_key(config)
        self._places = threading.BoundedSemaphore(config.max_concurrent)
        self._lock = threading.Lock()
        self._spent = Spent()
        headers = {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "phikit",
        }
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # A proxy from the environment is the user's wish, except on the way to this machine.
        self._client = httpx2.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=not is_loopback(urlsplit(config.base_url).hostname or ""),
            limits=httpx2.Limits(max_connections=config.max_concurrent),
        )

    def __repr__(self) -> str:
        return f"Remote({self.config.model!r} at {self.config.base_url!r})"

    @property
    def spent(self) -> Spent:
        return self._spent

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        """See `Chat.answer`."""
        body = self._body(messages, options)

        def attempt(deadline: "_Deadline") -> list[ChatReply]:
            with self._opened(body, deadline) as chunks:
                content = b"".join(chunks)
            return read_answer(content, sent_bytes=len(body), num_samples=options.num_samples)

        with self._place_in_line(options) as deadline:
            replies = self._persist(attempt, deadline)
        self._count(replies)
        return replies

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        """See `Chat.stream`. What has begun to come is not asked for again."""
        body = self._body(messages, replace(options, num_samples=1), is_stream=True)

        with self._place_in_line(options) as deadline, ExitStack() as opened:
            chunks = self._persist(
                lambda limit: opened.enter_context(self._opened(body, limit)), deadline
            )
            reply = yield from read_stream(chunks, sent_bytes=len(body))
        self._count([reply])
        yield reply

    def _body(
        self, messages: Sequence[Message], options: ChatOptions, *, is_stream: bool = False
    ) -> bytes:
        body = request_body(messages, options) | {"model": self.config.model}
        body[self.config.length_field] = options.max_new_tokens or self.config.max_new_tokens
        if self.config.log_probs:
            body["logprobs"] = True
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()

    @contextmanager
    def _place_in_line(self, options: ChatOptions) -> Iterator["_Deadline"]:
        """One of the places for calls at once, and the time by which all must be done."""
        limit = self.config.timeout_s
        deadline = _Deadline(limit if options.timeout_s is None else min(limit, options.timeout_s))
        if not self._places.acquire(timeout=deadline.left()):
            raise RemoteUnavailableError(
                f"{self.config.max_concurrent} calls to {self.config.model} are under way already",
                fix="ask again later, or raise max_concurrent",
            )
        try:
            yield deadline
        finally:
            self._places.release()

    def _persist(self, attempt: "Callable[[_Deadline], Result]", deadline: "_Deadline") -> Result:
        """Try, and try again where that may help, as long as there is time."""
        for number in range(self.config.retries + 1):
            try:
                return attempt(deadline)
            except RemoteUnavailableError as error:
                backoff = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**number))
                pause = max(error.retry_after_s or 0.0, backoff)
                if number == self.config.retries or pause >= deadline.left():
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _opened(self, body: bytes, deadline: "_Deadline") -> Iterator[Iterator[bytes]]:
        """The body of an answer whose status is 200."""
        left = deadline.left()
        timeout = httpx2.Timeout(left, connect=min(CONNECT_S, left))
        where = self.config.base_url
        try:
            with self._client.stream(
                "POST", f"{where}/chat/completions", content=body, timeout=timeout
            ) as response:
                if response.status_code != 200:
                    raise self._refusal(response, deadline)
                yield self._chunks(response, deadline)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise RemoteUnavailableError(
                f"cannot reach {where}: {self._clean(str(error))}", fix="is it running?"
            ) from None
        except httpx2.TimeoutException:
            raise deadline.passed() from None
        except httpx2.TransportError as error:
            raise RemoteUnavailableError(
                f"{where} broke off: {self._clean(str(error))}", may_be_billed=True
            ) from None

    def _chunks(self, response: httpx2.Response, deadline: "_Deadline") -> Iterator[bytes]:
        """The body as it comes, within its bounds."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise malformed(f"it is packed ({self._clean(encoding)}), which was not asked for")
        size = 0
        for chunk in response.iter_raw():
            size += len(chunk)
            if size > self.config.max_reply_bytes:
                raise RemoteError(
                    f"the answer has more than {self.config.max_reply_bytes} bytes",
                    fix="raise max_reply_bytes if that is a sound answer",
                    may_be_billed=True,
                )
            deadline.left()
            yield chunk

    def _refusal(self, response: httpx2.Response, deadline: "_Deadline") -> RemoteError:
        """The error that a status other than 200 stands for."""
        status, model = response.status_code, self.config.model
        if status in (401, 403):  # the body may quote the key
            variable = self.config.api_key_env
            fix = f"check the key in {variable}" if variable else "name its variable in api_key_env"
            return RemoteError(f"the endpoint refuses the key (status {status})", fix=fix)
        if 300 <= status < 400:
            return RemoteError(
                f"the endpoint sends us elsewhere (status {status}), where no key should follow",
                fix="set base_url to the final address",
            )
        text = b"".join(itertools.islice(self._chunks(response, deadline), 4))[:2000]
        said = self._clean(text.decode("utf-8", errors="replace"))
        what = f"{model} was refused (status {status}): {said}"
        if status in _WORTH_ASKING_AGAIN:
            wait = retry_after_s(response.headers.get("Retry-After"))
            return RemoteUnavailableError(what, retry_after_s=wait)
        return RemoteError(what)

    def _clean(self, text: str) -> str:
        """A stranger's text for a message of ours: short, printable, and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "[key]")
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        return " ".join(text.split())[:200]

    def _count(self, replies: Sequence[ChatReply]) -> None:
        prompt, said = replies[0].prompt_tokens, sum(reply.reply_tokens for reply in replies)
        with self._lock:
            calls, prompts, replied, cost = self._spent
            cost += self.config.cost(prompt, said)
            self._spent = Spent(calls + 1, prompts + prompt, replied + said, cost)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after_s(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, in seconds or a date; None if it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal() and value.isascii():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


class _Deadline:
    """A moment that everything about one call has to come before."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left(self) -> float:
        """Seconds until then; raises ReplyTimeoutError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.passed()
        return left

    def passed(self) -> ReplyTimeoutError:
        return ReplyTimeoutError(
            f"the endpoint did not finish in {self._timeout_s:g} s",
            fix="raise timeout_s, or ask for fewer tokens",
        )


def _read_key(config: RemoteConfig) -> str | None:
    name = config.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    # Somebody may have put the key itself where its variable's name belongs.
    shown = name if _VARIABLE.fullmatch(name) else "the variable named in api_key_env"
    raise ConfigError(f"{shown} is not set, or holds no key", fix=f"export {shown}=... first")
