"""**Hypothesis.** At equal active parameters a mixture of experts reaches a lower loss than a dense
model.

**Measure.** Held-out loss after 300 steps of 2,048 tokens, deterministic routing. Arms: a dense
model with 128 hidden units a block; 8 experts of 64, two a token, under a top-k router; the same
under SparseMixer (v2, threshold 0.1). Experts have the global balance loss at 0.01. Learning
rates are tuned for each arm by 4 trials on 2 seeds; the comparison is over 5 other seeds.

**Decision.** Reproduced if the 95 % interval of top-k minus dense lies below zero; contradicted
if it lies above; otherwise null. The other two differences are reported.
"""

from experiments.grin.claim import Claim, Findings, Plan, Verdict, compare, rates
from experiments.grin.pictures import arms_and_differences
from experiments.grin.shapes import BALANCED, dense, moe
from experiments.grin.study import StudyConfig

from phikit.nn.moe.router import SparseMixerConfig

ARMS = {
    "dense": StudyConfig(model=dense()),
    "top-k": StudyConfig(model=moe(), routing=BALANCED),
    "v2": StudyConfig(model=moe(SparseMixerConfig(jitter_eps=0.1)), routing=BALANCED),
}


def judge(found: Findings) -> Verdict:
    dense, topk, v2 = (found.runs[arm] for arm in ("dense", "top-k", "v2"))
    first = compare("top-k − dense", topk, dense)
    comparisons = [first, compare("v2 − dense", v2, dense), compare("v2 − top-k", v2, topk)]
    if first.is_lower:
        outcome, words = "reproduced", "Experts reach a lower loss at equal active parameters."
    elif first.is_higher:
        outcome, words = "contradicted", "The dense model reaches a lower loss."
    else:
        outcome, words = "null", "These runs cannot tell experts from a dense model."
    return Verdict(outcome, words, comparisons)


CLAIM = Claim(
    number="C3",
    title="Experts beat a dense model at equal active parameters",
    words=__doc__ or "",
    plan=Plan(arms=ARMS, sweeps=(rates(ARMS),)),
    judge=judge,
    draw=arms_and_differences("dense"),
)
