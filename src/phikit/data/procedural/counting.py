"""Counting arranged things: rows and shelves, and the legs or wheels of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from phikit.data.procedural.draft import Draft, Event, Level, Sketch
from phikit.data.procedural.lexicon import LEGS, THEN, WHEELS, Noun
from phikit.data.procedural.running import Theme, tell

PLACES = Theme(
    group="<groups>",
    given="<groups>",
    start="there are <n> <items> in {a|the} <place>.|{a|the} <place> {has|holds} <n> <items>.",
    start_groups="{a|the} <place> has <a> <groups> {of|with} <b> <items>{ each|}."
    "|there are <a> <groups> in {a|the} <place>. each <group> has <b> <items>."
    "|<who> {makes|sets up} <a> <groups> {of|with} <b> <items>{ each|}.",
    more=THEN + "<n> more {<items> |}{are {put in|added}|come in}.|<who> adds <n> {more |}<items>.",
    fewer=THEN
    + "<n> {of the <items>|<items>|of them} {are taken {away|out}|are {sold|lost}|break}."
    "|<who> takes {away|out} <n> {of them|<items>}.",
    more_groups=THEN + "<a> more <groups> {of|with} <b> {<items>|each} are {put in|added}."
    "|<who> adds <a> <groups> {of|with} <b> {<items>|each}.",
    fewer_groups=THEN + "<a> <groups> {of|with} <b> {<items>|each} are {taken {away|out}|sold}."
    "|<who> takes {away|out} <a> <groups> {of|with} <b> {<items>|each}.",
    goal="{there is room|the <place> has room} for <n> <items>{ in all|}."
    " how many {more |}{<items> |}{fit in|can be added}?",
    split="{all {the <items>|of them}|the <items>|they} are {put|set} {in|into} <n> equal"
    " {rows|<boxes>}. how many {<items> |}are in each {one|of them}?",
    ask="how many <items> {are there|are in the <place>} {now|in the end|in all}?"
    "|{count|find} {all |}the <items> in the <place>{ now|}.",
)
SEE = "{there are|<who> sees|<who> counts} <a> <kind> at the <place>."
ARRIVE = THEN + "<a> {more |}<kind> {come|come in|join them}."
JOIN = THEN + "{one|another} <kind> {comes|comes in|joins them}."
LEAVE = THEN + "one <kind> {leaves|goes away|goes out}."
SETTINGS = (
    ("hall", Noun("row", "rows")),
    ("room", Noun("shelf", "shelves")),
    ("shop", Noun("box", "boxes")),
    ("garden", Noun("row", "rows")),
)


def counting(rng: Random, *, steps: int, level: Level) -> Draft:
    """Things in groups, or limbs of animals, counted in `steps` calculations."""
    sketch = Sketch(rng, level)
    if sketch.chance(0.35):
        _limbs(sketch, steps)
    else:
        place, group = sketch.pick(SETTINGS)
        sketch.slots.update(place=place, group=group.one, groups=group.many)
        tell(sketch, PLACES, steps=steps)
    return sketch.finish("counting")


def _limbs(sketch: Sketch, steps: int) -> None:
    """Legs or wheels: how many each has is left to the reader to know."""
    sketch.slots["limbs"], table = sketch.pick((("legs", LEGS), ("wheels", WHEELS)))
    sketch.slots["place"] = sketch.pick(("house", "garden", "shop"))
    kinds = sketch.rng.sample(list(table), 2)
    value = _group_of(sketch, table, kinds[0], SEE)
    if steps in (3, 5) and sketch.chance(0.3):
        _find_number(sketch, value, table, kinds, steps)
        return
    events = [Event(2, _arrivals(table)), *_singles(table, kinds[0])]
    sketch.play(value, events, steps=steps - 1)
    sketch.say(
        "how many <limbs> {are there|do they have} {now|in all|in total|altogether}?"
        "|{count|find} {all the <limbs>|the number of <limbs>}."
    )


def _group_of(sketch: Sketch, table: Mapping[Noun, int], kind: Noun, template: str) -> int:
    each = table[kind]
    number = 2 + sketch.rng.randrange(sketch.level.max_factor - 1)
    sketch.say(template, a=number, kind=kind.many)
    return sketch.step(kind.many, number, "*", each)


def _arrivals(table: Mapping[Noun, int]) -> Callable[[Sketch, int], int]:
    def apply(sketch: Sketch, value: int) -> int:
        kind = sketch.pick(list(table))
        more = _group_of(sketch, table, kind, ARRIVE)
        return sketch.step("now", value, "+", more)

    return apply


def _singles(table: Mapping[Noun, int], present: Noun) -> tuple[Event, Event]:
    """One comes, or one of those that are surely there leaves."""

    def come(sketch: Sketch, value: int) -> int:
        kind = sketch.pick(list(table))
        sketch.say(JOIN, kind=kind.one)
        return sketch.step("now", value, "+", table[kind])

    def leave(sketch: Sketch, value: int) -> int:
        sketch.say(LEAVE, kind=present.one)
        return sketch.step("left", value, "-", table[present])

    return Event(1, come), Event(1, leave)


def _find_number(
    sketch: Sketch, value: int, table: Mapping[Noun, int], kinds: Sequence[Noun], steps: int
) -> None:
    """All limbs are told and the number of the second kind is asked."""
    if steps == 5:
        value = _arrivals({kinds[0]: table[kinds[0]]})(sketch, value)
    number = 2 + sketch.rng.randrange(sketch.level.max_factor - 1)
    total = value + number * table[kinds[1]]
    sketch.say(
        "{there are also|<friend> brings} some <kind>. {in all|together},"
        " {they have|there are} <n> <limbs>. how many <kind> are there?",
        kind=kinds[1].many,
        n=total,
    )
    rest = sketch.step("rest", total, "-", value)
    sketch.step(kinds[1].many, rest, "/", table[kinds[1]])
