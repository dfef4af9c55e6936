"""What a solver is: problems in, sampled replies out, in the same order."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from phikit.chat.message import Message
from phikit.data.problem import Problem


class Reply(NamedTuple):
    """One sampled reply.

    Attributes:
        message: what the model wrote, parsed into thinking and content.
        tokens: generated token ids, the stop token included.
        log_probs: log-probability of each token under the model, as sampled.
        finished: the model stopped by itself; False when it ran into the length limit.
        error: why there is no reply (the question is longer than the context); None otherwise.
    """

    message: Message
    tokens: list[int]
    log_probs: list[float]
    finished: bool
    error: str | None = None

    @property
    def text(self) -> str:
        """The reply as one text, the thinking between its tags."""
        if self.message.thinking is None:
            return self.message.content
        return f"<think>\n{self.message.thinking}\n</think>\n{self.message.content}"


Solver = Callable[[Sequence[Problem]], list[list[Reply]]]
"""For each problem, in order, its replies."""
