"""Durations in minutes, and minutes on a clock."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import THEN
from phikit.data.procedural.running import Theme, go_on, tell

DO = "{reads|plays|runs|works|walks}"

BUSY = Theme(
    group="time",
    total="total",
    rest="left",
    start="<who> " + DO + " for <n> minutes.",
    start_groups="<who> " + DO + " <a> minutes {a|each|every} day for <b> days."
    "|<who> {runs|walks} <a> rounds of <b> minutes each."
    "|{one|each|a} round takes <b> minutes. <who> {runs|walks} <a> rounds.",
    more=THEN
    + "<he> "
    + DO
    + " for <n> {more |}minutes.|<he> needs <n> {more |}minutes for lunch.",
    fewer="{then |}<n> of {these|the} minutes {do not count|are not counted}.",
    more_groups=THEN + "<he> " + DO + " <a> times for <b> minutes each."
    "|{then |}<he> takes <a> breaks of <b> minutes each.",
    goal="<he> has <n> minutes{ in all|}."
    " how many minutes {are left|does <he> have left|are still free}?"
    "|<he> {wants|plans} to do <n> minutes{ in all|}. how many minutes are {left|missing}?",
    split="the time is {split|cut} into <n> equal parts."
    " how many minutes {is each part|are in one part}?",
    ask="how {many minutes|much time} is that {in all|in total|altogether}?",
)

CLOCK = Theme(
    group="time",
    total="clock",
    given="time",
    rest="left",
    start="{a|the} clock shows <n> minutes after <hour> o'clock.",
    more="{then |later |}{<n> {more |}minutes pass|it is set forward by <n> minutes}.",
    fewer="{then |later |}it is set back {by <n> minutes|<n> minutes}.",
    more_groups="{then |later |}<a> {games|breaks} of <b> minutes{ each|} {pass|go by}.",
    goal="{<who> must go|the bus comes|the show starts} <n> minutes after <hour> o'clock."
    " how many minutes {are left|are still left|is that from now}?",
    ask="how many minutes after <hour> o'clock {does it show {now|in the end}|is it {now|then}}?",
)


def time(rng: Random, *, steps: int, level: Level) -> Draft:
    """Minutes spent, or a clock followed, in `steps` calculations."""
    sketch = Sketch(rng, level)
    sketch.slots["hour"] = rng.randint(2, 9)
    if sketch.chance(0.3):
        _from_clock_times(sketch, steps)
    else:
        tell(sketch, sketch.pick((BUSY, CLOCK)), steps=steps)
    return sketch.finish("time")


def _from_clock_times(sketch: Sketch, steps: int) -> None:
    """Both clock times lie in one hour, so that the duration is a difference of minutes."""
    start, end = sorted(sketch.rng.sample(range(10, 60), 2))
    sketch.say(
        "<who> " + DO + " from <hour>:<a> to <hour>:<b>."
        "|from <hour>:<a> to <hour>:<b>, <who> " + DO + ".",
        a=start,
        b=end,
    )
    value = sketch.step("time", end, "-", start)
    go_on(sketch, BUSY, value, steps=steps - 1)
