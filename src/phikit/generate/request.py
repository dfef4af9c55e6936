"""What goes into the engine and what comes out of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from phikit.base.media import Media

FinishReason = Literal["stop", "length", "cancelled"]


class Constraint(Protocol):
    """What one reply may still become: a grammar, walked along with the tokens."""

    @property
    def finished(self) -> bool:
        """Nothing may follow."""
        ...

    def allowed(self) -> Tensor:
        """Which ids may come next, bool [V] on the CPU; at least one."""
        ...

    def accept(self, token: int) -> None:
        """Go on by one of the allowed ids."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued `num_samples` times."""

    prompt: Sequence[int]
    max_new_tokens: int
    num_samples: int = 1
    temperature: float = 1.0
    """0 decodes greedily."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    """Keep tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that have occurred, and multiplies the negative."""
    seed: int = 0
    """Sample `i` of this request draws from the stream (seed, i), whatever else is in the batch."""
    stop_ids: tuple[int, ...] = ()
    stops: Callable[[Sequence[int]], bool] | None = None
    """Called after each token with all sampled ids so far; true ends the reply."""
    constraint: Callable[[], Constraint] | None = None
    """Makes what one sample is held to."""
    top_log_probs: int = 0
    """How many of the likeliest tokens to report at each place."""
    media: Media | None = None
    """What the prompt's placeholders stand for; a multimodal model needs it."""
    adapter: str | None = None
    """Run on this adapter of the model; None is the one that the media call for, else the chosen
    one (`nn.lora.choose_adapter`)."""


class Completion(NamedTuple):
    """One continuation."""

    tokens: list[int]
    """Sampled ids, the stop token included."""
    log_probs: list[float]
    """Log-probability in nats of each id under the temperature-scaled distribution, before top-k,
    top-p and min-p cut it."""
    finish_reason: FinishReason
    top_log_probs: list[list[tuple[int, float]]]
    """(id, log-probability) of the likeliest tokens at each place; empty unless asked for."""


OnProgress = Callable[[int, int], None]
"""Called with (sampled tokens, finished completions) since the last call."""


class Generator(Protocol):
    """The interface of an engine, in this process or elsewhere."""

    def generate(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> list[list[Completion]]:
        """The samples of each request, in order."""
        ...

    def check(self, request: Request) -> None:
        """Raise ContextOverflowError if the request cannot fit the model's context."""
        ...
