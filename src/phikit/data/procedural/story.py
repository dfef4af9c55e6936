"""Word problems about someone's things: gained, lost, bought in bags, shared, or told backwards."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import THEN
from phikit.data.procedural.running import Theme, tell

GAIN = (
    THEN + "{<he> {buys|gets|finds|makes} <n> more{ <items>|}"
    "|<friend> gives <him> <n> {more |}<items>}."
)
LOSE = (
    THEN + "{<he> {loses|sells|gives away|uses} <n> {<items>|of them}"
    "|<he> gives <n> {<items> |}to <friend>|<friend> takes <n> {of the <items>|<items>}}."
)

THINGS = Theme(
    group="<boxes>",
    start="<who> {has|had|starts with|finds} <n> <items>.",
    start_groups="<who> {has|buys|gets} <a> <boxes> {of <b> <items> each"
    "|with <b> <items> in each{ <box>|}}."
    "|there are <b> <items> in {each|a} <box>{. <who> has|, and <who> has} <a> <boxes>.",
    more=GAIN,
    fewer=LOSE,
    more_groups=THEN + "{<he> {buys|gets|finds}|<friend> gives <him>} <a> {more |}<boxes>"
    " {of <b> <items> each|with <b> {<items> |}in each}.",
    fewer_groups=THEN + "{<he> gives <b> {<items> |}to each of <a> {friends|children}"
    "|<a> {friends|children} {take|get} <b> {<items> |of them |}each}.",
    goal="{<he> wants|<he> needs} <n>{ <items>|}{ in all|}."
    " how many {more {<items> |}does <he> need|are {still |}missing}?",
    split="{then <n> {friends|children} share {the <items>|them} equally"
    "|<he> {shares|splits} {the <items>|them} equally among <n> {friends|children}}."
    " how many {<items> |}does each {friend|child|one} get?"
    "|<he> puts {the <items>|them} equally {in|into} <n> {<boxes>|rows}."
    " how many {<items> |}are in each one?",
    ask="how many <items> does {<who>|<he>} have {now|in the end|left|then}?"
    "|how many <items> are {there now|left}?"
    "|{find|work out} how many <items> {<who>|<he>} has {now|in the end}.",
)


def story(rng: Random, *, steps: int, level: Level) -> Draft:
    """A story of `steps` calculations about one person's things."""
    sketch = Sketch(rng, level)
    if sketch.chance(0.15):
        _tell_backwards(sketch, steps)
    else:
        tell(sketch, THINGS, steps=steps)
    return sketch.finish("story")


def _tell_backwards(sketch: Sketch, steps: int) -> None:
    """The end is known and the beginning asked, so the trace undoes the last event first."""
    value = sketch.amount()
    sketch.say("<who> {has|had} some <items>.")
    changes = []
    for _ in range(steps):
        operation, number = sketch.operation(value, "+-")
        value = value + number if operation == "+" else value - number
        sketch.say(GAIN if operation == "+" else LOSE, n=number)
        changes.append((operation, number))
    sketch.say(
        "{now <he> has|{in the end|at the end}, <he> has|that leaves <him> with} <n>{ <items>|}."
        " how many {<items> |}did {<who>|<he>} have {at first|at the start|to start with}?",
        n=value,
    )
    for operation, number in reversed(changes):
        value = sketch.step("before", value, "-" if operation == "+" else "+", number)
