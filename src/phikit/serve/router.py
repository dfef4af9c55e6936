"""Local first, the cloud where that does not do: the decision, made per request.

A request goes to the cloud for one of four reasons, each of which the config may switch off: the
local model is absent, the conversation too long for it, it fails or takes too long, or it is not
sure of its answer. Without a cloud in the config nothing here opens a socket.

What is unusual: the local answer is kept while the cloud is asked. When the cloud fails, or the
budget is spent, it is given instead, and the reply says so.

Source: FrugalGPT (Chen et al., 2023, arXiv 2305.05176), section 3: the cascade.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from phikit.base.config import Config
from phikit.base.errors import (
    ConfigError,
    ContextOverflowError,
    Interrupted,
    PhikitError,
    RemoteError,
    ReplyTimeoutError,
    RunError,
    StorageError,
    WeightsError,
)
from phikit.chat.message import Message
from phikit.evals.verify import extract_answer, normalise
from phikit.generate.chat import Chat, ChatOptions, ChatReply
from phikit.generate.remote import RemoteConfig
from phikit.generate.reply import Piece
from phikit.serve.budget import BudgetConfig, BudgetError
from phikit.serve.errors import UnknownModelError
from phikit.serve.route_log import Entry, Reason, Route, RouteLog
from phikit.solve.confidence import SIGNALS, AnswerOf, Opinion

Signal = Literal["agreement", "log_prob", "weakest", "scorer"]
Score = Callable[[Sequence[Message], ChatReply], float]
"""How good a reply is, by whatever judges it: a verifier, a reward model."""
Ask = Callable[[Chat, Sequence[Message], ChatOptions], Iterator[Piece | ChatReply]]
"""Ask a side, for the whole reply at once or in pieces."""


class ConfidenceConfig(Config):
    """When the local model is sure enough."""

    signal: Signal
    """See `solve.confidence`; a scorer is handed to the router."""
    threshold: float
    """Less than this goes to the cloud. `phikit eval --router` shows what each value would do."""
    samples: int = Field(default=8, ge=2)
    """Replies that vote; for agreement alone, the other signals judge one reply."""
    temperature: float = Field(default=0.8, gt=0)
    """At which they are drawn."""


class RouterConfig(Config):
    """A local model, a cloud, and what goes where."""

    name: str = "hybrid"
    """What the server calls this pair of models."""
    local: str
    """The local model, by the name it is served by."""
    local_timeout_s: float | None = Field(default=None, gt=0)
    cloud: RemoteConfig | None = None
    reasons: tuple[Reason, ...] = ("absent", "context", "failure", "unsure")
    """What may send a request to the cloud."""
    confidence: ConfidenceConfig | None = None
    """None is always sure."""
    budget: BudgetConfig = BudgetConfig()
    log: Path | None = None
    """A line of JSON for each request; its texts are not in it."""

    @model_validator(mode="after")
    def _spending_is_bounded(self) -> Self:
        if self.cloud is not None and self.budget == BudgetConfig():
            raise ValueError("a cloud needs a budget: set budget.calls_per_run, or another bound")
        cost_is_bounded = (self.budget.cost_per_run, self.budget.cost_per_day) != (None, None)
        if self.cloud is not None and cost_is_bounded and self.cloud.cost(1, 1) == 0:
            raise ValueError("a bound on costs needs cloud.price_in and cloud.price_out")
        return self


@dataclass(frozen=True, slots=True)
class RoutedReply:
    """A reply, and how it came about."""

    reply: ChatReply
    route: Route
    reason: Reason | None
    """Why the local model's answer did not do; None if it did."""
    confidence: float | None
    cost: float
    note: str | None
    """Why the answer is local although the cloud was called for."""


class Router:
    """Asks the local model, and the cloud where the config says so. For any number of threads.

    Args:
        local: None if the model is absent. One that is found to be absent when it is asked raises
            WeightsError, RunError or UnknownModelError.
        cloud: a `Remote` that spends from a budget, see `serve.hybrid.open_router`.
        score: judges replies, for the signal "scorer".
        answer_of: what a reply comes to, for the signal "agreement".
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        local: Chat | None,
        cloud: Chat | None,
        score: Score | None = None,
        answer_of: AnswerOf | None = None,
    ) -> None:
        if config.confidence and config.confidence.signal == "scorer" and score is None:
            raise ConfigError(
                "the signal 'scorer' needs a scorer, and none was handed in",
                fix=f"choose from: {', '.join(SIGNALS)}; or make the Router in Python with score=",
            )
        assert (cloud is None) == (config.cloud is None)
        self.config, self.local, self.cloud = config, local, cloud
        self._score, self._answer_of = score, answer_of or boxed_or_whole
        self._log = RouteLog(config.log)

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> RoutedReply:
        """One reply.

        Raises:
            ConfigError: the options make no sense, or ask for several replies.
            PhikitError: neither side has answered; this is the local model's error, if it has one.
        """
        *_, routed = self._route(messages, options, _at_once)
        assert isinstance(routed, RoutedReply)
        return routed

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | RoutedReply]:
        """The reply in pieces, and the whole at the end.

        Where the local model's confidence decides, its reply is one piece: it is not shown before
        it is known to stand. A side that fails after its first piece ends the reply with its error.
        """
        return self._route(messages, options, lambda side, *asked: side.stream(*asked))

    def log_local(self, note: str) -> None:
        """Log a request that is not for the router to decide: the local model answers it."""
        with self._log.request() as entry:
            entry.route, entry.note = "local", note

    def _route(
        self, messages: Sequence[Message], options: ChatOptions, ask: Ask
    ) -> Iterator[Piece | RoutedReply]:
        if options.num_samples != 1:
            raise ConfigError("the router gives one reply", fix="ask for n=1")
        with self._log.request() as entry:
            items, entry.reason, error = self._ask_local(messages, options, ask, entry)
            route: Route = "local"
            if self.cloud is not None and entry.reason in self.config.reasons:
                try:
                    items, route = _begun(ask(self.cloud, messages, options)), "cloud"
                except (BudgetError, StorageError, RemoteError, ReplyTimeoutError) as refusal:
                    entry.note = f"{type(refusal).__name__}: {refusal.what}"
                    error = error or refusal
            if items is None:
                assert error is not None
                raise error
            entry.route = route
            routed = None
            for item in items:
                if isinstance(item, Piece):
                    yield item
                else:
                    routed = self._routed(item, entry)
        assert routed is not None
        yield routed

    def _ask_local(
        self, messages: Sequence[Message], options: ChatOptions, ask: Ask, entry: Entry
    ) -> "_Local":
        """What the local model says, and whether that will do."""
        options = replace(options, timeout_s=self.config.local_timeout_s or options.timeout_s)
        sureness, started = self.config.confidence, time.perf_counter()
        try:
            if self.local is None:
                raise UnknownModelError(f"the model {self.config.local!r} is not here")
            if sureness is None:
                return _Local(_begun(ask(self.local, messages, options)))
            replies = self.local.answer(messages, sampling(self.config, options))
        except (ConfigError, Interrupted):
            raise
        except (UnknownModelError, WeightsError, RunError) as error:
            return _Local(reason="absent", error=error)
        except ContextOverflowError as error:
            return _Local(reason="context", error=error)
        except (PhikitError, RuntimeError, MemoryError, OSError) as error:
            return _Local(reason="failure", error=error)
        finally:
            entry.local_s = round(time.perf_counter() - started, 4)
        choice, entry.confidence = self._opinion(messages, replies, sureness.signal)
        entry.threshold = sureness.threshold
        entry.local_tokens = sum(reply.reply_tokens for reply in replies)
        is_sure = entry.confidence >= sureness.threshold
        return _Local(_whole(replies[choice]), None if is_sure else "unsure")

    def _opinion(
        self, messages: Sequence[Message], replies: Sequence[ChatReply], signal: Signal
    ) -> Opinion:
        if signal == "scorer":
            assert self._score is not None
            return Opinion(0, self._score(messages, replies[0]))
        return SIGNALS[signal](replies, self._answer_of)

    def _routed(self, reply: ChatReply, entry: Entry) -> RoutedReply:
        if entry.route == "cloud":
            assert self.config.cloud is not None
            entry.cloud_tokens_in, entry.cloud_tokens_out = reply.prompt_tokens, reply.reply_tokens
            entry.cost = self.config.cloud.cost(reply.prompt_tokens, reply.reply_tokens)
        elif self.config.confidence is None:
            entry.local_tokens = reply.reply_tokens
        return RoutedReply(
            reply, entry.route or "local", entry.reason, entry.confidence, entry.cost, entry.note
        )


class _Local(NamedTuple):
    """What came of asking the local model."""

    items: Iterator[Piece | ChatReply] | None = None
    """Its reply, if it has one."""
    reason: Reason | None = None
    """Why that will not do."""
    error: Exception | None = None


def sampling(config: RouterConfig, options: ChatOptions) -> ChatOptions:
    """How the local model is asked: as the user wants, or as often as its confidence needs."""
    sureness = config.confidence
    if sureness is None or sureness.signal != "agreement":
        return options
    return replace(options, num_samples=sureness.samples, temperature=sureness.temperature)


def boxed_or_whole(reply: ChatReply) -> str | None:
    r"""What a reply comes to: its last `\boxed{}`, else all of its text; None if it was cut off."""
    if reply.finish_reason != "stop":
        return None
    boxed = extract_answer(reply.message.content)
    return normalise(reply.message.content if boxed is None else boxed) or None


def _at_once(
    side: Chat, messages: Sequence[Message], options: ChatOptions
) -> Iterator[Piece | ChatReply]:
    yield from side.answer(messages, options)


def _whole(reply: ChatReply) -> Iterator[Piece | ChatReply]:
    return iter((Piece(reply.message.content, reply.message.thinking or ""), reply))


def _begun(items: Iterator[Piece | ChatReply]) -> Iterator[Piece | ChatReply]:
    """The same items; what goes wrong before the first of them is raised here."""
    first = next(items)
    return itertools.chain([first], items)
