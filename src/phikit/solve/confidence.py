"""How sure a model is of what it says, as one number, and which of its replies to take.

- agreement: the share of sampled replies that come to the commonest answer, 0 to 1
  (self-consistency: Wang et al., 2022, arXiv 2203.11171).
- log_prob: mean log-probability of a reply's tokens, in nats, 0 at best.
- weakest: log-probability of its least likely token. A chain of reasoning is as sure as its least
  sure step, which a mean over easy tokens hides.

The last two cost one reply.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from phikit.generate.chat import ChatReply


class Opinion(NamedTuple):
    """The number of the reply to take, and how sure the model is of it."""

    choice: int
    confidence: float


AnswerOf = Callable[[ChatReply], Hashable | None]
"""What a reply comes to, None if to nothing: replies with equal answers agree."""


def agreement(replies: Sequence[ChatReply], answer_of: AnswerOf) -> Opinion:
    """The likeliest of the replies with the commonest answer.

    A reply without an answer agrees with none.
    """
    answers = [answer_of(reply) for reply in replies]
    counts = Counter(answer for answer in answers if answer is not None)
    support = [counts[answer] for answer in answers]  # Counter gives 0 for None
    choice = max(
        range(len(replies)), key=lambda i: (support[i], _or_least(replies[i].mean_log_prob))
    )
    return Opinion(choice, support[choice] / len(replies))


def log_prob(replies: Sequence[ChatReply], answer_of: AnswerOf) -> Opinion:
    """The reply with the greatest mean log-probability."""
    return _greatest([reply.mean_log_prob for reply in replies])


def weakest(replies: Sequence[ChatReply], answer_of: AnswerOf) -> Opinion:
    """The reply whose least likely token is likeliest."""
    return _greatest([reply.min_log_prob for reply in replies])


SIGNALS: Mapping[str, Callable[[Sequence[ChatReply], AnswerOf], Opinion]] = {
    "agreement": agreement,
    "log_prob": log_prob,
    "weakest": weakest,
}


def _greatest(values: Sequence[float | None]) -> Opinion:
    known = [_or_least(value) for value in values]
    choice = max(range(len(known)), key=known.__getitem__)
    return Opinion(choice, known[choice])


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value
