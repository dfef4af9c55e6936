"""Bare calculation: a nested expression, or commands in words, done one operation at a time."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch, UnfitError
from phikit.data.procedural.lexicon import COMMANDS


def arithmetic(rng: Random, *, steps: int, level: Level) -> Draft:
    """A calculation with `steps` operations; the trace takes the innermost and leftmost first."""
    sketch = Sketch(rng, level)
    if steps > 1 and sketch.chance(0.35):
        _commands(sketch, steps)
    else:
        _, expression = _expression(sketch, steps, total=steps)
        sketch.say(
            "{what is|how much is|what do you get for|what is the value of} <x>?"
            "|{find|compute|work out|give} {the value of |}<x>.",
            x=expression,
        )
    return sketch.finish("arithmetic")


def _step(sketch: Sketch, total: int, left: int, operation: str, right: int) -> int:
    done = len(sketch.lines) + 1
    label = "last" if done == total else "first" if done == 1 else "next"
    return sketch.step(label, left, operation, right)


def _expression(sketch: Sketch, operations: int, *, total: int) -> tuple[int, str]:
    """The value and the text of a random expression tree with this many operations."""
    if operations == 0:
        number = sketch.factors()[0] if sketch.chance(0.4) else sketch.amount()
        return number, str(number)
    on_left = sketch.rng.randrange(operations)
    on_right = operations - 1 - on_left
    left, left_text = _expression(sketch, on_left, total=total)
    if on_right == 0:
        operation, right = sketch.operation(left)
        right_text = str(right)
    else:
        right, right_text = _expression(sketch, on_right, total=total)
        operation = _joining(sketch, left, right)
        right_text = f"({right_text})"
    if on_left:
        left_text = f"({left_text})"
    value = _step(sketch, total, left, operation, right)
    return value, f"{left_text} {operation} {right_text}"


def _joining(sketch: Sketch, left: int, right: int) -> str:
    """An operation that two given values allow."""
    level = sketch.level
    possible = []
    if left + right <= level.max_result:
        possible.append("+")
    if left > right:
        possible.append("-")
    if max(left, right) <= level.max_factor and left * right <= level.max_result:
        possible.append("*")
    if right and left % right == 0 and max(right, left // right) <= level.max_factor:
        possible.append("/")
    if not possible:
        raise UnfitError
    return sketch.pick(possible)


def _commands(sketch: Sketch, steps: int) -> None:
    value = sketch.amount()
    sketch.say("{start with|take|begin with|take the number} <n>.", n=value)
    for done in range(steps):
        operation, number = sketch.operation(value)
        then = "{then |next, |}" if done else "{first, |}"
        sketch.say(f"{then}{COMMANDS[operation]}.", n=number)
        value = _step(sketch, steps, value, operation, number)
    sketch.say("{what {is the result|do you get|number is it now}?|give the {result|answer}.}")
