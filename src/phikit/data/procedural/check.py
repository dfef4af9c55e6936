"""Checking a trace, and measuring what the families yield."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from phikit.data.problem import Problem
from phikit.data.procedural.draft import Level
from phikit.data.procedural.generate import DEFAULT_LEVEL, FAMILIES, stream
from phikit.data.procedural.lexicon import CONTAINERS, ITEMS, KNOWN, PEOPLE
from phikit.data.split import Split

_LINE = re.compile(r"(?P<label>\S+(?: \S+){0,2}): (\d+) ([-+*/]) (\d+) = (\d+)")
_NAMES = frozenset(person.name for person in PEOPLE)
_THINGS = frozenset(word for noun in (*ITEMS, *CONTAINERS) for word in noun)


def check_trace(problem: Problem) -> list[str]:
    """What is wrong with the problem's trace, one sentence a fault; empty when nothing is.

    Every line must be a short label and one true equation of whole numbers; every operand must
    stand in the question, follow from a word that everybody knows, or be an earlier result; the
    number of lines must be the number of steps and the last result the answer.
    """
    lines = problem.thinking.split("\n") if problem.thinking else []
    faults = []
    if len(lines) != problem.steps:
        faults.append(f"{len(lines)} lines for {problem.steps} steps")
    words = re.findall(r"[a-z]+|\d+", problem.question.lower())
    available = {word for word in words if word.isdigit()}
    available |= {str(known.value) for known in KNOWN if set(known.words) & set(words)}
    result = None
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            faults.append(f"not a label and an equation: {line!r}")
            continue
        _, left, operation, right, result = match.groups()
        if not _holds(int(left), operation, int(right), int(result)):
            faults.append(f"not true: {line!r}")
        faults += [
            f"{operand} in {line!r} comes from nowhere"
            for operand in (left, right)
            if operand not in available
        ]
        available.add(result)
    if result != problem.answer:
        faults.append(f"the last result is {result}, the answer {problem.answer}")
    return faults


def _holds(left: int, operation: str, right: int, result: int) -> bool:
    if operation == "/":
        return right != 0 and left == right * result
    return result == {"+": left + right, "-": left - right, "*": left * right}[operation]


def skeleton(question: str) -> str:
    """The question with numbers, names and things masked: what is left is the phrasing."""
    masked = re.sub(r"\d+", "0", question)
    return re.sub(r"[A-Za-z]+", _mask, masked)


def _mask(match: re.Match[str]) -> str:
    word = match.group()
    if word in _NAMES:
        return "NAME"
    return "THING" if word.lower() in _THINGS else word


class FamilySummary(NamedTuple):
    """What a sample of one family looks like.

    `words` is the mean length of a question; `signatures` and `skeletons` count distinct problems
    and distinct phrasings; `guess` is the share of the most frequent answer.
    """

    family: str
    example: Problem
    words: float
    signatures: int
    skeletons: int
    guess: float


def summary(
    *, seed: int = 0, count: int = 2000, split: Split = "train", level: Level = DEFAULT_LEVEL
) -> list[FamilySummary]:
    """One row a family, measured on `count` problems of 2 to 5 steps, drawn with repeats."""
    rows = []
    for family in FAMILIES:
        drawn = stream(seed=seed, split=split, families=(family,), level=level)
        rows.append(_summarise(family, list(islice(drawn, count))))
    return rows


def _summarise(family: str, problems: Sequence[Problem]) -> FamilySummary:
    answers = Counter(problem.answer for problem in problems)
    return FamilySummary(
        family=family,
        example=problems[0],
        words=sum(len(problem.question.split()) for problem in problems) / len(problems),
        signatures=len({problem.signature for problem in problems}),
        skeletons=len({skeleton(problem.question) for problem in problems}),
        guess=answers.most_common(1)[0][1] / len(problems),
    )
