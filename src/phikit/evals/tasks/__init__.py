"""The tasks, one file each, and the table that names them: a new task is a file and a line here."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from phikit.base.errors import DataError
from phikit.data.problem import Problem
from phikit.evals.tasks.jsonl import jsonl_task_problems
from phikit.evals.tasks.procedural import procedural_task_problems
from phikit.evals.tasks.transfer import transfer_task_problems


class Wanted(NamedTuple):
    """What is asked of a task; `path` is the file of `jsonl`, and no other task takes one."""

    count: int
    seed: int
    path: Path | None


def task_problems(
    name: str, *, count: int, seed: int = 7, path: Path | None = None
) -> list[Problem]:
    """The problems of the task called `name`, at most `count`, from the test split.

    Raises:
        DataError: no such task, a file is missing or superfluous, or the task's data are at fault.
        MissingExtraError: the task needs a package that is not installed.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise DataError(f"no task {name!r}", fix=f"did you mean {near!r}? All: {', '.join(TASKS)}")
    if (path is not None) != (name == "jsonl"):
        raise DataError(
            f"the task {name!r} " + ("needs a file" if path is None else f"takes no file: {path}"),
            fix="give a file with the task 'jsonl', and only with it",
        )
    return TASKS[name](Wanted(count, seed, path))


def _jsonl(wanted: Wanted) -> list[Problem]:
    assert wanted.path is not None
    return jsonl_task_problems(wanted.path, count=wanted.count)


TASKS: Mapping[str, Callable[[Wanted], list[Problem]]] = {
    "procedural": lambda w: procedural_task_problems("test", count=w.count, seed=w.seed),
    "transfer": lambda w: transfer_task_problems("test", count=w.count, seed=w.seed),
    "jsonl": _jsonl,
}
