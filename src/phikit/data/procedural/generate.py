"""Drawing procedural problems: reproducible, distinct, and from one split.

Problem `i` depends on the seed and the parameters alone, not on how many are asked for, so a
longer list begins with the shorter one. A draft whose signature hashes to another split is
discarded, never relabelled; a family that cannot supply enough distinct problems is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from difflib import get_close_matches
from hashlib import blake2b
from itertools import count as count_from
from random import Random
from typing import NamedTuple

from phikit.base.errors import DataError
from phikit.data.problem import Problem, Provenance
from phikit.data.procedural.arithmetic import arithmetic
from phikit.data.procedural.comparison import comparison
from phikit.data.procedural.counting import counting
from phikit.data.procedural.draft import Draft, Level, UnfitError
from phikit.data.procedural.equation import equation
from phikit.data.procedural.logic import logic
from phikit.data.procedural.money import money
from phikit.data.procedural.rate import rate
from phikit.data.procedural.sequence import sequence
from phikit.data.procedural.sharing import sharing
from phikit.data.procedural.story import story
from phikit.data.procedural.time import time
from phikit.data.procedural.units import units
from phikit.data.split import Split, split_of

Family = Callable[..., Draft]

FAMILIES: Mapping[str, Family] = {
    family.__name__: family
    for family in (
        *(story, arithmetic, equation, rate, money, time),
        *(sequence, counting, units, logic, comparison, sharing),
    )
}
SOURCE = "phikit.procedural"
VERSION = "1"
LICENSE = "Apache-2.0"
MAX_STEPS = 5
DEFAULT_STEPS: Mapping[int, float] = {2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}
MAX_DRAFTS = 4000  # 500 times what the smallest split needs on average


DEFAULT_LEVEL = Level()


def generate(
    *,
    seed: int,
    count: int,
    split: Split,
    families: Sequence[str] | None = None,
    steps: Mapping[int, float] = DEFAULT_STEPS,
    level: Level = DEFAULT_LEVEL,
) -> list[Problem]:
    """`count` distinct problems of one split.

    Args:
        seed: names the list; the same arguments give the same problems.
        split: only problems whose content belongs to this split are returned.
        families: names from `FAMILIES`, chosen evenly; None for all.
        steps: weights of the numbers of calculations, from 1 to 5.
        level: size of numbers and vocabulary.

    Raises:
        DataError: an unknown family, an impossible mixture of steps, or too few distinct
            problems, naming the family, what was wanted and what was found.
    """
    plan = _plan(seed, count, split, families, steps, level)
    seen: set[str] = set()
    problems = []
    for index in range(count):
        problems.append(_problem(plan, index, seen))
        seen.add(problems[-1].signature)
    return problems


def stream(
    *,
    seed: int,
    split: Split,
    families: Sequence[str] | None = None,
    steps: Mapping[int, float] = DEFAULT_STEPS,
    level: Level = DEFAULT_LEVEL,
) -> Iterator[Problem]:
    """Like `generate`, without end and with repeats: for pre-training, where facts must recur."""
    plan = _plan(seed, None, split, families, steps, level)
    for index in count_from(0):
        yield _problem(plan, index, frozenset())


class _Plan(NamedTuple):
    seed: int
    count: int | None
    split: Split
    families: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    level: Level


def _plan(
    seed: int,
    count: int | None,
    split: Split,
    families: Sequence[str] | None,
    steps: Mapping[int, float],
    level: Level,
) -> _Plan:
    names = tuple(FAMILIES) if families is None else tuple(families)
    for name in names:
        if name not in FAMILIES:
            near = get_close_matches(name, FAMILIES, n=1, cutoff=0.0)
            raise DataError(f"no family {name!r} of problems", fix=f"did you mean {near[0]!r}?")
    if not names:
        raise DataError("no families to draw problems from", fix="name some, or pass None for all")
    possible = all(step in range(1, MAX_STEPS + 1) and share >= 0 for step, share in steps.items())
    if not possible or sum(steps.values()) <= 0:
        raise DataError(
            f"impossible mixture of steps {dict(steps)}",
            fix=f"give non-negative weights to steps from 1 to {MAX_STEPS}, one of them positive",
        )
    return _Plan(seed, count, split, names, tuple(steps), tuple(steps.values()), level)


def _problem(plan: _Plan, index: int, seen: Set[str]) -> Problem:
    key = f"{VERSION}|{plan.seed}|{plan.split}|{index}".encode()
    rng = Random(int.from_bytes(blake2b(key, digest_size=8).digest(), "big"))
    family = plan.families[int(rng.random() * len(plan.families))]
    steps = rng.choices(plan.steps, plan.weights)[0]
    build = FAMILIES[family]
    for _ in range(MAX_DRAFTS):
        try:
            draft = build(rng, steps=steps, level=plan.level)
        except UnfitError:
            continue
        if draft.signature not in seen and split_of(draft.signature) == plan.split:
            return _finish(draft, plan, family, steps, index)
    found = sum(name.startswith(f"{family}|") and name.count("|") == steps for name in seen)
    wanted = "" if plan.count is None else f" (wanted {plan.count} problems in all)"
    raise DataError(
        f"family {family!r} has no more than {found} distinct problems of {steps} steps in the "
        f"split {plan.split!r} at this level{wanted}",
        fix="ask for fewer problems, more steps, other families, or a wider level",
    )


def _finish(draft: Draft, plan: _Plan, family: str, steps: int, index: int) -> Problem:
    provenance = Provenance(
        source=SOURCE,
        family=family,
        license=LICENSE,
        split=plan.split,
        generator=SOURCE,
        version=VERSION,
        seed=plan.seed,
        index=index,
    )
    return Problem(
        question=draft.question,
        answer=str(draft.answer),
        thinking="\n".join(draft.trace_lines),
        solution=solution_text(draft.answer),
        steps=steps,
        signature=draft.signature,
        provenance=provenance,
    )


def solution_text(answer: int) -> str:
    """The visible reply: few tokens, since a small model pays for each."""
    return f"Answer: \\boxed{{{answer}}}"
