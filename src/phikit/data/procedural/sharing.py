"""Equal shares and averages: pooling then dividing, averages and the missing number of one."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from phikit.data.procedural.draft import SMALLEST, Draft, Event, Level, Sketch, UnfitError
from phikit.data.procedural.lexicon import THEN

GROUP = "{friends|children}"


def sharing(rng: Random, *, steps: int, level: Level) -> Draft:
    """A share or an average found in `steps` calculations."""
    sketch = Sketch(rng, level)
    sketch.slots["group"] = sketch.phrase(GROUP)
    shapes = [_equal_shares]
    if steps > 1:
        shapes += [_average, _pool]
    if steps > 2:
        shapes.append(_missing_number)
    sketch.pick(shapes)(sketch, steps)
    return sketch.finish("sharing")


def _equal_shares(sketch: Sketch, steps: int) -> None:
    """One division, then what happens to the share of one of them."""
    number, share = sketch.factors()
    sketch.say(
        "<n> <group> {share|split} <t> <items> equally."
        "|<t> <items> are {shared|split} equally {by|among} <n> <group>."
        "|<who> {shares|splits} <t> <items> equally among <n> <group>.",
        n=number,
        t=number * share,
    )
    value = sketch.step("each", number * share, "/", number)
    if steps == 1:
        sketch.say("how many {<items> |}does each {one |of them |}get?")
        return
    sketch.say("{<friend> is one of them|one of them is <friend>|<friend> gets one share}.")
    sketch.play(value, SHARE_EVENTS, steps=steps - 1)
    sketch.say("how many <items> does <friend> have {now|in the end|then}?")


def _gain(sketch: Sketch, value: int) -> int:
    number = sketch.addend(value)
    sketch.say(THEN + "<friend> {gets|buys|finds} <n> {more |}<items>.", n=number)
    return sketch.step("now", value, "+", number)


def _lose(sketch: Sketch, value: int) -> int:
    number = sketch.takeaway(value)
    sketch.say(THEN + "<friend> {loses|sells|gives away} <n>{ <items>| of them|}.", n=number)
    return sketch.step("left", value, "-", number)


def _gain_bags(sketch: Sketch, value: int) -> int:
    bags, size = sketch.factors(most=sketch.level.max_result - value)
    template = THEN + "<friend> {gets|buys|finds} <a> <boxes> {of|with} <b> <items>."
    sketch.say(template, a=bags, b=size)
    return sketch.step("now", value, "+", sketch.step(sketch.container.many, bags, "*", size))


SHARE_EVENTS = (Event(1, _gain), Event(1, _lose), Event(2, _gain_bags))


def _pool(sketch: Sketch, steps: int) -> None:
    """Several people's things are put together and shared."""
    change = steps > 2 and sketch.chance(0.6)
    shares, share = sketch.factors()
    amounts = _summands(sketch, steps - change, shares * share)
    has = sketch.phrase("{has|brings}")
    for number, (person, amount) in enumerate(zip(sketch.people, amounts, strict=False)):
        template = "<p> <has> <n>{ <items>|}." if number else "<p> <has> <n> <items>."
        sketch.say(template, p=person.name, has=has, n=amount)
    sketch.say(
        "{all the <items>|the <items>|they} are {shared|split} equally among <n> <group>."
        "|<n> <group> {share|split} {all the <items>|the <items>|them} equally.",
        n=shares,
    )
    value = sketch.step("each", _total(sketch, amounts), "/", shares)
    if change:
        _change_each(sketch, value)
    else:
        sketch.say("how many {<items> |}does each {one|of the <group>} get?")


def _change_each(sketch: Sketch, value: int) -> None:
    """Everyone's share changes alike."""
    operation, number = sketch.operation(value, "+-")
    sketch.say(
        THEN + "each {one|of them} {gets|finds|buys} <n> more."
        if operation == "+"
        else THEN + "each {one|of them} {sells|loses|uses} <n>.",
        n=number,
    )
    sketch.say("how many <items> does each {one|of them|of the <group>} have {now|in the end}?")
    sketch.step("now" if operation == "+" else "left", value, operation, number)


def _average(sketch: Sketch, steps: int) -> None:
    average = sketch.between(3, sketch.level.max_factor)
    amounts = _summands(sketch, steps, steps * average)
    sketch.say(
        "<n> <group> {have|find|buy|sell} <list> <items>."
        "|<who> has <n> <boxes>{. they hold| with} <list> <items>."
        "|{on <n> days|in <n> {days|weeks}}, <who> {finds|sells|makes} <list> <items>.",
        n=steps,
        list=_listed(amounts),
    )
    sketch.say("{what is the average{ number|}?|{find|give} the average{ number of <items>|}.}")
    sketch.step("average", _total(sketch, amounts), "/", steps)


def _missing_number(sketch: Sketch, steps: int) -> None:
    """An average and all numbers but one are given."""
    average = sketch.between(4, sketch.level.max_factor)
    *amounts, _ = _summands(sketch, steps, steps * average)
    sketch.say(
        "<n> <group> have <average> <items> on average."
        "|on average, <n> <group> {have|own} <average> <items>{ each|}."
        "|on average, each of <n> <group> has <average> <items>.",
        n=steps,
        average=average,
    )
    sketch.say(
        "{all but one|all but the last} have <list>. how many {<items> |}does the last one have?"
        "|<who> is one of them. the others have <list>. how many {<items> |}does <who> have?",
        list=_listed(amounts),
    )
    whole = sketch.step("all", steps, "*", average)
    sketch.step("last", whole, "-", _total(sketch, amounts))


def _summands(sketch: Sketch, count: int, total: int) -> list[int]:
    """Fresh numbers with this sum."""
    cuts = sorted(sketch.rng.sample(range(1, max(total - count, count)), count - 1))
    numbers = [1 + high - low for low, high in pairwise((0, *cuts, total - count))]
    if not SMALLEST <= min(numbers) <= max(numbers) <= sketch.level.max_addend:
        raise UnfitError
    return numbers


def _total(sketch: Sketch, numbers: list[int]) -> int:
    total, *rest = numbers
    for number in rest:
        total = sketch.step("sum", total, "+", number)
    return total


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
