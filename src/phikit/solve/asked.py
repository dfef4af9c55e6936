"""The solver for a model behind the `Chat` interface: questions one by one, several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from phikit.base.errors import ContextOverflowError, RemoteError, ReplyTimeoutError
from phikit.chat.message import Message
from phikit.data.problem import Problem
from phikit.generate.chat import Chat, ChatOptions
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

    def ask(problem: Problem) -> list[Reply]:
        seed = problem_seed(options.seed, problem.content_hash)
        question = [Message("user", problem.question)]
        try:
            replies = chat.answer(question, replace(options, seed=seed))
        except (ContextOverflowError, RemoteError, ReplyTimeoutError) as error:
            return [
                Reply(Message("assistant", ""), [], [], False, error.what)
            ] * options.num_samples
        finally:
            if on_progress is not None:
                on_progress(1)
        return [Reply(r.message, [], [], r.finish_reason == "stop") for r in replies]

    def solve(problems: Sequence[Problem]) -> list[list[Reply]]:
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(ask, problems))

    return solve
