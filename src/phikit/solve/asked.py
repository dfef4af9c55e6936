"""Several conversations at a time with a model behind `Chat`, and the solver made of that."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from phikit.base.errors import ContextOverflowError, PhikitError, RemoteError, ReplyTimeoutError
from phikit.chat.message import Message
from phikit.data.problem import Problem
from phikit.generate.chat import Chat, ChatOptions, ChatReply
from phikit.solve.plain import problem_seed
from phikit.solve.solver import Reply, Solver


def asked(
    chat: Chat,
    options: ChatOptions,
    *,
    at_once: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Solver:
    """A solver that asks each question as one user turn; its replies have no token ids.

    A question that is not answered does not stop the others: its replies carry an `error`.

    Args:
        options: their seed is mixed with each problem's content, as `plain` does.
        at_once: questions under way at a time.
        on_progress: called with 1 for each question that is done.
    """

    def solve(problems: Sequence[Problem]) -> list[list[Reply]]:
        calls = [
            (
                [Message("user", problem.question)],
                replace(options, seed=problem_seed(options.seed, problem.content_hash)),
            )
            for problem in problems
        ]
        answers = ask_all(chat, calls, at_once=at_once, on_progress=on_progress)
        return [_replies(answer, options.num_samples) for answer in answers]

    return solve


def ask_all(
    chat: Chat,
    calls: Sequence[tuple[Sequence[Message], ChatOptions]],
    *,
    at_once: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[ChatReply] | PhikitError]:
    """The replies to each conversation, in order; an error in the place of those that failed.

    Args:
        at_once: conversations under way at a time.
        on_progress: called with 1 for each that is done.
    """

    def ask(call: tuple[Sequence[Message], ChatOptions]) -> list[ChatReply] | PhikitError:
        try:
            return chat.answer(*call)
        except (ContextOverflowError, RemoteError, ReplyTimeoutError) as error:
            return error
        finally:
            if on_progress is not None:
                on_progress(1)

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(ask, calls))


def _replies(answer: list[ChatReply] | PhikitError, num_samples: int) -> list[Reply]:
    if isinstance(answer, PhikitError):
        return [Reply(Message("assistant", ""), [], [], False, answer.what)] * num_samples
    return [Reply(r.message, [], [], r.finish_reason == "stop") for r in answer]
