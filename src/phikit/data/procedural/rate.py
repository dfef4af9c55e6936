"""Speed and work: so much each hour for some hours, stretch after stretch."""

from __future__ import annotations

from random import Random

from phikit.data.procedural.draft import Draft, Level, Sketch
from phikit.data.procedural.lexicon import THEN
from phikit.data.procedural.running import Theme, tell

EACH = "{each|an|every|per} hour"
MOVE = "{goes|travels} <a> miles " + EACH + " for <b>"
START_MOVE = (
    "<mover> " + MOVE + " hours.|for <b> hours <mover> {goes|travels} <a> miles " + EACH + "."
)

JOURNEY = Theme(
    group="miles",
    total="total",
    part="hours",
    start_groups=START_MOVE,
    more=THEN + "<it> {goes|travels} {<n> more miles|<n> miles more}.",
    more_groups=THEN + "<it> " + MOVE + " {more |}hours.",
    goal="the {whole |}{trip|way|road} is <n> miles{ long|}."
    " how many miles are {left|still left|still to go}?",
    split="<it> {goes|comes|travels} back {the same way |}at <n> miles " + EACH + "."
    " how many hours does {the way back|that} take?",
    ask="how {many miles|far} does <it> {go|travel} {in all|in total|altogether}?",
)

THERE_AND_BACK = Theme(
    group="miles",
    total="far",
    start_groups=START_MOVE,
    more=JOURNEY.more,
    fewer=THEN + "<it> {goes|comes} back <n> miles{ and turns again|, then turns again}.",
    more_groups=JOURNEY.more_groups,
    ask="how {many miles|far} from {home|the start} is <it> {now|in the end|then}?",
)

WORKSHOP = Theme(
    group="made",
    total="total",
    part="<boxes>",
    start_groups="<mover> makes <a> <items> " + EACH + " {for|and works for} <b> hours."
    "|<mover> works for <b> hours{ and|. <it>} makes <a> <items> " + EACH + ".",
    more="{then |}{<friend> brings <n> more|<n> more {<items> |}{come in|are made}}.",
    fewer=THEN + "<n> {of the <items> |of them |}{are sold|are lost|break|go to <friend>}.",
    more_groups=THEN + "<it> makes <a> {<items> |}" + EACH + " for <b> {more |}hours.",
    goal="{<it> needs|<friend> wants} <n> <items>{ in all|}."
    " how many {<items> |}are {still missing|still to be made|missing}?",
    split="{<n> {<items> |}go in each <box>|they go into <boxes> of <n>}."
    " how many <boxes> {are there|are needed|does <it> fill}?",
    ask="how many <items> {are there|does <it> have|are there to sell} {now|in the end}?",
)

TANK = Theme(
    group="water",
    start="{a|the} tank {holds|has|starts with} <n> gallons of water.",
    start_groups="{a|the} tank is empty{ at first|}. <a> gallons {of water |}"
    "{flow|come} in " + EACH + " for <b> hours.",
    more=THEN + "<n> more gallons {flow|come} in.",
    fewer=THEN + "<n> gallons flow out.|<who> uses <n> gallons.",
    more_groups=THEN + "<a> gallons {flow|come} in " + EACH + " for <b> hours.",
    fewer_groups=THEN + "<a> gallons flow out " + EACH + " for <b> hours.",
    goal="it is full at <n> gallons. how many {more |}gallons are {missing|needed}?",
    ask="how {many gallons|much water} {is in it|does it hold} {now|in the end|then}?",
)


def rate(rng: Random, *, steps: int, level: Level) -> Draft:
    """A journey, a workshop or a water tank, in `steps` calculations."""
    sketch = Sketch(rng, level)
    theme = sketch.pick((JOURNEY, THERE_AND_BACK, WORKSHOP, TANK))
    machine = "a machine" if theme is WORKSHOP else sketch.pick(("a bus", "a car"))
    person = sketch.chance(0.4)
    sketch.slots["mover"] = sketch.slots["who"] if person else machine
    sketch.slots["it"] = sketch.slots["he"] if person else "it"
    tell(sketch, theme, steps=steps)
    return sketch.finish("rate")
