"""What is measured of each family of problems about pictures and speech, and beside what.

A score means little alone. Beside it stands chance: the score of always giving the answer that was
the most frequent in training to a question of the same words.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from phikit.data.problem import Problem
from phikit.evals.metrics import (
    character_error_rate,
    exact_match,
    metric_scorer,
    normalise_speech,
    relaxed_accuracy,
    word_error_rate,
)
from phikit.evals.scorer import Score, Scorer
from phikit.evals.task import EvalResult
from phikit.solve.solver import Reply

Compare = Callable[[Sequence[str], Sequence[str]], float]
"""From references and replies to one number."""


class Measure(NamedTuple):
    """One number of many replies."""

    name: str
    of: Compare


def _mean_of(metric: Callable[[str, str], float]) -> Compare:
    return lambda references, replies: fmean(map(metric, references, replies))


EXACT = Measure("exact match", _mean_of(exact_match))
RELAXED = Measure("relaxed accuracy", _mean_of(relaxed_accuracy))
CER = Measure("CER", character_error_rate)
WER = Measure("WER", word_error_rate)
ERROR_RATES = (CER.name, WER.name)
"""Measures of which less is better."""

MEASURES: Mapping[str, Measure] = {
    "text": CER,
    "pages": CER,
    "chart": RELAXED,
    "spoken_digits": WER,
    "command": WER,
    "spoken_question": WER,
    "recorded_digits": WER,
    "librispeech": WER,
    "common_voice": WER,
}
"""By family; all others are measured by exact match."""


def measure_of(family: str) -> Measure:
    return MEASURES.get(family, EXACT)


def sense_scorer() -> Scorer:
    """A reply is correct where the measure of its family finds nothing wrong with it."""
    relaxed, exact = metric_scorer(relaxed_accuracy), metric_scorer(exact_match)

    def score(pairs: Sequence[tuple[Problem, Reply]]) -> list[Score]:
        return [
            (relaxed if measure_of(p.provenance.family) is RELAXED else exact)([(p, reply)])[0]
            for p, reply in pairs
        ]

    return score


def figures(result: EvalResult) -> dict[str, dict[str, Any]]:
    """The measure of every family in a result, as data: `{"measure", "value", "n"}`.

    A reply that was cut off or failed counts as what it says so far. Problems whose answer has no
    word, such as "...", say nothing about an error rate and are left out.
    """
    said: dict[str, list[tuple[str, str]]] = {}
    for record in result.records:
        said.setdefault(record.family, []).append((record.gold, record.replies[0].answer.strip()))
    return _figures(said)


def chance(
    problems: Iterable[Problem], answers: Mapping[str, Iterable[tuple[str, str]]]
) -> dict[str, dict[str, Any]]:
    """The same for always giving a question its most frequent answer in training.

    Args:
        answers: questions and answers of training, by family; other families are left out.
    """
    counted: dict[tuple[str, str], Counter[str]] = {}
    for family, pairs in answers.items():
        for question, answer in pairs:
            for key in ((family, question), (family, "")):
                counted.setdefault(key, Counter())[answer] += 1
    said: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        family = problem.provenance.family
        known = counted.get((family, problem.question)) or counted.get((family, ""))
        if known:
            said.setdefault(family, []).append((problem.answer, known.most_common(1)[0][0]))
    return _figures(said)


def _figures(said: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, dict[str, Any]]:
    """Of families' answers and replies; a family that cannot be measured has none."""
    told = {
        family: [
            (gold, reply)
            for gold, reply in pairs
            if measure_of(family).name not in ERROR_RATES or normalise_speech(gold)
        ]
        for family, pairs in said.items()
    }
    return {family: _figure(family, pairs) for family, pairs in told.items() if pairs}


def _figure(family: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    measure = measure_of(family)
    value = measure.of([gold for gold, _ in pairs], [reply for _, reply in pairs])
    return {"measure": measure.name, "value": value, "n": len(pairs)}
