"""One sample of a request on its way: its tokens, its blocks, and how far it has come."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from phikit.base.errors import PhikitError
from phikit.generate.blocks import BLOCK_TOKENS, name_block
from phikit.generate.request import Completion, Constraint, FinishReason, Request


class Event(NamedTuple):
    """One sampled token."""

    ticket: "Ticket"
    sample: int
    token: int
    finish_reason: FinishReason | None
    """Why the sample ended with this token; None if it goes on."""


class State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Ticket:
    """A request inside the engine, and what has come of it so far."""

    request: Request
    adapter: str | None
    root: bytes
    """What the keys and values of its first block depend on, besides tokens."""
    samples: list["Sequence"] = field(default_factory=list)
    prompt_TD: Tensor | None = None
    """The embedded prompt, of a request with media."""
    error: PhikitError | None = None
    """What its constraint failed with; its samples have been cancelled."""

    @property
    def done(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def completions(self) -> list[Completion]:
        """The samples in order; all of them must have finished."""
        return [sample.completion() for sample in self.samples]


class Sequence:
    """One sample: the prompt and what it has said.

    `computed` of its tokens have keys and values, in `blocks`. It decodes while that is all but the
    last; otherwise it is, at first or again, in its prefill. The samples of one request wait as
    `siblings` of the first until its prompt has been computed, and then share its blocks.
    """

    def __init__(self, ticket: Ticket, number: int, *, root: bytes) -> None:
        request = ticket.request
        self.ticket, self.number, self.root = ticket, number, root
        self.request = request
        self.tokens = list(request.prompt)
        self.log_probs: list[float] = []
        self.top_log_probs: list[list[tuple[int, float]]] = []
        self.finish_reason: FinishReason | None = None
        self.constraint: Constraint | None = request.constraint() if request.constraint else None
        self.siblings: list[Sequence] = []
        self.state = State.WAITING
        self.row = -1
        """Its row of the block tables while it runs."""
        self.blocks: list[int] = []
        self.computed = 0
        self.named = 0
        """Blocks, from the first, that others can find."""
        self.is_long = False
        """It has outgrown LongRoPE's original context."""
        self._names: list[bytes] = []

    @property
    def said(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.computed

    def name(self, index: int) -> bytes:
        """The name of its block number `index`, which its tokens fill."""
        while len(self._names) <= index:
            start = len(self._names) * BLOCK_TOKENS
            parent = self._names[-1] if self._names else self.root
            tokens = self.tokens[start : start + BLOCK_TOKENS]
            assert len(tokens) == BLOCK_TOKENS
            self._names.append(name_block(parent, tokens))
        return self._names[index]

    def become_long(self, root: bytes) -> None:
        """From now on keys are rotated by the long factors, and blocks have other names."""
        self.is_long, self.root, self._names = True, root, []

    def add(self, token: int, log_prob: float) -> None:
        """Say one more token; sets `finish_reason` if it is the last."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        request = self.request
        if self.constraint is not None:
            self.constraint.accept(token)
        said = self.tokens[len(request.prompt) :] if request.stops is not None else []
        if (
            token in request.stop_ids
            or (self.constraint is not None and self.constraint.finished)
            or (request.stops is not None and request.stops(said))
        ):
            self.finish_reason = "stop"
        elif self.said >= request.max_new_tokens:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        tokens = self.tokens[len(self.request.prompt) :]
        return Completion(tokens, self.log_probs, self.finish_reason, self.top_log_probs)
