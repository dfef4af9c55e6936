"""The small shared vocabulary of the procedural problems, and the quantities it takes for granted.

Twelve short names and sixteen countable things serve all families, because a model with a few
million training tokens learns to read few words well. `KNOWN` lists every number that a question
may leave unsaid ("a dozen eggs"); the definitions in the pre-training corpus and the check of a
trace both read it from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Person(NamedTuple):
    """A first name with its pronouns."""

    name: str
    he: str
    him: str
    his: str


class Noun(NamedTuple):
    """A countable noun. Questions only count two or more, so `many` is what they mostly use."""

    one: str
    many: str


class Known(NamedTuple):
    """A quantity a reader is expected to know: the words that imply it and how it is defined."""

    words: tuple[str, ...]
    value: int
    definition: str


PEOPLE = (
    *(Person(name, "he", "him", "his") for name in ("Tom", "Ben", "Sam", "Max", "Leo", "Dan")),
    *(Person(name, "she", "her", "her") for name in ("Ann", "Mia", "Eva", "Zoe", "Amy", "Kim")),
)

ITEMS = tuple(
    Noun(one, one + "s")
    for one in (
        *("apple", "book", "card", "coin", "pen", "toy", "ball", "egg"),
        *("shell", "stamp", "nut", "cake", "stone", "bead", "flower", "ticket"),
    )
)

CONTAINERS = (Noun("bag", "bags"), Noun("box", "boxes"), Noun("jar", "jars"), Noun("pack", "packs"))

LEGS: Mapping[Noun, int] = {
    Noun("hen", "hens"): 2,
    Noun("dog", "dogs"): 4,
    Noun("ant", "ants"): 6,
    Noun("spider", "spiders"): 8,
}

WHEELS: Mapping[Noun, int] = {Noun("bike", "bikes"): 2, Noun("car", "cars"): 4}


class Unit(NamedTuple):
    """A large unit, the small unit it is made of, and how many of them."""

    large: Noun
    small: Noun
    size: int


UNITS = (
    Unit(Noun("week", "weeks"), Noun("day", "days"), 7),
    Unit(Noun("year", "years"), Noun("month", "months"), 12),
    Unit(Noun("foot", "feet"), Noun("inch", "inches"), 12),
    Unit(Noun("yard", "yards"), Noun("foot", "feet"), 3),
    Unit(Noun("dime", "dimes"), Noun("cent", "cents"), 10),
    Unit(Noun("nickel", "nickels"), Noun("cent", "cents"), 5),
    Unit(Noun("gallon", "gallons"), Noun("quart", "quarts"), 4),
)


def _a(noun: Noun) -> str:
    return f"{'An' if noun.one[0] in 'aeiou' else 'A'} {noun.one}"


KNOWN = (
    Known(("dozen",), 12, "A dozen is 12 things."),
    Known(("pair", "pairs"), 2, "A pair is 2 things."),
    Known(("twice",), 2, "Twice a number is 2 times the number."),
    Known(("half",), 2, "To find half of a number, divide it by 2."),
    *(
        Known((*large,), size, f"There are {size} {small.many} in a {large.one}.")
        for large, small, size in UNITS
    ),
    *(Known((*kind,), legs, f"{_a(kind)} has {legs} legs.") for kind, legs in LEGS.items()),
    *(
        Known((*kind,), wheels, f"{_a(kind)} has {wheels} wheels.")
        for kind, wheels in WHEELS.items()
    ),
)

THEN = "{then |later |}"

COMMANDS: Mapping[str, str] = {
    "+": "add <n>",
    "-": "{take away|subtract} <n>",
    "*": "multiply by <n>",
    "/": "divide by <n>",
}

MEANINGS = (
    "To add means to put together.",
    "To subtract means to take away.",
    "To share equally means to divide.",
    "The total is all of them together.",
    "The sum is what you get when you add.",
    "The change is what you pay less the price.",
    "The average is the sum divided by how many numbers there are.",
    "To find how many are left, take away.",
    "A number is even if it can be divided by 2.",
    "A number is odd if it is not even.",
    "More than 7 means 8, 9, 10 and so on.",
    "Less than 7 means 6, 5, 4 and so on.",
)
