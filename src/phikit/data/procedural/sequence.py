"""Number sequences: the rule is told, or is to be read off the first terms."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import COMMANDS

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
LIST = "{a {sequence|list}|<who> writes a list. it} {starts|begins} with"


def sequence(rng: Random, *, steps: int, level: Level) -> Draft:
    """A sequence whose asked term is `steps` calculations away."""
    sketch = Sketch(rng, level)
    shapes = [_told_rule, _sum_of_two]
    if steps > 1:
        shapes += [_from_terms, _two_rules]
    if steps in (3, 5):
        shapes.append(_growing_gap)
    sketch.pick(shapes)(sketch, steps)
    return sketch.finish("sequence")


def _gap(sketch: Sketch, value: int, times: int) -> tuple[str, int]:
    """A fresh gap that can be added, or taken away, this many times."""
    room = sketch.level.max_result - value
    up = sketch.chance(0.6)
    most = min((room if up else value) // times, sketch.level.max_addend)
    return ("+" if up else "-"), sketch.between(2, most)


def _walk(sketch: Sketch, value: int, rules: list[tuple[str, int]], *, first: int) -> int:
    for position, (operation, number) in enumerate(rules, start=first):
        value = sketch.step(ORDINALS[position], value, operation, number)
    return value


def _told_rule(sketch: Sketch, steps: int) -> None:
    value = sketch.amount()
    operation, gap = _gap(sketch, value, steps)
    sketch.say(LIST + " <n>.", n=value)
    sketch.say(
        "{each|every} {next |new }{term|number} is <g> <more> than the {last|one before}."
        "|{each time|at each step}{,|} {<verb> <g>|we <verb> <g>}.",
        g=gap,
        more="more" if operation == "+" else "less",
        verb="add" if operation == "+" else "take away",
    )
    _walk(sketch, value, [(operation, gap)] * steps, first=1)
    _ask(sketch, steps)


def _from_terms(sketch: Sketch, steps: int) -> None:
    """Three terms are shown; the first step finds the gap."""
    value = sketch.amount()
    operation, gap = _gap(sketch, value, steps + 1)
    sign = 1 if operation == "+" else -1
    terms = [value + sign * gap * i for i in range(3)]
    sketch.say(
        LIST + " <n>. the gap is {always |}the same."
        "|{look at|take} the {sequence|list} <n>. {the gap is always the same|all gaps are equal}."
        "|the {sequence|list} <n> goes on {in the same way|with equal gaps}.",
        n=", ".join(map(str, terms)),
    )
    sketch.step("gap", max(terms[:2]), "-", min(terms[:2]))
    _walk(sketch, terms[2], [(operation, gap)] * (steps - 1), first=3)
    _ask(sketch, steps + 1)


def _two_rules(sketch: Sketch, steps: int) -> None:
    """Two rules take turns."""
    start = value = sketch.factors()[0] if sketch.chance(0.5) else sketch.amount()
    rules: list[tuple[str, int]] = []
    for position in range(steps):
        if position == 0:
            rules.append(sketch.operation(value, "+-*"))
        elif position == 1:
            rules.append(sketch.operation(value, "+-*".replace(rules[0][0], "")))
        operation, number = rules[position % 2]
        value = sketch.step(ORDINALS[position + 1], value, operation, number)
    sketch.say(LIST + " <n>.", n=start)
    first, second = (sketch.phrase(COMMANDS[operation], n=number) for operation, number in rules)
    sketch.say(
        "{the rules take turns:|in turn, we|take turns:} <first>, {then |}<second>."
        "|{to get the next {term|number}, <first>|first <first>}. {after that|then} <second>."
        " {repeat|and so on|do this again and again}.",
        first=first,
        second=second,
    )
    _ask(sketch, steps)


def _sum_of_two(sketch: Sketch, steps: int) -> None:
    """Each term is the sum of the two before it."""
    before, value = sketch.between(2, 20), sketch.between(2, 20)
    sketch.say(LIST + " <a> and <b>.", a=before, b=value)
    sketch.say(
        "{each|every} {next |new |}{term|number} is the sum of the {last two|two before it}."
        "|{to get|for} the next {term|number}, add the last two."
    )
    for position in range(2, steps + 2):
        before, value = value, sketch.step(ORDINALS[position], before, "+", value)
    _ask(sketch, steps + 1)


def _growing_gap(sketch: Sketch, steps: int) -> None:
    """The gap itself grows by a fixed number, so terms and gaps alternate in the trace."""
    value = sketch.amount()
    gap, growth = sketch.between(2, 15), sketch.between(2, 9)
    sketch.say(LIST + " <n>.", n=value)
    sketch.say(
        "{first {we |}add|the first gap is} <g>. {each|every} {next |new }gap is <d> more"
        "{ than the last|}.",
        g=gap,
        d=growth,
    )
    value = sketch.step("second", value, "+", gap)
    for position in range(2, 2 + steps // 2):
        gap = sketch.step("gap", gap, "+", growth)
        value = sketch.step(ORDINALS[position], value, "+", gap)
    _ask(sketch, 1 + steps // 2)


def _ask(sketch: Sketch, position: int) -> None:
    sketch.say(
        "{what is|what do we get as} the <nth> {term|number}?"
        "|{find|give|work out} the <nth> {term|number}.",
        nth=ORDINALS[position],
    )
