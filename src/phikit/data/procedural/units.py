"""Changing units: weeks to days, feet to inches, dozens to eggs; the sizes are left to know."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from phikit.data.procedural.draft import Draft, Event, Level, Sketch, UnfitError
from phikit.data.procedural.lexicon import THEN, UNITS, Noun, Unit


class Setting(NamedTuple):
    """How a quantity starts, grows, shrinks and is asked for in a <unit>.

    <n> is an amount, "3 weeks", and <m> the same as an increase, "3 more weeks".
    """

    start: str
    more: str
    fewer: str
    ask: str


TRIP = Setting(
    start="a trip {lasts|takes} <n>.|<who> plans a trip of <n>.",
    more="{then |}it {goes on for <m>|is made <n> longer}.",
    fewer="{then |}it is {made|now} <n> shorter.|{then |}it is cut by <n>.",
    ask="how many <unit> {does it {last|take} {now|in the end}|is that{ now|}}?",
)
ROPE = Setting(
    start="a rope is <n> long.|<who> has a rope of <n>.|there is a rope of <n>.",
    more="{then |}{it is made <n> longer|<m> are added|<who> adds <m>}.",
    fewer="{then |}{it is made <n> shorter|<n> are cut off|<who> cuts off <n>}.",
    ask="how {many <unit> long is it|long is it in <unit>} {now|then|in the end}?",
)
COINS = Setting(
    start="<who> {has|finds|starts with} <n>.|<who> has a {jar|box} with <n>.",
    more=THEN + "{<he> {gets|finds|puts in} <m>|<friend> gives <him> <n>}.",
    fewer=THEN + "{<he> {spends|loses|gives away} <n>|<he> gives <friend> <n>}.",
    ask="how many <unit> {does <he> have|is that} {now|in the end}?",
)
WATER = Setting(
    start="a tank {holds|has} <n> of water.|<who> puts <n> of water in a tank.",
    more=THEN + "{<m> {are put|come|run} in|<who> puts in <m>}.",
    fewer=THEN + "{<n> are {used|taken out|lost}|<who> {uses|takes out} <n>}.",
    ask="how many <unit> {are there|are in it|is that} {now|in the end}?",
)
THINGS = Setting(
    start="<who> {has|buys|gets|starts with} <n>.|<who> has a {box|bag} with <n>.",
    more=THEN + "{<he> {buys|gets|finds} <m>|<friend> gives <him> <n>}.",
    fewer=THEN + "{<he> {sells|uses|loses} <n>|<he> gives <friend> <n>|<friend> takes <n>}.",
    ask="how many <unit> {does <he> have|is that|are there} {now|in the end}?",
)
SETTINGS = {
    "day": TRIP,
    "month": TRIP,
    "inch": ROPE,
    "foot": ROPE,
    "cent": COINS,
    "quart": WATER,
}


def units(rng: Random, *, steps: int, level: Level) -> Draft:
    """Amounts given in large and small units, asked in one of them, in `steps` calculations."""
    sketch = Sketch(rng, level)
    item = sketch.items[0]
    unit = sketch.pick(
        (
            *UNITS,
            Unit(Noun(f"dozen {item.many}", f"dozen {item.many}"), item, 12),
            Unit(Noun("pair of shoes", "pairs of shoes"), Noun("shoe", "shoes"), 2),
        )
    )
    setting = SETTINGS.get(unit.small.one, THINGS)
    if sketch.chance(0.3):
        _to_large(sketch, unit, setting, steps)
    else:
        value = _start_large(sketch, unit, setting)
        sketch.play(value, _events(unit, setting), steps=steps - 1)
        sketch.say(setting.ask, unit=unit.small.many)
    return sketch.finish("units")


def _say(sketch: Sketch, template: str, number: int, noun: Noun) -> None:
    sketch.say(template, n=f"{number} {noun.many}", m=f"{number} more {noun.many}")


def _start_large(sketch: Sketch, unit: Unit, setting: Setting) -> int:
    number = sketch.between(2, sketch.level.max_factor)
    _say(sketch, setting.start, number, unit.large)
    return sketch.step(unit.small.many, number, "*", unit.size)


def _to_large(sketch: Sketch, unit: Unit, setting: Setting, steps: int) -> None:
    """The last change makes the total a whole number of large units, and that number is asked."""
    total = unit.size * sketch.between(2, sketch.level.max_factor)
    if steps == 1:
        _say(sketch, setting.start, total, unit.small)
    else:
        if steps == 2:
            value = sketch.amount()
            _say(sketch, setting.start, value, unit.small)
        else:
            value = _start_large(sketch, unit, setting)
            value = sketch.play(value, _events(unit, setting), steps=steps - 3)
        change = abs(total - value)
        if not 2 <= change <= sketch.level.max_addend:
            raise UnfitError
        _say(sketch, setting.more if total > value else setting.fewer, change, unit.small)
        sketch.step("now", value, "+" if total > value else "-", change)
    sketch.say(setting.ask, unit=unit.large.many)
    sketch.step(unit.large.many.partition(" ")[0], total, "/", unit.size)


def _events(unit: Unit, setting: Setting) -> tuple[Event, ...]:
    return tuple(
        Event(cost, change(sign, label, template, unit))
        for sign, label, template in (("+", "now", setting.more), ("-", "left", setting.fewer))
        for cost, change in ((1, _change_small), (2, _change_large))
    )


def _change_small(sign: str, label: str, template: str, unit: Unit) -> Callable[[Sketch, int], int]:
    def apply(sketch: Sketch, value: int) -> int:
        number = sketch.addend(value) if sign == "+" else sketch.takeaway(value)
        _say(sketch, template, number, unit.small)
        return sketch.step(label, value, sign, number)

    return apply


def _change_large(sign: str, label: str, template: str, unit: Unit) -> Callable[[Sketch, int], int]:
    def apply(sketch: Sketch, value: int) -> int:
        room = sketch.level.max_result - value if sign == "+" else value - 1
        number = sketch.between(2, min(sketch.level.max_factor, room // unit.size))
        _say(sketch, template, number, unit.large)
        converted = sketch.step(unit.small.many, number, "*", unit.size)
        return sketch.step(label, value, sign, converted)

    return apply
