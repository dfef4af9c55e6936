"""Synthetic reports with planted errors: the truth by which a judge is tested.

A pair is a pure function of seed and number. Its reference is a few random findings, its candidate
the same with some errors put in, and each is written in words of its own, so that a judge has to
see through the wording.

What is unusual: no planted error touches another. Each is about a part of a finding (its place,
its severity, its comparison, or all of it) that no other changes, and is of its kind by the way it
is made; nothing here asks the judge what counts as significant.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple

from phikit.evals.factuality.findings import (
    CHANGE_PHRASES,
    CHANGES,
    GRADES,
    NORMAL_SENTENCES,
    OBSERVATIONS,
    Change,
    Finding,
    Grade,
    place_phrases,
    places,
)
from phikit.evals.factuality.judgement import ERRORS, Error, ErrorType, ReportPair

MOST_FINDINGS = 5
MOST_DENIED = 3
_COMPARED = 0.5
"""Share of findings that are compared with an earlier study."""

Report = Mapping[str, Finding]
"""Findings by observation, in the order in which they are told."""


class Planted(NamedTuple):
    """A pair of reports, and the errors that are in it."""

    pair: ReportPair
    errors: Counter[Error]


def planted(*, seed: int, count: int, most_errors: int = 4) -> list[Planted]:
    """Pairs with up to so many errors each; identical findings, in other words, among them."""
    return [_planted(Random(f"{seed}:{index}"), most_errors) for index in range(count)]


def random_report(random: Random) -> dict[str, Finding]:
    """One to five findings."""
    names = random.sample(sorted(OBSERVATIONS), random.randint(1, MOST_FINDINGS))
    return {name: _random_finding(name, random) for name in names}


def write_report(report: Report, random: Random) -> str:
    """The findings in English sentences, among things that are denied or normal."""
    sentences = [_finding_sentence(finding, random) for finding in report.values()]
    absent = [name for name in OBSERVATIONS if name not in report]
    denied = random.sample(absent, min(len(absent), random.randint(0, MOST_DENIED)))
    if denied:
        sentences.insert(random.randint(0, len(sentences)), _denial(denied, random))
    for normal in random.sample(NORMAL_SENTENCES, random.randint(0, 2)):
        sentences.insert(random.randint(0, len(sentences)), normal)
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def corrupted(report: Report, error: Error, random: Random, *, taken: set[str]) -> Report | None:
    """The report with one error of this kind more, or None where it has no room for one.

    Args:
        taken: the parts of findings that hold an error already; what is changed is added.
    """
    if error.type == "false_finding":
        return _with_false_finding(report, error, random, taken)
    matters_as_wanted = [
        name for name in report if error.is_significant <= (not OBSERVATIONS[name].is_incidental)
    ]
    random.shuffle(matters_as_wanted)
    for name in matters_as_wanted:
        is_incidental = OBSERVATIONS[name].is_incidental
        if error.type == "omitted_finding":
            if is_incidental == error.is_significant or any(f"{name}{p}" in taken for p in _PARTS):
                continue
            taken.update(f"{name}{part}" for part in _PARTS)
            return {key: finding for key, finding in report.items() if key != name}
        part = _PART_OF[error.type]
        choices = _CHANGED[error.type](report[name], error.is_significant, is_incidental)
        if choices and f"{name}{part}" not in taken:
            taken.add(f"{name}{part}")
            return {**report, name: random.choice(choices)}
    return None


_FAR: tuple[tuple[Grade, ...], ...] = ((2, 3), (3,), (0,), (0, 1))
_NEAR: tuple[tuple[Grade, ...], ...] = ((1,), (0, 2), (1, 3), (2,))
"""From each grade, those that are two or three away, and one."""
_PARTS = (".place", ".grade", ".change")
_PART_OF: Mapping[ErrorType, str] = {
    "wrong_location": ".place",
    "wrong_severity": ".grade",
    "false_comparison": ".change",
    "omitted_comparison": ".change",
}


def _planted(random: Random, most_errors: int) -> Planted:
    reference: Report = random_report(random)
    candidate, errors = reference, Counter[Error]()
    taken: set[str] = set()
    for _ in range(random.randint(0, most_errors)):
        error = random.choice(ERRORS)
        changed = corrupted(candidate, error, random, taken=taken)
        if changed is not None:
            candidate = changed
            errors[error] += 1
    shuffled = dict(random.sample(list(candidate.items()), len(candidate)))
    return Planted(
        ReportPair(write_report(reference, random), write_report(shuffled, random)), errors
    )


def _random_finding(name: str, random: Random) -> Finding:
    observation = OBSERVATIONS[name]
    return Finding(
        name,
        place=random.choice(list(places(observation))),
        grade=None if observation.grades is None else random.choice((*GRADES, None)),
        change=random.choice(CHANGES) if random.random() < _COMPARED else None,
    )


def _with_false_finding(
    report: Report, error: Error, random: Random, taken: set[str]
) -> Report | None:
    free = [
        name
        for name, observation in OBSERVATIONS.items()
        if observation.is_incidental != error.is_significant
        and name not in report
        and not any(f"{name}{part}" in taken for part in _PARTS)
    ]
    if not free:
        return None
    name = random.choice(free)
    taken.update(f"{name}{part}" for part in _PARTS)
    return {**report, name: _random_finding(name, random)}


def _moved(finding: Finding, significant: bool, is_incidental: bool) -> list[Finding]:
    """To another side; or, of no significance, to another zone."""
    here = finding.place
    if here is None:
        return []
    there = [p for p in places(OBSERVATIONS[finding.observation]) if p is not None and p != here]
    if not is_incidental:
        there = [place for place in there if (place.side != here.side) == significant]
    return [finding._replace(place=place) for place in there]


def _regraded(finding: Finding, significant: bool, is_incidental: bool) -> list[Finding]:
    """By two or three grades; or, of no significance, by one, or left open."""
    here = finding.grade
    if here is None:
        return []
    far, near = _FAR[here], _NEAR[here]
    there = far if significant else (*near, *(far if is_incidental else ()), None)
    return [finding._replace(grade=grade) for grade in there]


def _compared(finding: Finding, significant: bool, is_incidental: bool) -> list[Finding]:
    """With an earlier study, which the reference does not speak of."""
    if finding.change is not None:
        return []
    changes: tuple[Change, ...] = ("new", "worse") if significant else ("better", "same")
    return [finding._replace(change=change) for change in (CHANGES if is_incidental else changes)]


def _uncompared(finding: Finding, significant: bool, is_incidental: bool) -> list[Finding]:
    """Without the comparison that the reference has."""
    is_alarming = finding.change in ("new", "worse")
    if finding.change is None or (is_alarming != significant and not is_incidental):
        return []
    return [finding._replace(change=None)]


_CHANGED: Mapping[ErrorType, Callable[[Finding, bool, bool], list[Finding]]] = {
    "wrong_location": _moved,
    "wrong_severity": _regraded,
    "false_comparison": _compared,
    "omitted_comparison": _uncompared,
}
"""From a finding, whether the error shall be significant, and whether the finding is incidental, to
the findings that differ by such an error."""


def _finding_sentence(finding: Finding, random: Random) -> str:
    """One sentence, or two of which the second holds the comparison."""
    thing = _thing(finding, random)
    where = "" if finding.place is None else random.choice(place_phrases(finding.place))
    forms = [f"there is {thing} {where}", f"{thing} is seen {where}", f"{thing} {where} is noted"]
    if where:
        forms.append(f"{where}, there is {thing}")
    sentence = " ".join(random.choice(forms).split())
    if finding.change is None:
        return sentence
    change = random.choice(CHANGE_PHRASES[finding.change])
    return sentence + random.choice((f", {change}", f". This is {change}"))


def _thing(finding: Finding, random: Random) -> str:
    observation = OBSERVATIONS[finding.observation]
    words = [random.choice(observation.names)]
    if finding.grade is not None:
        assert observation.grades is not None
        words.insert(0, random.choice(observation.grades[finding.grade]))
    if observation.article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def _denial(names: list[str], random: Random) -> str:
    things = [random.choice(OBSERVATIONS[name].names) for name in names]
    *first, last = things
    listed = f"{', '.join(first)} or {last}" if first else last
    return random.choice((f"no {listed}", f"there is no {listed}", f"no {listed} is seen"))
