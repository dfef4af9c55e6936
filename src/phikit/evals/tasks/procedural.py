"""Held-out procedural problems: the families the nano line is trained on, contents it never saw."""

from phikit.data.problem import Problem
from phikit.data.procedural import generate
from phikit.data.split import Split


def procedural_task_problems(split: Split, *, count: int, seed: int) -> list[Problem]:
    """`count` problems of one split, all families and difficulties evenly.

    Raises:
        DataError: the split has fewer distinct problems.
    """
    return generate(seed=seed, count=count, split=split)
