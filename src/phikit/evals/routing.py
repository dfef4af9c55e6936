"""What a router is worth: accuracy against the share of problems that go to the cloud.

Every problem is answered by both sides once; what each threshold would have done is then counted,
not tried. Beside it stand two lines that need no model: random routing, which is the straight line
between the two accuracies, and the oracle, which sends exactly what the cloud alone gets right.

The share of the gap that is kept, (routed - local) / (cloud - local), is a ratio of two noisy
numbers; its interval is a bootstrap over problems.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phikit.data.problem import Problem
from phikit.evals.scorer import Scorer
from phikit.evals.stats import Estimate, Interval, bootstrap, mean_stderr
from phikit.generate.chat import ChatReply
from phikit.solve.confidence import AnswerOf, Opinion
from phikit.solve.solver import Reply


class Case(NamedTuple):
    """One problem: whether each side is right, and how sure the local one was."""

    content_hash: str
    local: bool
    cloud: bool
    confidence: float


class Point(NamedTuple):
    """What one threshold does."""

    threshold: float
    share: float
    """Of the problems that go to the cloud."""
    accuracy: Estimate
    kept: float | None
    """Of the gap between the two sides; None if there is none."""
    cost: float
    """Of the cloud's calls, per problem."""


def cases(
    problems: Sequence[Problem],
    local: Sequence[Sequence[Reply]],
    cloud: Sequence[Sequence[Reply]],
    *,
    scorer: Scorer,
    signal: Callable[[Sequence[ChatReply], AnswerOf], Opinion],
    answer_of: AnswerOf,
) -> list[Case]:
    """The problems with both sides' replies judged; a problem that does not fit the local model
    has the confidence minus infinity, since it goes to the cloud in any case."""
    chosen, confidences = [], []
    for replies in local:
        if any(reply.error is not None for reply in replies):
            choice, confidence = 0, -math.inf
        else:
            choice, confidence = signal([_as_chat(reply) for reply in replies], answer_of)
        chosen.append(replies[choice])
        confidences.append(confidence)
    here = scorer(list(zip(problems, chosen, strict=True)))
    there = scorer([(p, replies[0]) for p, replies in zip(problems, cloud, strict=True)])
    return [
        Case(problem.content_hash, a.status == "correct", b.status == "correct", confidence)
        for problem, a, b, confidence in zip(problems, here, there, confidences, strict=True)
    ]


def curve(judged: Sequence[Case], *, cost_per_call: float = 0.0) -> list[Point]:
    """Every threshold that makes a difference, from the fewest cloud calls to all of them."""
    values = sorted({case.confidence for case in judged if math.isfinite(case.confidence)})
    ends = [math.nextafter(values[-1], math.inf)] if values else [0.0]
    return [at(judged, threshold, cost_per_call=cost_per_call) for threshold in values + ends]


def at(judged: Sequence[Case], threshold: float, *, cost_per_call: float = 0.0) -> Point:
    """What this threshold does: confidence below it goes to the cloud."""
    sent = [case.confidence < threshold for case in judged]
    right = [
        case.cloud if is_sent else case.local for case, is_sent in zip(judged, sent, strict=True)
    ]
    accuracy = mean_stderr([[float(value)] for value in right])
    low, high = (fmean(getattr(case, side) for case in judged) for side in ("local", "cloud"))
    share = fmean(sent)
    kept = None if high == low else (accuracy.mean - low) / (high - low)
    return Point(threshold, share, accuracy, kept, share * cost_per_call)


def threshold_for(judged: Sequence[Case], *, share: float) -> float:
    """The greatest threshold that sends at most this share to the cloud, or the least there is."""
    points = curve(judged)
    return max((p.threshold for p in points if p.share <= share), default=points[0].threshold)


def kept_interval(judged: Sequence[Case], threshold: float, *, seed: int = 0) -> Interval:
    """The 95 % interval of the share of the gap that a threshold keeps.

    Raises DataError where there is no gap.
    """

    def kept(drawn: NDArray[np.float64]) -> float:
        local, cloud, sent = drawn.T
        gap = (cloud - local).mean()
        return (sent * (cloud - local)).mean() / gap if gap else math.nan

    rows = [(c.local, c.cloud, c.confidence < threshold) for c in judged]
    return bootstrap(rows, kept, seed=seed)


def oracle(judged: Sequence[Case]) -> tuple[float, float]:
    """The fewest cloud calls, as a share, that reach the best accuracy; and that accuracy."""
    gained = fmean(case.cloud and not case.local for case in judged)
    return gained, fmean(case.local for case in judged) + gained


def to_dict(judged: Sequence[Case], *, cost_per_call: float = 0.0) -> dict[str, Any]:
    """Plain data: both sides, the oracle, and the curve."""
    sides = {
        side: mean_stderr([[float(getattr(case, side))] for case in judged])._asdict()
        for side in ("local", "cloud")
    }
    share, best = oracle(judged)
    points = curve(judged, cost_per_call=cost_per_call)
    return {
        "problems": len(judged),
        **sides,
        "oracle": {"share": share, "accuracy": best},
        "curve": [
            {
                "threshold": point.threshold,
                "share": point.share,
                "accuracy": point.accuracy.mean,
                "stderr": point.accuracy.stderr,
                "kept": point.kept,
                "cost": point.cost,
            }
            for point in points
        ],
    }


def _as_chat(reply: Reply) -> ChatReply:
    return ChatReply(
        message=reply.message,
        finish_reason="stop" if reply.finished else "length",
        prompt_tokens=0,
        reply_tokens=len(reply.tokens),
        mean_log_prob=fmean(reply.log_probs) if reply.log_probs else None,
        min_log_prob=min(reply.log_probs, default=None),
    )
