"""Transfer: arithmetic problems of reasoning-gym, whose wording and make no family of ours shares.

A gain on our own held-out problems may be a gain in our own phrasing; this task is what tells the
two apart. Needs the extra `eval`.
"""

from phikit.data.problem import Problem
from phikit.data.reasoning_gym import reasoning_gym_problems
from phikit.data.split import Split


def transfer_task_problems(split: Split, *, count: int, seed: int) -> list[Problem]:
    """`count` problems of one split, the integer-valued tasks in turn.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        DataError: the split has fewer distinct problems.
    """
    return reasoning_gym_problems(seed=seed, count=count, split=split)
