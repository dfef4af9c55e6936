"""Problems of the reasoning-gym package (Apache-2.0, over a hundred tasks) without its traps.

The package seeds item `i` with `seed + i`, so that data sets of neighbouring seeds share all but
one item, and its scorers give partial credit to answers that merely contain the right one. Here
every seed and split starts a stride apart, the split is decided by the question's content as
everywhere in this room, questions are distinct, and only a full score counts. Needs the extra
`eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import version
from typing import Any, get_args

from phikit.base.errors import DataError, MissingExtraError
from phikit.data.problem import Problem, Provenance, normalise
from phikit.data.split import Split, split_of

# Tasks whose every answer is one integer and whose most frequent answer is rare. time_intervals,
# calendar_arithmetic and the fraction and decimal tasks answer otherwise; half of gcd's are 2.
INTEGER_TASKS = (
    "basic_arithmetic",
    "chain_sum",
    "gsm_symbolic",
    "lcm",
    "leg_counting",
    "number_sequence",
    "products",
    "simple_equations",
)
SOURCE = "reasoning-gym"
LICENSE = "Apache-2.0"
STRIDE = 1 << 20  # items that one seed and split may draw; more would run into the next one's
MAX_DRAWS_PER_PROBLEM = 50  # six times what the smallest split needs on average


def reasoning_gym_problems(
    tasks: Sequence[str] = INTEGER_TASKS, *, seed: int, count: int, split: Split
) -> list[Problem]:
    """`count` distinct problems of one split, taken from the tasks in turn.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        DataError: no tasks, an unknown task, a negative seed or too large a count, or a task with
            too few distinct questions, naming the task, what was wanted and what was found.
    """
    if not tasks:
        raise DataError("no reasoning-gym tasks given", fix=f"name some of {INTEGER_TASKS}")
    if seed < 0 or not 0 <= count * MAX_DRAWS_PER_PROBLEM <= STRIDE:
        raise DataError(
            f"cannot draw {count} problems with seed {seed}",
            fix=f"use a seed from 0 up and at most {STRIDE // MAX_DRAWS_PER_PROBLEM} problems",
        )
    start = (seed * len(get_args(Split)) + get_args(Split).index(split)) * STRIDE
    shares = {task: len(range(place, count, len(tasks))) for place, task in enumerate(tasks)}
    drawn = [_draw(task, start, share, split) for task, share in shares.items()]
    return [drawn[index % len(tasks)][index // len(tasks)] for index in range(count)]


def score_exact(problem: Problem, answer: str) -> bool:
    """Whether the task's own scorer gives the answer full marks, partial credit being none.

    The item is drawn again from the problem's provenance, since scorers read its metadata.
    """
    where = problem.provenance
    if where.source != SOURCE:
        raise DataError(
            f"a problem of {where.source!r} cannot be scored by reasoning-gym",
            fix="score it with the verifier of its own source",
        )
    dataset = _dataset(where.family, where.seed)
    return dataset.score_answer(answer, dataset[where.index]) == 1.0


def _draw(task: str, start: int, count: int, split: Split) -> list[Problem]:
    dataset = _dataset(task, start)
    problems: dict[str, Problem] = {}
    for index in range(count * MAX_DRAWS_PER_PROBLEM):
        if len(problems) == count:
            break
        item = dataset[index]
        signature = f"{task}|{normalise(item['question'])}"
        if signature in problems or split_of(signature) != split:
            continue
        provenance = Provenance(
            source=SOURCE,
            family=task,
            license=LICENSE,
            split=split,
            generator=SOURCE,
            version=version("reasoning-gym"),
            seed=start,
            index=index,
        )
        problems[signature] = Problem(
            item["question"], str(item["answer"]), None, None, None, signature, provenance
        )
    if len(problems) < count:
        raise DataError(
            f"reasoning-gym task {task!r} has too few distinct problems in the split {split!r}: "
            f"wanted {count}, found {len(problems)}",
            fix="ask for fewer problems or other tasks",
        )
    return list(problems.values())


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise MissingExtraError("reasoning-gym", "eval") from error
    if task not in DATASETS:
        near = get_close_matches(task, DATASETS, n=1, cutoff=0.0)
        raise DataError(f"no reasoning-gym task {task!r}", fix=f"did you mean {near[0]!r}?")
    return create_dataset(task, seed=seed, size=STRIDE)
