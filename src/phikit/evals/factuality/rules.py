"""The judge without a model: reads reports in the words of `findings`, and compares what they say.

What cannot be read to its last word is not guessed at: the judgement is null. So this judge is for
synthetic reports, on which it is exact, and for nothing else.

An error is significant if the finding is none of the incidental ones, and

- a finding is false or omitted: always;
- the place is wrong: if the sides differ, and not the zone alone;
- the severity is wrong: if it is two grades off or more;
- a comparison is false or omitted: if it tells of something new or worse.

A place or a severity that one side leaves open is an insignificant error. A comparison that
contradicts the reference's is a false one, and the reference's is omitted.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phikit.evals.factuality.findings import (
    CHANGE_PHRASES,
    DEGREES,
    NORMAL_SENTENCES,
    OBSERVATIONS,
    SIZES,
    Change,
    Finding,
    place_phrases,
    places,
)
from phikit.evals.factuality.judgement import Error, ErrorType, Judge, Judgement, ReportPair

_FAR_GRADES = 2
_ALARMING: tuple[Change, ...] = ("new", "worse")
_FILLERS = ("there is", "is seen", "is noted", "a", "an", "or")
_NORMAL = {sentence.casefold() for sentence in NORMAL_SENTENCES}


class _Phrase(NamedTuple):
    """What a phrase of the vocabulary means."""

    kind: str
    value: Any


def read_report(text: str) -> dict[str, Finding]:
    """The findings of a synthetic report, by observation.

    Raises:
        ValueError: a sentence is not in the vocabulary, or contradicts another.
    """
    found: dict[str, Finding] = {}
    denied: set[str] = set()
    last: str | None = None
    for sentence in filter(None, map(str.strip, text.casefold().split("."))):
        if sentence in _NORMAL:
            continue
        said = _read_sentence(sentence)
        names = said.pop("observation", [])
        if said.pop("denial", None):
            _require(bool(names) and not said, sentence)
            denied.update(names)
        elif said.pop("back", None):
            _require(last is not None and not names and list(said) == ["change"], sentence)
            assert last is not None
            _require(found[last].change is None, sentence)
            found[last] = found[last]._replace(change=_only(said, "change", sentence))
        else:
            _require(len(names) == 1 and names[0] not in found, sentence)
            last = str(names[0])
            told = {key: _only(said, key, sentence) for key in ("place", "grade", "change")}
            found[last] = Finding(last, **told)
    if both := denied & found.keys():
        raise ValueError(f"it affirms and denies: {', '.join(sorted(both))}")
    return found


def compare(reference: Mapping[str, Finding], candidate: Mapping[str, Finding]) -> Counter[Error]:
    """The errors of a candidate's findings, both given by observation."""
    errors: Counter[Error] = Counter()
    for name in reference.keys() | candidate.keys():
        matters = not OBSERVATIONS[name].is_incidental
        gold, said = reference.get(name), candidate.get(name)
        if gold is None:
            errors[Error("false_finding", matters)] += 1
        elif said is None:
            errors[Error("omitted_finding", matters)] += 1
        else:
            errors.update(
                Error(kind, matters and is_grave) for kind, is_grave in _differences(gold, said)
            )
    return errors


def _differences(gold: Finding, said: Finding) -> Iterator[tuple[ErrorType, bool]]:
    """The errors about a finding that is there, and whether each would be significant."""
    if gold.place != said.place:
        sides = {place.side for place in (gold.place, said.place) if place is not None}
        yield "wrong_location", len(sides) == 2
    if gold.grade != said.grade:
        grades = [grade for grade in (gold.grade, said.grade) if grade is not None]
        yield "wrong_severity", max(grades) - min(grades) >= _FAR_GRADES
    if gold.change != said.change:
        if said.change is not None:
            yield "false_comparison", said.change in _ALARMING
        if gold.change is not None:
            yield "omitted_comparison", gold.change in _ALARMING


def _judge(pairs: Sequence[ReportPair]) -> list[Judgement]:
    return [_judged(pair) for pair in pairs]


RULES = Judge("rules", _judge)


def _judged(pair: ReportPair) -> Judgement:
    read: dict[str, dict[str, Finding]] = {}
    for side, text in pair._asdict().items():
        try:
            read[side] = read_report(text)
        except ValueError as error:
            return Judgement(None, f"the {side} cannot be read: {error}")
    return Judgement(compare(**read))


def _vocabulary() -> dict[str, _Phrase]:
    """Every phrase and its meaning."""
    known: dict[str, _Phrase] = {phrase: _Phrase("filler", None) for phrase in _FILLERS}
    known |= {"no": _Phrase("denial", True), "this is": _Phrase("back", True)}
    for key, observation in OBSERVATIONS.items():
        known |= {name: _Phrase("observation", key) for name in observation.names}
        for place in filter(None, places(observation)):
            known |= {phrase: _Phrase("place", place) for phrase in place_phrases(place)}
    for words in (SIZES, DEGREES):
        for grade, synonyms in enumerate(words):
            known |= {word: _Phrase("grade", grade) for word in synonyms}
    for change, phrases in CHANGE_PHRASES.items():
        known |= {phrase: _Phrase("change", change) for phrase in phrases}
    return known


_VOCABULARY = _vocabulary()
_LONGEST_FIRST = sorted(_VOCABULARY, key=len, reverse=True)
_NEXT = re.compile(rf"[\s,]*({'|'.join(map(re.escape, _LONGEST_FIRST))})(?![^\s,])")


def _read_sentence(sentence: str) -> dict[str, list[Any]]:
    """What a sentence says, by kind of phrase."""
    said: dict[str, list[Any]] = {}
    at = 0
    while at < len(sentence):
        found = _NEXT.match(sentence, at)
        if found is None:
            raise ValueError(f"unknown words: {sentence[at : at + 40].strip()!r}")
        kind, value = _VOCABULARY[found[1]]
        if kind != "filler":
            said.setdefault(kind, []).append(value)
        at = found.end()
    return said


def _only(said: Mapping[str, list[Any]], kind: str, sentence: str) -> Any:
    values = said.get(kind, [None])
    _require(len(values) == 1, sentence)
    return values[0]


def _require(is_sound: bool, sentence: str) -> None:
    if not is_sound:
        raise ValueError(f"it says too much or too little: {sentence[:60]!r}")
