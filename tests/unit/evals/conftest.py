"""Problems and replies in the smallest form that evaluation needs."""

from collections.abc import Callable

import pytest

from phikit.chat.message import Message
from phikit.data.problem import Problem, Provenance
from phikit.solve.solver import Reply


def _problem(
    question: str, answer: str, *, steps: int | None = None, family: str = "sums"
) -> Problem:
    provenance = Provenance(
        source="test", family=family, license="", split="test", generator="", version="1",
        seed=0, index=0,
    )  # fmt: skip
    return Problem(question, answer, None, None, steps, question, provenance)


def _reply(
    content: str, *, thinking: str | None = None, finished: bool = True, error: str | None = None
) -> Reply:
    tokens = list(range(len(content.split())))
    message = Message("assistant", content, thinking)
    return Reply(message, tokens, [0.0] * len(tokens), finished, error)


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return _problem


@pytest.fixture(scope="session")
def reply() -> Callable[..., Reply]:
    return _reply
