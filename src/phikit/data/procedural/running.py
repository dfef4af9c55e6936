"""Problems about one running total: it starts, is changed by events, and is asked for.

Several families are this skeleton in different settings, so they are tables of templates (`Theme`)
told by one function. An event changes the total by a number (`<n>`) or by a product (`<a>` groups
of `<b>`), which takes two steps: the product, then the change.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from phikit.data.procedural.draft import Event, Sketch


class Theme(NamedTuple):
    """The templates of one setting; None where the setting has no such sentence.

    Labels in the trace: `group` for a product, `given` for one that is taken away, `total` for the
    grown value, `rest` for what `goal` asks (<n> less the total), `part` for what `split` asks
    (the total divided by <n>).
    """

    ask: str
    group: str
    total: str = "now"
    given: str = "given"
    rest: str = "missing"
    part: str = "each"
    start: str | None = None
    start_groups: str | None = None
    more: str | None = None
    fewer: str | None = None
    more_groups: str | None = None
    fewer_groups: str | None = None
    goal: str | None = None
    split: str | None = None


def tell(sketch: Sketch, theme: Theme, *, steps: int) -> None:
    """Writes a problem of `steps` calculations in the theme's setting onto the sketch."""
    if theme.start is None or (theme.start_groups and sketch.chance(0.4)):
        assert theme.start_groups is not None, "a theme needs a start"
        value = _groups(sketch, theme.start_groups, theme.group)
        steps -= 1
    else:
        value = sketch.amount()
        sketch.say(theme.start, n=value)
    go_on(sketch, theme, value, steps=steps)


def go_on(sketch: Sketch, theme: Theme, value: int, *, steps: int) -> None:
    """Tells what follows once the total has a first value."""
    ending = sketch.pick(_endings(theme)) if steps and sketch.chance(0.4) else None
    value = sketch.play(value, _events(theme), steps=steps - (ending is not None))
    if ending is None:
        sketch.say(theme.ask)
    else:
        ending.apply(sketch, value)


@lru_cache(maxsize=64)
def _events(theme: Theme) -> tuple[Event, ...]:
    events = []
    for sign, label, group, template, groups_template in (
        ("+", theme.total, theme.group, theme.more, theme.more_groups),
        ("-", "left", theme.given, theme.fewer, theme.fewer_groups),
    ):
        if template:
            events.append(_change(template, sign, label))
        if groups_template:
            events.append(_change_by_groups(groups_template, sign, label, group))
    return tuple(events)


@lru_cache(maxsize=64)
def _endings(theme: Theme) -> tuple[Event | None, ...]:
    endings = []
    if theme.goal:
        endings.append(_reach(theme.goal, theme.rest))
    if theme.split:
        endings.append(_divide(theme.split, theme.part))
    return tuple(endings) or (None,)


def _groups(sketch: Sketch, template: str, label: str, *, most: int | None = None) -> int:
    groups, size = sketch.factors(most=most)
    sketch.say(template, a=groups, b=size)
    return sketch.step(sketch.phrase(label), groups, "*", size)


def _change(template: str, sign: str, label: str) -> Event:
    def apply(sketch: Sketch, value: int) -> int:
        number = sketch.addend(value) if sign == "+" else sketch.takeaway(value)
        sketch.say(template, n=number)
        return sketch.step(label, value, sign, number)

    return Event(1, apply)


def _change_by_groups(template: str, sign: str, label: str, group: str) -> Event:
    def apply(sketch: Sketch, value: int) -> int:
        room = sketch.level.max_result - value if sign == "+" else value - 1
        number = _groups(sketch, template, group, most=room)
        return sketch.step(label, value, sign, number)

    return Event(2, apply)


def _reach(template: str, label: str) -> Event:
    def apply(sketch: Sketch, value: int) -> int:
        goal = value + sketch.addend(value)
        sketch.say(template, n=goal)
        return sketch.step(label, goal, "-", value)

    return Event(1, apply)


def _divide(template: str, label: str) -> Event:
    def apply(sketch: Sketch, value: int) -> int:
        parts = sketch.divisor(value)
        sketch.say(template, n=parts)
        return sketch.step(sketch.phrase(label), value, "/", parts)

    return Event(1, apply)
