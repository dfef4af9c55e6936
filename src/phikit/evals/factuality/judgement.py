"""Errors of reports against their references, counted by a judge in the manner of CheXprompt.

Twelve kinds: six types of error, each clinically significant or not. A judge is any function from
pairs to judgements, as a Scorer is one from replies to scores: `judge.model_judge` asks a model,
`rules.RULES` reads the synthetic reports of `synthetic` exactly, without a network.

What is unusual: a judgement may be null. A judge that fails, or writes what cannot be read, has
not found a report free of errors; every figure is over the judged reports alone and stands beside
the share of nulls.

Sources: CheXprompt in LLaVA-Rad (arXiv 2403.08002); the six types from ReXVal (Yu et al., Patterns
4:100802, 2023).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from phikit.base.errors import DataError
from phikit.data.rows import read_rows
from phikit.evals.stats import bootstrap, wilson

ErrorType = Literal[
    "false_finding",
    "omitted_finding",
    "wrong_location",
    "wrong_severity",
    "false_comparison",
    "omitted_comparison",
]
ERROR_TYPES: tuple[ErrorType, ...] = get_args(ErrorType)
"""CheXprompt's A to F. The comparisons are with an earlier study."""


class Error(NamedTuple):
    """One of the twelve kinds."""

    type: ErrorType
    is_significant: bool


ERRORS = tuple(Error(*kind) for kind in product(ERROR_TYPES, (True, False)))


class ReportPair(NamedTuple):
    """A report to be judged, and what it should say."""

    reference: str
    candidate: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge found in one pair."""

    errors: Mapping[Error, int] | None
    """How many of each kind, absent ones being none; None is a judgement that failed."""
    reason: str | None = None
    """Why it failed."""

    def count(self, *, significant: bool = False) -> int | None:
        """How many errors, or how many significant ones; None for a null."""
        if self.errors is None:
            return None
        return sum(n for e, n in self.errors.items() if e.is_significant or not significant)


class Judge(NamedTuple):
    """Counts the errors of reports, in order."""

    name: str
    """What a result has to say about who judged: the model and a hash of what it was told."""
    judge: Callable[[Sequence[ReportPair]], list[Judgement]]


@dataclass(frozen=True, slots=True)
class Factuality:
    """The judgements of one set of reports, by one judge."""

    judge: str
    judgements: tuple[Judgement, ...]

    def summary(self) -> dict[str, Any]:
        """The figures, as plain data.

        Those over judged reports are None where there are none; intervals are of 95 %, of means by
        a bootstrap over reports (None for one report), of shares by Wilson's method.
        """
        judged = [each for each in self.judgements if each.errors is not None]
        n, nulls = len(self.judgements), len(self.judgements) - len(judged)
        return {
            "judge": self.judge,
            "n": n,
            "judged": len(judged),
            "null_rate": _share(nulls, n),
            "errors_per_report": _mean(judged, significant=False),
            "significant_errors_per_report": _mean(judged, significant=True),
            "without_significant_error": _without(judged, significant=True),
            "without_error": _without(judged, significant=False),
            "errors": _table(judged),
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary, and the judgement of every report."""
        judgements = [
            {
                "errors": None if each.errors is None else _table([each]),
                "reason": each.reason,
            }
            for each in self.judgements
        ]
        return {"summary": self.summary(), "judgements": judgements}


def judge_reports(pairs: Sequence[ReportPair], judge: Judge) -> Factuality:
    """Judge every pair once.

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError("no reports to judge", fix="check the file")
    judgements = judge.judge(pairs)
    assert len(judgements) == len(pairs), (len(judgements), len(pairs))
    return Factuality(judge.name, tuple(judgements))


def agreement(result: Factuality, truth: Sequence[Mapping[Error, int]]) -> dict[str, Any]:
    """How near a judge comes to the errors that are known to be there, over what it judged.

    The mean absolute difference in errors per report is the measure by which CheXprompt was
    compared with radiologists (LLaVA-Rad, figure 4a).
    """
    found = [
        (each, Judgement(planted))
        for each, planted in zip(result.judgements, truth, strict=True)
        if each.errors is not None
    ]
    exact = sum(Counter(a.errors) == Counter(b.errors) for a, b in found)
    return {
        "judged": len(found),
        "exactly_right": _share(exact, len(found)),
        "mean_difference": _difference(found, significant=False),
        "mean_difference_significant": _difference(found, significant=True),
    }


def read_pairs(path: Path) -> list[ReportPair]:
    """Pairs from a JSONL file of `{"reference": ..., "candidate": ...}` rows.

    A candidate may be empty: its errors are omissions.

    Raises:
        DataError: the file cannot be used; names the line and the reason.
    """
    keys = ReportPair._fields
    rows = read_rows(path, required=keys, may_be_empty=("candidate",))
    pairs = [ReportPair(**fields) for _, fields in rows]
    if not pairs:
        raise DataError(
            f"{path}: no reports in the file",
            fix='write one JSON object a line: {"reference": "...", "candidate": "..."}',
        )
    return pairs


def _counts(judged: Sequence[Judgement], significant: bool) -> list[int]:
    counts = [each.count(significant=significant) for each in judged]
    return [count for count in counts if count is not None]


def _mean(judged: Sequence[Judgement], *, significant: bool) -> dict[str, float | None] | None:
    counts = _counts(judged, significant)
    if not counts:
        return None
    low, high = bootstrap(counts) if len(counts) > 1 else (None, None)
    return {"mean": fmean(counts), "low": low, "high": high}


def _without(judged: Sequence[Judgement], *, significant: bool) -> dict[str, float] | None:
    return _share(_counts(judged, significant).count(0), len(judged))


def _share(count: int, n: int) -> dict[str, float] | None:
    if n == 0:
        return None
    return {"share": count / n, **wilson(count, n)._asdict()}


def _table(judged: Sequence[Judgement]) -> dict[ErrorType, dict[str, int]] | None:
    """How many errors of each kind there are in all."""
    if not judged:
        return None
    totals: Counter[Error] = Counter()
    for each in judged:
        totals.update(each.errors or {})
    return {
        name: {
            "significant": totals[Error(name, True)],
            "insignificant": totals[Error(name, False)],
        }
        for name in ERROR_TYPES
    }


def _difference(found: Sequence[tuple[Judgement, Judgement]], *, significant: bool) -> float | None:
    counts = [[each.count(significant=significant) or 0 for each in pair] for pair in found]
    return fmean(abs(a - b) for a, b in counts) if counts else None
