"""The user's own problems, from a file of `{"question", "answer"}` rows."""

from pathlib import Path

from phikit.data.problem import Problem, read_problems


def jsonl_task_problems(path: Path, *, count: int | None = None) -> list[Problem]:
    """The first `count` problems of the file, or all; splits play no part.

    Raises:
        DataError: the file cannot be used; names the line and the reason.
    """
    return read_problems(path)[:count]
