"""Linear equations in one unknown, in symbols or as a number riddle.

Each is built outwards from its solution, so that it has an exact answer; the trace undoes the
operations from the outside in.
"""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import COMMANDS

ASK = "what is <x>?|{find|give} <x>."
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def equation(rng: Random, *, steps: int, level: Level) -> Draft:
    """An equation that takes `steps` calculations, some of them after the unknown is found."""
    sketch = Sketch(rng, level)
    follow_up = steps > 1 and sketch.chance(0.25)
    solving = steps - follow_up
    if solving in (3, 4) and sketch.chance(0.4):
        unknown, solution = _both_sides(sketch, solving)
    elif solving > 3 or sketch.chance(0.5):
        unknown, solution = _riddle(sketch, solving)
    else:
        unknown, solution = _one_side(sketch, solving)
    if follow_up:
        operation, number = sketch.operation(solution, "+-*")
        sketch.say(ASK, x=f"{unknown} {operation} {number}")
        sketch.step("answer", solution, operation, number)
    else:
        sketch.say(ASK, x=unknown)
    return sketch.finish("equation")


def _start(sketch: Sketch) -> int:
    return sketch.factors()[0] if sketch.chance(0.5) else sketch.amount()


def _undo(sketch: Sketch, value: int, layers: list[tuple[str, int]]) -> None:
    for left, (operation, number) in zip(range(len(layers), 0, -1), reversed(layers), strict=True):
        label = "number" if left == 1 else "before"
        value = sketch.step(label, value, INVERSE[operation], number)


def _apply(value: int, operation: str, number: int) -> int:
    results = {"+": value + number, "-": value - number, "*": value * number}
    return results[operation] if operation in results else value // number


def _one_side(sketch: Sketch, steps: int) -> tuple[str, int]:
    """Such as 3 * (x + 4) = 21, with the right side sometimes a sum of its own."""
    name = sketch.pick(("x", "y", "n"))
    right_sum = steps > 1 and sketch.chance(0.3)
    solution = value = _start(sketch)
    text, layers = name, []
    for _ in range(steps - right_sum):
        operation, number = sketch.operation(value, _fresh_operations(layers))
        inner = f"({text})" if layers and operation in "*/" else text
        text = f"{number} * {inner}" if operation == "*" else f"{inner} {operation} {number}"
        value = _apply(value, operation, number)
        layers.append((operation, number))
    right = str(value)
    if right_sum:
        part = sketch.takeaway(value)
        right = f"{part} + {value - part}"
        sketch.step("sum", part, "+", value - part)
    _say_equation(sketch, *((text, right) if sketch.chance(0.75) else (right, text)))
    _undo(sketch, value, layers)
    return name, solution


def _fresh_operations(layers: list[tuple[str, int]]) -> str:
    """Adding twice in a row would be one step of a person's work, so operations alternate."""
    if not layers:
        return "+-*/"
    return "*/" if layers[-1][0] in "+-" else "+-"


def _both_sides(sketch: Sketch, steps: int) -> tuple[str, int]:
    """Such as 5 * x + 3 = 2 * x + 18, in three steps; in four, a constant is itself a sum."""
    name = sketch.pick(("x", "y", "n"))
    difference, solution = sketch.factors(most=sketch.level.max_result // 2)
    few = sketch.factors()[0]
    low = sketch.addend(difference * solution)
    high = difference * solution + low
    right = str(high)
    if steps == 4:
        part = sketch.takeaway(high)
        right = f"{part} + {high - part}"
        sketch.step("sum", part, "+", high - part)
    sides = f"{few + difference} * {name} + {low}", f"{few} * {name} + {right}"
    _say_equation(sketch, *(sides if sketch.chance(0.5) else sides[::-1]))
    sketch.step(f"{name} side", few + difference, "-", few)
    total = sketch.step("rest", high, "-", low)
    sketch.step("number", total, "/", difference)
    return name, solution


def _say_equation(sketch: Sketch, left: str, right: str) -> None:
    sketch.say(
        "{solve|look at|take} {the equation |}<e>.|we know that <e>.",
        e=f"{left} = {right}",
    )


def _riddle(sketch: Sketch, steps: int) -> tuple[str, int]:
    """A number is changed step by step; the result is told and the number asked."""
    solution = value = _start(sketch)
    layers: list[tuple[str, int]] = []
    sketch.say("{think of|take|start with|begin with} a number.")
    for _ in range(steps):
        operation, number = sketch.operation(value)
        sketch.say(f"{{then |next, |}}{COMMANDS[operation]}.", n=number)
        value = _apply(value, operation, number)
        layers.append((operation, number))
    sketch.say("{the result is|this gives|now it is|you get} <n>.", n=value)
    _undo(sketch, value, layers)
    return "the number", solution
