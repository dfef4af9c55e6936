"""The plain solver: ask the question once, sample the reply, do nothing else.

Each problem is one Request, however many replies are wanted, so its prompt is computed once. A
problem's seed follows from its content: its replies are the same whatever else is asked, and in
whatever order.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from phikit.base.config import Config
from phikit.base.errors import ChatError, ContextOverflowError, DataError
from phikit.base.media import Media
from phikit.chat.message import Message
from phikit.chat.render import Renderer
from phikit.data.media.problem import MediaProblem, media_of, name_of
from phikit.data.problem import Problem
from phikit.generate.request import Completion, Generator, OnProgress, Request
from phikit.models.decoder import Decoder
from phikit.solve.solver import Reply, Solver


class SamplingConfig(Config):
    """How replies are drawn."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest reply; a reply that reaches it is cut and marked unfinished."""
    num_samples: int = Field(default=1, ge=1)
    """Replies per problem."""
    temperature: float = Field(default=1.0, ge=0)
    """0 always takes the most likely token."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _greedy_once(self) -> Self:
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature 0 would give {self.num_samples} identical replies; "
                "set num_samples to 1 or raise the temperature"
            )
        return self


class Senses(NamedTuple):
    """How problems with pictures and sounds are put to a model."""

    media: Callable[[Problem], Media | None]
    """The items of a problem, prepared; DataError names one that cannot be read."""
    ids: Mapping[str, int]
    """The placeholder tokens (`Decoder.media_ids`)."""

    @classmethod
    def of(cls, model: Decoder) -> Self:
        """Those of a model: what it perceives is shown as the problem has it."""
        prepare = {name: sense.config.prepare for name, sense in model.senses.items()}

        def media(problem: Problem) -> Media | None:
            if not isinstance(problem, MediaProblem):
                return None
            try:
                return media_of(problem, prepare)
            except (ChatError, DataError) as error:
                raise DataError(f"{name_of(problem)}: {error.what}", fix=error.fix) from error

        return cls(media, model.media_ids)


def problem_seed(seed: int, content_hash: str) -> int:
    """The seed of one problem's replies: a hash of the run's seed and the problem, 63 bits."""
    digest = hashlib.blake2b(f"{seed}:{content_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def plain(
    engine: Generator,
    renderer: Renderer,
    sampling: SamplingConfig,
    *,
    system: str | None = None,
    senses: Senses | None = None,
    on_progress: OnProgress | None = None,
) -> Solver:
    """A solver that asks each question as one user turn.

    A question that does not fit the context, or whose picture or sound cannot be read, does not
    stop the others: its replies carry an `error` that says so, and score as "error".

    Args:
        system: a system message before every question; None leaves the renderer's default.
        senses: shows the model what problems have beside their question; None asks the text alone.
        on_progress: passed to the engine.
    """

    def solve(problems: Sequence[Problem]) -> list[list[Reply]]:
        made = [_request(p, engine, renderer, sampling, system, senses) for p in problems]
        requests = [each for each in made if isinstance(each, Request)]
        completions = iter(engine.generate(requests, on_progress=on_progress))
        return [
            [_failed(each) for _ in range(sampling.num_samples)]
            if isinstance(each, str)
            else [_reply(completion, renderer) for completion in next(completions)]
            for each in made
        ]

    return solve


def _request(
    problem: Problem,
    engine: Generator,
    renderer: Renderer,
    sampling: SamplingConfig,
    system: str | None,
    senses: Senses | None,
) -> Request | str:
    """What the engine is asked, or why it cannot be."""
    messages = [] if system is None else [Message(role="system", content=system)]
    messages.append(Message(role="user", content=problem.question))
    try:
        media = None if senses is None else senses.media(problem)
    except DataError as error:
        return error.what
    sizes = media and senses and media.tokens._replace(ids=senses.ids)
    request = Request(
        prompt=renderer.prompt(messages, media=sizes),
        max_new_tokens=sampling.max_new_tokens,
        num_samples=sampling.num_samples,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=problem_seed(sampling.seed, problem.content_hash),
        stop_ids=renderer.stop_ids,
        media=media,
    )
    try:
        engine.check(request)
    except ContextOverflowError as error:
        return error.what
    return request


def _reply(completion: Completion, renderer: Renderer) -> Reply:
    return Reply(
        message=renderer.parse(completion.tokens),
        tokens=completion.tokens,
        log_probs=completion.log_probs,
        finished=completion.finish_reason == "stop",
    )


def _failed(error: str) -> Reply:
    nothing = Message(role="assistant", content="")
    return Reply(message=nothing, tokens=[], log_probs=[], finished=False, error=error)
