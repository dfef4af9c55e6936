"""A task, and the record of one evaluation.

The record keeps every reply, so that a result can be read, scored again and paired with another
one problem by problem; the summary is computed from it and never stored apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Self, TypeVar

from phikit.base.errors import DataError
from phikit.data.problem import Problem
from phikit.evals.scorer import STATUSES, Score, Scorer, Status
from phikit.evals.stats import Estimate, Vote, mean_stderr
from phikit.evals.verify import normalise
from phikit.solve.solver import Reply, Solver

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Task:
    """Problems, how they are solved, and how a reply is scored."""

    name: str
    problems: Sequence[Problem]
    solver: Solver
    scorer: Scorer


@dataclass(frozen=True, slots=True)
class ReplyRecord:
    """One reply: its score, its length in tokens, and what the model thought and said."""

    status: Status
    extracted: str | None
    reason: str | None
    num_tokens: int
    thinking: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class ProblemRecord:
    """One problem and its replies; `steps` is None where the data does not say."""

    content_hash: str
    family: str
    steps: int | None
    question: str
    gold: str
    replies: tuple[ReplyRecord, ...]

    @property
    def values(self) -> list[float]:
        return [1.0 if reply.status == "correct" else 0.0 for reply in self.replies]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """All replies of one evaluation, problems in the order of the task."""

    task: str
    records: tuple[ProblemRecord, ...]

    @property
    def accuracy(self) -> Estimate:
        """Mean over problems of the share of correct replies (avg@n); error over problems."""
        return mean_stderr(self.outcomes())

    @property
    def statuses(self) -> dict[Status, int]:
        """Number of replies with each status, all five named."""
        counts = Counter(reply.status for record in self.records for reply in record.replies)
        return {status: counts[status] for status in STATUSES}

    @property
    def mean_tokens(self) -> float:
        """Mean reply length in tokens, the stop token included."""
        return fmean(reply.num_tokens for record in self.records for reply in record.replies)

    def outcomes(self) -> list[list[float]]:
        """1.0 or 0.0 for each reply of each problem: the input of `stats`."""
        return [record.values for record in self.records]

    def scores(self) -> list[tuple[str, float]]:
        """(content hash, mean value) of each problem: the input of `stats.paired_difference`."""
        return [(record.content_hash, fmean(record.values)) for record in self.records]

    def votes(self) -> list[list[Vote]]:
        """Each problem's extracted answers in canonical form: the input of `stats.maj_at_n`."""
        return [
            [
                Vote(None if r.extracted is None else normalise(r.extracted), r.status == "correct")
                for r in record.replies
            ]
            for record in self.records
        ]

    def by_steps(self) -> dict[str, Estimate]:
        """Accuracy at each difficulty, easiest first; problems of unknown difficulty left out."""
        known = [(r.steps, r) for r in self.records if r.steps is not None]
        groups = _accuracy_by(known)
        return {str(steps): groups[steps] for steps in sorted(groups)}

    def by_family(self) -> dict[str, Estimate]:
        """Accuracy of each family of problems, by name."""
        groups = _accuracy_by((record.family, record) for record in self.records)
        return {family: groups[family] for family in sorted(groups)}

    def summary(self) -> dict[str, Any]:
        """The numbers that a stage of results.json carries."""
        accuracy = self.accuracy
        return {
            "accuracy": accuracy.mean,
            "stderr": accuracy.stderr,
            "n": accuracy.n,
            "mean_tokens": self.mean_tokens,
            "statuses": dict(self.statuses),
            "by_steps": {key: _plain(value) for key, value in self.by_steps().items()},
            "by_family": {key: _plain(value) for key, value in self.by_family().items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the summary for readers, the records for `from_dict`."""
        records = [asdict(record) for record in self.records]
        return {"task": self.task, "summary": self.summary(), "records": records}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            DataError: a key is missing or unknown.
        """
        try:
            records = tuple(
                ProblemRecord(
                    **{**record, "replies": tuple(ReplyRecord(**r) for r in record["replies"])}
                )
                for record in data["records"]
            )
            return cls(data["task"], records)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"not the record of an evaluation: {error}", fix="evaluate again with this version"
            ) from error


def evaluate(task: Task) -> EvalResult:
    """Solve and score every problem of a task once.

    Raises:
        DataError: the task has no problems.
    """
    if not task.problems:
        raise DataError(f"task {task.name!r} has no problems", fix="check its data")
    replies = task.solver(task.problems)
    assert len(replies) == len(task.problems), (len(replies), len(task.problems))
    pairs = [(p, reply) for p, rs in zip(task.problems, replies, strict=True) for reply in rs]
    scores = task.scorer(pairs)
    assert len(scores) == len(pairs), (len(scores), len(pairs))
    remaining = iter(scores)
    records = tuple(
        _record(problem, [(reply, next(remaining)) for reply in group])
        for problem, group in zip(task.problems, replies, strict=True)
    )
    return EvalResult(task.name, records)


def _record(problem: Problem, replies: Iterable[tuple[Reply, Score]]) -> ProblemRecord:
    return ProblemRecord(
        content_hash=problem.content_hash,
        family=problem.provenance.family,
        steps=problem.steps,
        question=problem.question,
        gold=problem.answer,
        replies=tuple(
            ReplyRecord(
                status=score.status,
                extracted=score.extracted,
                reason=score.reason,
                num_tokens=len(reply.tokens),
                thinking=reply.message.thinking,
                answer=reply.message.content,
            )
            for reply, score in replies
        ),
    )


def _accuracy_by(records: Iterable[tuple[Key, ProblemRecord]]) -> dict[Key, Estimate]:
    groups: dict[Key, list[list[float]]] = {}
    for key, record in records:
        groups.setdefault(key, []).append(record.values)
    return {name: mean_stderr(outcomes) for name, outcomes in groups.items()}


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {"accuracy": estimate.mean, "stderr": estimate.stderr, "n": estimate.n}
