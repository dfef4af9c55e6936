"""A model that answers conversations, here or elsewhere: the interface both sides share.

An endpoint speaks text and knows no token ids of ours, so the engine's interface is not for it.
What remains is `Chat`: messages and options in, replies out. `remote.Remote` is one, `LocalChat`
makes one of a loaded model; teachers, judges and the router ask for no more than this.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

from phikit.base.errors import ReplyTimeoutError
from phikit.chat.message import Message
from phikit.generate.engine import Engine
from phikit.generate.language_model import LanguageModel, Options, cut_message, stop_strings
from phikit.generate.reply import Piece, ReplyReader
from phikit.generate.request import Completion, FinishReason, Request
from phikit.generate.sequence import Event


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How replies are drawn, in terms that every endpoint knows."""

    max_new_tokens: int | None = None
    """None leaves it to the side that answers."""
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    """The reply is JSON that is valid under this schema."""
    timeout_s: float | None = None
    """For the whole call, waiting and retries included."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One reply."""

    message: Message
    finish_reason: FinishReason
    prompt_tokens: int
    reply_tokens: int
    """As the side that answered counts, thinking included."""
    mean_log_prob: float | None = None
    """Mean log-probability of its tokens in nats; None where the side does not tell."""
    min_log_prob: float | None = None
    """Log-probability of its least likely token."""


class Chat(Protocol):
    """Answers conversations; may be called from several threads at once."""

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        """`options.num_samples` replies.

        Raises:
            ContextOverflowError: the conversation is too long; nothing has been computed.
            ReplyTimeoutError: the replies took longer than `options.timeout_s`.
            RemoteError: the model is elsewhere and did not answer.
            PhikitError: whatever else keeps the model from answering.
        """
        ...

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        """One reply in pieces as they come, and at the end the whole; raises as `answer` does.

        Leaving the iteration ends the work.
        """
        ...


class Running(Protocol):
    """A request on its way through an engine, as `serve.worker.Stream` is one."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None:
        """End it early, from any thread."""
        ...

    @property
    def completions(self) -> list[Completion]:
        """The samples, once the iteration has ended."""
        ...


class LocalChat:
    """A loaded model as a `Chat`.

    Args:
        start: runs a request; None runs it on the model's own engine, one call after the other.
    """

    def __init__(
        self, model: LanguageModel, *, start: Callable[[Request], Running] | None = None
    ) -> None:
        self._model = model
        lock = threading.Lock()
        self._start = start or (lambda request: _OwnRun(model.engine, request, lock))

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        """See `Chat.answer`."""
        request = self._request(messages, options)
        with self._run(request, options.timeout_s) as running:
            for _ in running:
                pass
        return [self._reply(request, completion) for completion in running.completions]

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        """See `Chat.stream`."""
        request = self._request(messages, replace(options, num_samples=1))
        reader = ReplyReader(self._model, strings=stop_strings(request))
        with self._run(request, options.timeout_s) as running:
            for event in running:
                piece = reader.push(event.token)
                if any(piece):
                    yield piece
        piece, _ = reader.finish()
        if any(piece):
            yield piece
        [completion] = running.completions
        yield self._reply(request, completion)

    def _request(self, messages: Sequence[Message], options: ChatOptions) -> Request:
        drawing: Options = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            "stop": options.stop,
        }
        if options.schema is not None:
            drawing["schema"] = options.schema
        request = self._model.request(messages, max_new_tokens=options.max_new_tokens, **drawing)
        return replace(request, num_samples=options.num_samples)

    @contextmanager
    def _run(self, request: Request, timeout_s: float | None) -> Iterator[Running]:
        """The request under way; cancelled when the block ends or its time is over."""
        running = self._start(request)
        timer = threading.Timer(timeout_s, running.cancel) if timeout_s is not None else None
        try:
            if timer is not None:
                timer.start()
            yield running
        finally:
            if timer is not None:
                timer.cancel()
            running.cancel()
        if any(completion.finish_reason == "cancelled" for completion in running.completions):
            raise ReplyTimeoutError(
                f"the local model did not finish in {timeout_s} s",
                fix="allow more time, or fewer tokens",
            )

    def _reply(self, request: Request, completion: Completion) -> ChatReply:
        message = self._model.renderer.parse(completion.tokens)
        return ChatReply(
            message=cut_message(message, stop_strings(request)),
            finish_reason=completion.finish_reason,
            prompt_tokens=len(request.prompt),
            reply_tokens=len(completion.tokens),
            mean_log_prob=fmean(completion.log_probs) if completion.log_probs else None,
            min_log_prob=min(completion.log_probs, default=None),
        )


class _OwnRun:
    """A request on an engine that nobody else steps meanwhile."""

    def __init__(self, engine: Engine, request: Request, lock: threading.Lock) -> None:
        engine.check(request)
        self._engine, self._request, self._lock = engine, request, lock
        self._is_cancelled = threading.Event()
        self.completions: list[Completion] = []

    def cancel(self) -> None:
        self._is_cancelled.set()

    def __iter__(self) -> Iterator[Event]:
        with self._lock:
            ticket = self._engine.submit(self._request)
            try:
                while not ticket.done and not self._is_cancelled.is_set():
                    yield from self._engine.step()
            finally:
                self._engine.cancel(ticket)
                self.completions = ticket.completions
