"""Prices, totals, change and savings, in whole dollars."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import THEN
from phikit.data.procedural.running import Theme, tell

SHOPPING = Theme(
    group="cost",
    total="total",
    rest="change",
    start="<who> buys a <thing> for <n> dollars.|a <thing> costs <n> dollars. <who> buys it.",
    start_groups="<who> buys <a> <items> {for|at} <b> dollars each."
    "|{each|one} <item> costs <b> dollars. <who> buys <a> {of them|<items>}.",
    more=THEN + "<he> {also |}{buys|gets} {a <other>|lunch} for <n> dollars."
    "|{then |}<he> pays <n> dollars more for {a <other>|lunch}."
    "|a <other> costs <him> <n> dollars more.",
    fewer="<he> gets <n> dollars off.|the price falls by <n> dollars.",
    more_groups=THEN + "<he> {also |}{buys|gets} <a> {<others>} {for|at} <b> dollars each."
    "|<he> {also |}needs <a> <others> that cost <b> dollars each.",
    goal="<he> {pays with|gives|has} <n> dollars. how"
    " {{much|many dollars} does <he> get back|much is <his> change|many dollars are left}?",
    split="<n> {friends|children} {share|split} the {cost|price} equally."
    " how {much|many dollars} does each {one |}pay?",
    ask="how {much|many dollars} does <he> {pay|spend} {in all|in total|altogether}?"
    "|what is the {total|whole} {cost|price}{ in dollars|}?",
)

SAVINGS = Theme(
    group="money",
    given="cost",
    start="<who> {has|starts with} <n> dollars.",
    start_groups="<who> {saves|earns} <a> dollars {each|a|every} {day|week} for <b> {days|weeks}."
    "|<who> works for <b> hours and {earns|gets} <a> dollars an hour.",
    more=THEN + "<he> {earns|gets|finds|saves} <n> {more |}dollars."
    "|{then |}<friend> gives <him> <n> dollars.",
    fewer=THEN + "<he> {spends|pays <friend>} <n> dollars."
    "|{then |}<he> buys a <other> for <n> dollars.",
    more_groups=THEN + "<he> {saves|earns} <a> dollars {each|a} day for <b> days."
    "|{then |}<he> sells <a> <items> {for|at} <b> dollars each.",
    fewer_groups=THEN + "<he> buys <a> <others> {for|at} <b> dollars each.",
    goal="<he> {wants to buy|needs to pay for|saves for} a <thing> that costs <n> dollars."
    " how {much|many dollars} {more |}does <he> {still |}need?",
    split="<he> {gives|pays} it {out |}equally to <n> {friends|children}."
    " how {much|many dollars} does each one get?",
    ask="how {much money|many dollars} does {<he>|<who>} have {now|in the end|left|then}?",
)


WARES = ("game", "shirt", "chair")


def money(rng: Random, *, steps: int, level: Level) -> Draft:
    """Shopping or saving in `steps` calculations."""
    sketch = Sketch(rng, level)
    sketch.slots["others"] = sketch.items[1].many
    sketch.slots["thing"], sketch.slots["other"] = rng.sample(WARES, 2)
    tell(sketch, sketch.pick((SHOPPING, SAVINGS)), steps=steps)
    return sketch.finish("money")
