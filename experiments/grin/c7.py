"""**Hypothesis.** Balancing by a selection bias keeps loads more even than a balance loss does, at
no cost in loss.

**Measure.** Sigmoid routers, 8 experts, two a token, 300 steps of 2,048 tokens. Arms: `bias`,
whose selection bias moves by a constant against the sign of each expert's overload; `loss`, the
global balance loss; `none`. Tuned for each arm on 2 seeds, by held-out loss: the learning rate
(4 trials), then the strength (4 trials: the bias's rate or the loss's coefficient; `none` has
none). Over 5 other seeds: MaxVio (largest load over mean load, minus 1, mean of layers) and
loss, both on held-out text with deterministic routing.

**Decision.** Reproduced if the 95 % interval of MaxVio, bias minus loss, lies below zero and the
interval of the held-out loss does not reach above 0.005 nats. Contradicted if MaxVio's interval
lies above zero. Otherwise null.
"""

from experiments.grin.claim import Claim, Findings, Plan, Sweep, Verdict, compare, rates
from experiments.grin.pictures import arms_and_differences
from experiments.grin.shapes import moe
from experiments.grin.study import StudyConfig

from phikit.nn.moe.router import SigmoidConfig
from phikit.nn.moe.session import RoutingConfig

MARGIN = 0.005
"""Nats that count as no cost."""
STRENGTHS = (0.001, 0.004, 0.016, 0.064)
SHAPE = moe(SigmoidConfig())
ARMS = {
    "bias": StudyConfig(model=SHAPE, routing=RoutingConfig(balance="bias")),
    "loss": StudyConfig(model=SHAPE, routing=RoutingConfig(balance="global")),
    "none": StudyConfig(model=SHAPE),
}
TRIALS = {
    "bias": tuple(f"routing.bias_rate={x}" for x in STRENGTHS),
    "loss": tuple(f"routing.balance_coefficient={x}" for x in STRENGTHS),
    "none": ("routing.balance=null",) * len(STRENGTHS),  # it has no strength
}


def judge(found: Findings) -> Verdict:
    runs = found.runs
    comparisons = [
        compare(f"{a} − {b}, {measure}", runs[a], runs[b], measure=measure)
        for a, b in (("bias", "loss"), ("loss", "none"), ("bias", "none"))
        for measure in ("max_vio", "loss")
    ]
    balance, cost, *_ = comparisons
    if balance.is_lower and cost.high <= MARGIN:
        outcome, words = "reproduced", "The bias balances better, at no cost in loss."
    elif balance.is_lower:
        outcome, words = "partly reproduced", "The bias balances better; a cost is not ruled out."
    elif balance.is_higher:
        outcome, words = "contradicted", "The loss balances better."
    else:
        outcome, words = "null", "Both balance alike, as far as these runs can tell."
    return Verdict(outcome, words, comparisons)


CLAIM = Claim(
    number="C7",
    title="A bias balances better than a loss",
    words=__doc__ or "",
    plan=Plan(arms=ARMS, sweeps=(rates(ARMS), Sweep(name="strength", trials=TRIALS))),
    judge=judge,
    draw=arms_and_differences("loss"),
)
