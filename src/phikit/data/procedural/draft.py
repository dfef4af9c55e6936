"""Writing one problem: sentences for the question and checked equations for the trace, together.

A `Sketch` is what a family writes on. It draws names and numbers, collects sentences, and does
every calculation itself, so a trace cannot contain a wrong equation. The trace is the offline
teacher: one line a step, a short label and one equation (`left: 32 - 9 = 23`).

Families draw freely and let the sketch refuse: a value outside the level raises `UnfitError` and
the family starts again. This keeps each family to its story, at the cost of some lost drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple, TypeVar

from pydantic import Field

from phikit.base.config import Config
from phikit.data.procedural.grammar import capitalise_sentences, expand
from phikit.data.procedural.lexicon import CONTAINERS, ITEMS, PEOPLE

T = TypeVar("T")

SMALLEST = 2  # no count in a question is below this, so plurals are always right


class Level(Config):
    """How hard the numbers are and how many words there are; steps are the other dial."""

    max_result: int = Field(default=150, ge=60, description="largest value anywhere in a trace")
    max_factor: int = Field(default=12, ge=4, description="largest factor, divisor and quotient")
    max_addend: int = Field(default=60, ge=20, description="largest number added or taken away")
    num_names: int = Field(default=12, ge=5, le=len(PEOPLE))
    num_items: int = Field(default=16, ge=2, le=len(ITEMS))


class UnfitError(Exception):
    """A draw that the level does not allow; the family is drawn again."""


class Sentence(NamedTuple):
    """A sentence before its phrasing is chosen."""

    template: str
    slots: Mapping[str, object]


@dataclass(frozen=True)
class Draft:
    """A problem before it has a split and a provenance.

    The question is written when it is first read: most drafts for a small split are discarded by
    their signature, and phrasing is half of the work.
    """

    trace_lines: tuple[str, ...]
    answer: int
    signature: str
    sentences: tuple[Sentence, ...]
    phrasing_seed: int

    @cached_property
    def question(self) -> str:
        """The question in words; a function of the sentences and the phrasing seed."""
        rng = Random(self.phrasing_seed)
        phrases = [expand(sentence.template, rng, sentence.slots) for sentence in self.sentences]
        return capitalise_sentences(" ".join(phrases))


class Event(NamedTuple):
    """Something that happens to a running value: `apply(sketch, value)` takes `cost` steps."""

    cost: int
    apply: Callable[[Sketch, int], int]


class Sketch:
    """A problem being written. `slots` holds the words every template of the problem may use."""

    def __init__(self, rng: Random, level: Level) -> None:
        self.rng = rng
        self.level = level
        self.people = self.several(PEOPLE[: level.num_names], 5)
        self.items = self.several(ITEMS[: level.num_items], 2)
        self.container = self.pick(CONTAINERS)
        who, friend = self.people[:2]
        self.slots: dict[str, object] = {
            "who": who.name,
            "he": who.he,
            "him": who.him,
            "his": who.his,
            "friend": friend.name,
            "item": self.items[0].one,
            "items": self.items[0].many,
            "box": self.container.one,
            "boxes": self.container.many,
        }
        self.sentences: list[Sentence] = []
        self.lines: list[str] = []
        self._parts: list[str] = []
        self._answer = 0

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.rng.random() * len(options))]

    def several(self, options: Sequence[T], count: int) -> list[T]:
        """Different options, in a random order; quicker than `Random.sample` for the few wanted."""
        chosen: list[T] = []
        while len(chosen) < count:
            option = self.pick(options)
            if option not in chosen:
                chosen.append(option)
        return chosen

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def phrase(self, template: str, **slots: object) -> str:
        """One phrasing of a template, to fill a slot with; slots add to the common ones."""
        return expand(template, self.rng, self.slots | slots)

    def say(self, template: str, **slots: object) -> None:
        """Adds a sentence to the question; its phrasing is chosen later."""
        self.sentences.append(Sentence(template, self.slots | slots))

    def step(self, label: str, left: int, operation: str, right: int) -> int:
        """Adds a line to the trace and returns its result; UnfitError when outside the level."""
        result = self._calculate(left, operation, right)
        self.lines.append(f"{label}: {left} {operation} {right} = {result}")
        if operation in "+*" and left > right:
            left, right = right, left
        self._parts.append(f"{left}{operation}{right}")
        self._answer = result
        return result

    def play(self, value: int, events: Sequence[Event], *, steps: int) -> int:
        """Applies events that together take exactly `steps`, avoiding repeats in a row."""
        previous = None
        while steps:
            possible = [event for event in events if event.cost <= steps]
            if not possible:
                raise UnfitError
            fresh = [event for event in possible if event is not previous]
            previous = self.pick(fresh or possible)
            value = previous.apply(self, value)
            steps -= previous.cost
        return value

    def finish(self, family: str) -> Draft:
        """The draft. Sorted calculations make its signature blind to wording and telling order."""
        return Draft(
            trace_lines=tuple(self.lines),
            answer=self._answer,
            signature="|".join((family, *sorted(self._parts))),
            sentences=tuple(self.sentences),
            phrasing_seed=self.rng.getrandbits(64),
        )

    def amount(self) -> int:
        """A fresh number to start from."""
        return self.rng.randint(5, self.level.max_addend)

    def addend(self, value: int) -> int:
        """A fresh number that can be added to the value."""
        return self.between(SMALLEST, min(self.level.max_addend, self.level.max_result - value))

    def takeaway(self, value: int) -> int:
        """A fresh number that can be taken from the value and leaves something."""
        return self.between(SMALLEST, min(self.level.max_addend, value - SMALLEST))

    def factors(self, *, most: int | None = None) -> tuple[int, int]:
        """Two fresh factors with a product of at most `most` (default: the level's result)."""
        most = min(most or self.level.max_result, self.level.max_result)
        first = self.between(SMALLEST, min(self.level.max_factor, most // SMALLEST))
        second = self.between(SMALLEST, min(self.level.max_factor, most // first))
        return (first, second) if self.chance(0.5) else (second, first)

    def factor(self, value: int) -> int:
        """A fresh number that the value can be multiplied by."""
        if value > self.level.max_factor:
            raise UnfitError
        return self.between(
            SMALLEST, min(self.level.max_factor, self.level.max_result // max(value, 1))
        )

    def divisor(self, value: int) -> int:
        """A fresh number that divides the value exactly, within the multiplication table."""
        most = self.level.max_factor
        options = [
            d
            for d in range(SMALLEST, most + 1)
            if value % d == 0 and SMALLEST <= value // d <= most
        ]
        if not options:
            raise UnfitError
        return self.pick(options)

    def operation(self, value: int, operations: str = "+-*/") -> tuple[str, int]:
        """A fresh operation and operand that the value allows."""
        draws = {
            "+": self.addend,
            "-": self.takeaway,
            "*": self.factor,
            "/": self.divisor,
        }
        first = self.rng.randrange(len(operations))
        for operation in operations[first:] + operations[:first]:
            try:
                return operation, draws[operation](value)
            except UnfitError:
                continue
        raise UnfitError

    def between(self, low: int, high: int) -> int:
        """A fresh number from `low` to `high`, both included; UnfitError when there is none."""
        if high < low:
            raise UnfitError
        return low + int(self.rng.random() * (high - low + 1))

    def _calculate(self, left: int, operation: str, right: int) -> int:
        most = self.level.max_factor
        if operation == "+":
            result = left + right
        elif operation == "-":
            result = left - right
        elif operation == "*":
            result = left * right
            if max(left, right) > most:
                raise UnfitError
        else:
            result, remainder = divmod(left, right) if right else (0, 1)
            if remainder or max(right, result) > most:
                raise UnfitError
        if min(left, right, result) < 0 or max(left, right, result) > self.level.max_result:
            raise UnfitError
        return result
