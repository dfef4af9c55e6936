"""Scorers: what was a reply worth? The same object judges an evaluation and rewards training.

Five statuses, never folded together: a model that cannot stop, one that forgets the box and one
that computes badly need different cures.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from phikit.data.problem import Problem
from phikit.evals.verify import Verdict, Verifier, equal, extract_answer
from phikit.solve.solver import Reply

Status = Literal["correct", "wrong", "unparsed", "truncated", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Score(NamedTuple):
    """A status, the answer that was found in the reply, and for an error its reason."""

    status: Status
    extracted: str | None = None
    reason: str | None = None

    @property
    def value(self) -> float:
        """1.0 for a correct reply, 0.0 for every other status."""
        return 1.0 if self.status == "correct" else 0.0


Scorer = Callable[[Sequence[tuple[Problem, Reply]]], list[Score]]
"""Scores for (problem, reply) pairs, in order."""


def math_scorer(*, verifier: Verifier | None = None, lenient: bool = False) -> Scorer:
    r"""Score the last `\boxed{}` of the reply's content against `problem.answer`.

    The thinking is not read; where it ends, the renderer has decided.

    The first rule that applies decides:

    1. error: the solver gave no reply, or the comparison failed or timed out.
    2. truncated: the reply hit the length limit, whatever it contains; it has not stopped, so it
       has no last word.
    3. unparsed: no box (with `lenient`: no number either).
    4. correct or wrong.

    Args:
        verifier: settles what arithmetic cannot (`2\sqrt{2}` against `\sqrt{8}`). None compares
            strings and exact numbers only, in this process: an answer that is neither is wrong.
        lenient: fall back on the last number where there is no box.
    """

    def score(pairs: Sequence[tuple[Problem, Reply]]) -> list[Score]:
        scores = [_without_comparison(reply, lenient) for _, reply in pairs]
        pending = [
            (i, problem.answer, answer)
            for i, ((problem, _), (_, answer)) in enumerate(zip(pairs, scores, strict=True))
            if answer is not None
        ]
        compared = [(gold, answer) for _, gold, answer in pending]
        verdicts = _compare(compared, verifier)
        results = [score for score, _ in scores]
        for (i, _, answer), verdict in zip(pending, verdicts, strict=True):
            results[i] = _judged(answer, verdict)
        return results

    return score


def _without_comparison(reply: Reply, lenient: bool) -> tuple[Score, str | None]:
    """The score when it needs no comparison, and otherwise the answer to compare."""
    if reply.error is not None:
        return Score("error", None, reply.error), None
    answer = extract_answer(reply.message.content, lenient=lenient)
    if not reply.finished:
        return Score("truncated", answer), None
    return Score("unparsed"), answer


def _compare(pairs: Sequence[tuple[str, str]], verifier: Verifier | None) -> list[Verdict]:
    if verifier is not None:
        return verifier.check(pairs)
    return [Verdict(equal(gold, answer) is True) for gold, answer in pairs]


def _judged(answer: str, verdict: Verdict) -> Score:
    if verdict.error is not None:
        return Score("error", answer, verdict.error)
    return Score("correct" if verdict.equal else "wrong", answer)
