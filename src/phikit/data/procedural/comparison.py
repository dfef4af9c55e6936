"""Comparing people: ages or numbers of things, each told relative to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import NamedTuple

from phikit.data.procedural.draft import Draft, Level, Sketch, UnfitError


class Wording(NamedTuple):
    """How one quantity is told; <p> is the person, <q> the one compared with."""

    given: str
    relations: Mapping[str, str]
    ask: str
    later: str
    sooner: str
    total: str


AGES = Wording(
    given="<p> is <n> years old.|<p> is <n>.",
    relations={
        "+": "<p> is <n> years older than <q>.|<q> is <n> years younger than <p>.",
        "-": "<p> is <n> years younger than <q>.|<q> is <n> years older than <p>.",
        "*": "<p> is <times> as old as <q>.",
        "/": "<p> is half as old as <q>.|<q> is twice as old as <p>.",
    },
    ask="how old is <p>?|{find|give} the age of <p>.|what is the age of <p>?",
    later="how old will <p> be {in <n> years|<n> years from now}?",
    sooner="how old was <p> <n> years ago?",
    total="how old are <group> together?|what is the sum of the ages of <group>?",
)
THINGS = Wording(
    given="<p> {has|owns} <n> <items>.",
    relations={
        "+": "<p> has <n> more{ <items>|} than <q>.|<q> has <n> fewer{ <items>|} than <p>.",
        "-": "<p> has <n> fewer{ <items>|} than <q>.|<q> has <n> more{ <items>|} than <p>.",
        "*": "<p> has <times> as many{ <items>|} as <q>.",
        "/": "<p> has half as many{ <items>|} as <q>.|<q> has twice as many{ <items>|} as <p>.",
    },
    ask="how many <items> does <p> have?|{find|work out} how many <items> <p> has.",
    later="{then |}<p> {gets|finds|buys} <n> more. how many {<items> |}does <p> have now?",
    sooner="{then |}<p> {loses|sells|gives away} <n>. how many {<items> |}does <p> have now?",
    total="how many <items> do <group> have {together|in all|in total|altogether}?",
)
OLDEST = 99


def comparison(rng: Random, *, steps: int, level: Level) -> Draft:
    """A chain of comparisons between up to five people, with `steps` calculations."""
    sketch = Sketch(rng, level)
    wording = sketch.pick((AGES, THINGS))
    endings = [
        (cost, ending)
        for cost, fewest, ending in ((0, 1, _ask), (1, 1, _change), (1, 1, _pair), (2, 2, _three))
        if fewest <= steps - cost < len(sketch.people)
    ]
    cost, ending = sketch.pick(endings)
    values = _chain(sketch, wording, links=steps - cost)
    if wording is AGES and max(values) > OLDEST:
        raise UnfitError
    if sketch.chance(0.3):
        sketch.sentences.reverse()
    ending(sketch, wording, values)
    return sketch.finish("comparison")


def _chain(sketch: Sketch, wording: Wording, *, links: int) -> list[int]:
    """Everyone's quantity, in the order of `sketch.people`."""
    start = sketch.factors()[0] if sketch.chance(0.5) else sketch.amount()
    values = [start]
    sketch.say(wording.given, p=sketch.people[0].name, n=start)
    for previous, person in pairwise(sketch.people[: links + 1]):
        value = values[-1]
        operation, number = sketch.operation(value, "+-*")
        if value % 2 == 0 and value <= 2 * sketch.level.max_factor and sketch.chance(0.25):
            operation, number = "/", 2
        times = "twice" if number == 2 else f"{number} times"
        sketch.say(
            wording.relations[operation], p=person.name, q=previous.name, n=number, times=times
        )
        values.append(sketch.step(person.name, value, operation, number))
    return values


def _ask(sketch: Sketch, wording: Wording, values: list[int]) -> None:
    sketch.say(wording.ask, p=_last(sketch, values))


def _change(sketch: Sketch, wording: Wording, values: list[int]) -> None:
    operation, number = sketch.operation(values[-1], "+-")
    template = wording.later if operation == "+" else wording.sooner
    sketch.say(template, p=_last(sketch, values), n=number)
    sketch.step("then", values[-1], operation, number)


def _pair(sketch: Sketch, wording: Wording, values: list[int]) -> None:
    _sum(sketch, wording, values, 2)


def _three(sketch: Sketch, wording: Wording, values: list[int]) -> None:
    _sum(sketch, wording, values, 3)


def _sum(sketch: Sketch, wording: Wording, values: list[int], members: int) -> None:
    names = [person.name for person in sketch.people[len(values) - members : len(values)]]
    sketch.say(wording.total, group=f"{', '.join(names[:-1])} and {names[-1]}")
    total, *rest = values[-members:]
    for value in rest:
        total = sketch.step("total", total, "+", value)


def _last(sketch: Sketch, values: list[int]) -> str:
    return sketch.people[len(values) - 1].name
