import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phikit.chat.message import Message
from phikit.data.procedural import generate
from phikit.evals.routing import (
    Case,
    at,
    cases,
    curve,
    kept_interval,
    oracle,
    threshold_for,
    to_dict,
)
from phikit.evals.routing_plot import routing_chart
from phikit.evals.scorer import math_scorer
from phikit.solve.confidence import agreement, log_prob
from phikit.solve.solver import Reply

CASES = [
    Case("a", local=True, cloud=True, confidence=0.9),
    Case("b", local=False, cloud=True, confidence=0.2),
    Case("c", local=True, cloud=False, confidence=0.5),
    Case("d", local=False, cloud=True, confidence=0.5),
]

many = st.lists(
    st.builds(
        Case,
        st.just("x"),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, -math.inf]),
    ),
    min_size=1,
    max_size=30,
)


def test_the_curve_by_hand():
    points = curve(CASES, cost_per_call=2.0)
    assert [p.threshold for p in points] == [0.2, 0.5, 0.9, math.nextafter(0.9, 1)]
    assert [p.share for p in points] == [0, 0.25, 0.75, 1]
    assert [p.accuracy.mean for p in points] == [0.5, 0.75, 0.75, 0.75]
    assert [p.kept for p in points] == [0, 1, 1, 1]
    assert [p.cost for p in points] == [0, 0.5, 1.5, 2]
    assert oracle(CASES) == (0.5, 1.0)
    assert threshold_for(CASES, share=0.5) == 0.5
    assert threshold_for(CASES, share=0.0) == 0.2


@given(many)
def test_ends_and_bounds(judged: list[Case]):
    points = curve(judged)
    local = sum(c.local for c in judged) / len(judged)
    cloud = sum(c.cloud for c in judged) / len(judged)
    assert points[-1].share == 1 or not any(math.isfinite(c.confidence) for c in judged)
    if points[-1].share == 1:
        assert points[-1].accuracy.mean == pytest.approx(cloud)
    if all(math.isfinite(c.confidence) for c in judged):
        assert points[0].share == 0 and points[0].accuracy.mean == pytest.approx(local)
    shares = [p.share for p in points]
    assert shares == sorted(shares)
    _, best = oracle(judged)
    assert all(p.accuracy.mean <= best + 1e-9 for p in points)
    for share in (0.0, 0.3, 1.0):
        chosen = at(judged, threshold_for(judged, share=share))
        assert chosen.share <= max(share, points[0].share)
    json.dumps(to_dict(judged), allow_nan=False)


def test_the_interval_of_what_is_kept():
    judged = CASES * 100
    point = at(judged, 0.5)
    low, high = kept_interval(judged, 0.5)
    assert point.kept is not None and 0.6 < low < point.kept < high < 1.6
    assert kept_interval(judged, 0.5) == (low, high)
    assert kept_interval(judged, math.inf) == pytest.approx((1, 1))
    no_gap = [Case("a", True, True, 0.5)] * 10
    assert at(no_gap, 0.9).kept is None


def said(text: str, log_prob: float = -0.5, **changes: object) -> Reply:
    values = {"tokens": [1, 2], "log_probs": [log_prob, log_prob], "finished": True} | changes
    return Reply(Message("assistant", text), **values)  # pyright: ignore[reportArgumentType]


def test_cases_are_judged_by_the_reply_that_is_taken():
    problems = generate(seed=0, count=3, split="test")
    right = [f"\\boxed{{{p.answer}}}" for p in problems]
    local = [
        [said("\\boxed{no}", -0.1), said(right[0]), said(right[0])],
        [said("\\boxed{no}"), said("\\boxed{no}"), said(right[1])],
        [said("", error="too long")] * 3,
    ]
    cloud = [[said(text, tokens=[], log_probs=[])] for text in right]

    def answer_of(reply):
        return reply.message.content

    common = {"scorer": math_scorer(), "answer_of": answer_of}
    judged = cases(problems, local, cloud, signal=agreement, **common)
    assert [(c.local, c.cloud) for c in judged] == [(True, True), (False, True), (False, True)]
    assert [c.confidence for c in judged] == [2 / 3, 2 / 3, -math.inf]
    assert at(judged, 0.1).share == pytest.approx(1 / 3)  # what does not fit goes in any case
    judged = cases(problems, local, cloud, signal=log_prob, **common)
    assert not judged[0].local and judged[0].confidence == pytest.approx(-0.1)


def test_the_picture_is_drawn(tmp_path: Path):
    path = tmp_path / "router.png"
    record = to_dict(CASES)
    routing_chart({"log_prob": record, "agreement": record}, path, chosen=(0.25, 0.75))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
