"""Conditional rules with a number as the outcome; the trace says which way each condition went."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch, UnfitError
from phikit.data.procedural.lexicon import COMMANDS

GAINS = {
    "+": "<he> {gets|buys|finds} <n> {more|<items>}",
    "-": "<he> {sells|loses|gives away} <n>{ of them|}",
}


def logic(rng: Random, *, steps: int, level: Level) -> Draft:
    """Rules applied to a number or to someone's things, `steps` of them carried out."""
    sketch = Sketch(rng, level)
    with_things = sketch.chance(0.4)
    value = sketch.amount()
    if with_things:
        sketch.say("<who> {has|starts with|owns} <n> <items>.", n=value)
    else:
        sketch.say("{start with|take|take the number|begin with} <n>.", n=value)
    conditional = set(rng.sample(range(steps), min(steps, rng.randint(1, 2))))
    for position in range(steps):
        value = _rule(sketch, value, with_things, conditional=position in conditional)
    if with_things:
        sketch.say("how many {<items> |}does {<he>|<who>} have {now|in the end|then|left}?")
    else:
        sketch.say("{what {is the result|do you get|number is it now}?|give the {result|answer}.}")
    return sketch.finish("logic")


def _rule(sketch: Sketch, value: int, with_things: bool, *, conditional: bool) -> int:
    """One rule told and carried out. The branch not taken could have been taken just as well."""
    operations = "+-" if with_things else "+-*/"
    operation, number = sketch.operation(value, operations)
    taken = _command(sketch, operation, number, with_things)
    if not conditional:
        sketch.say(f"{{then |}}{taken}.")
        return sketch.step("then", value, operation, number)
    holds = sketch.chance(0.5)
    alternative = sketch.operation(value, operations)
    if alternative == (operation, number):
        raise UnfitError
    other = _command(sketch, *alternative, with_things)
    sketch.say(
        "{then |}if <test>, <yes>{;|.} {if not|otherwise|else}, <no>.",
        test=_condition(sketch, value, with_things, holds=holds),
        yes=taken if holds else other,
        no=other if holds else taken,
    )
    return sketch.step("yes" if holds else "no", value, operation, number)


def _command(sketch: Sketch, operation: str, number: int, with_things: bool) -> str:
    return sketch.phrase((GAINS if with_things else COMMANDS)[operation], n=number)


def _condition(sketch: Sketch, value: int, with_things: bool, *, holds: bool) -> str:
    """A condition on the value that holds, or does not, as asked."""
    subject = "<he> has" if with_things else "{it|the number} is"
    if not with_things and sketch.chance(0.3):
        even = (value % 2 == 0) == holds
        return sketch.phrase("{it|the number} is <parity>", parity="even" if even else "odd")
    below = sketch.between(max(2, value - 20), value - 1)
    above = sketch.between(value + 1, value + 20)
    more = sketch.chance(0.5)
    less_word = "fewer" if with_things else "less"
    return sketch.phrase(
        f"{subject} {'more' if more else less_word} than <n>",
        n=below if more == holds else above,
    )
