"""**Hypothesis.** SparseMixer (v2) trains better routers than top-k: behind early, ahead late.

**Measure.** Held-out loss after 300 steps of 2,048 tokens, deterministic routing; and at eight
looks on the way. 8 experts, two a token, the global balance loss at 0.01. Arms: top-k; top-k
with an input jitter of 0.1; drawn experts that learn from their gate alone (`sampled_gate`), the
control without which drawing would be credited to the estimator; v2; v2*. Those that draw have
the threshold 0.1; v2 and sampled_gate also run without one. Learning rates are tuned for each arm
by 3 trials on 2 seeds; the comparisons are over 5 other seeds. The share of tokens with a single
candidate, which teach the router nothing, is kept with every run (`single`).

**Decision**, at the threshold 0.1. Strong: v2 is below top-k and below sampled_gate, both 95 %
intervals without zero, and at some look in the first half v2 was above top-k, interval without
zero. Weak: v2 is below top-k. Contradicted: v2 is above top-k. Otherwise null. v2* and the arms
without a threshold are reported, and decide nothing. The paper's own evidence is one run of 2.5
trillion tokens, with MMLU as its measure; nothing here speaks about that scale.
"""

from experiments.grin.claim import (
    Claim,
    Comparison,
    Findings,
    Plan,
    Verdict,
    compare,
    interval,
    rates,
)
from experiments.grin.pictures import arms_and_differences
from experiments.grin.shapes import BALANCED, moe
from experiments.grin.study import LOOKS, StudyConfig

from phikit.nn.moe.router import RouterConfig, SampledGateConfig, SparseMixerConfig, TopKConfig

RATES = (0.02, 0.04, 0.08)
ROUTERS: dict[str, RouterConfig] = {
    "top-k": TopKConfig(),
    "top-k, jitter": TopKConfig(input_jitter=0.1),
    "sampled gate": SampledGateConfig(jitter_eps=0.1),
    "v2": SparseMixerConfig(jitter_eps=0.1),
    "v2*": SparseMixerConfig(jitter_eps=0.1, estimator="v2star"),
    "sampled gate, all": SampledGateConfig(jitter_eps=None),
    "v2, all": SparseMixerConfig(jitter_eps=None),
}
ARMS = {name: StudyConfig(model=moe(router), routing=BALANCED) for name, router in ROUTERS.items()}


def judge(found: Findings) -> Verdict:
    runs = found.runs
    over_topk = compare("v2 − top-k", runs["v2"], runs["top-k"])
    over_drawing = compare("v2 − sampled gate", runs["v2"], runs["sampled gate"])
    looks = [at_look(found, number) for number in range(1, LOOKS // 2 + 1)]
    others = [
        compare(f"{arm} − top-k", runs[arm], runs["top-k"])
        for arm in ROUTERS
        if arm not in ("top-k", "v2")
    ]
    others.append(
        compare("v2, all − sampled gate, all", runs["v2, all"], runs["sampled gate, all"])
    )
    was_behind = any(look.is_higher for look in looks)
    early = "was behind top-k early" if was_behind else "was not measurably behind top-k early"
    if over_topk.is_lower and over_drawing.is_lower and was_behind:
        outcome, words = "reproduced", "v2 ends ahead of top-k and of drawing alone"
    elif over_topk.is_lower:
        drawing = "and" if over_drawing.is_lower else "but not"
        outcome, words = "partly reproduced", f"v2 ends ahead of top-k {drawing} of drawing alone"
    elif over_topk.is_higher:
        outcome, words = "contradicted", "v2 ends behind top-k"
    else:
        outcome, words = "null", "These runs cannot tell v2 from top-k at their end"
    return Verdict(outcome, f"{words}; it {early}.", [over_topk, over_drawing, *looks, *others])


def at_look(found: Findings, number: int) -> Comparison:
    """v2 minus top-k on the way."""
    pairs = zip(found.runs["v2"], found.runs["top-k"], strict=True)
    differences = [a["curve"][number][1] - b["curve"][number][1] for a, b in pairs]
    step = found.runs["v2"][0]["curve"][number][0]
    return interval(f"v2 − top-k, step {step}", differences)


CLAIM = Claim(
    number="C4",
    title="SparseMixer beats top-k routing, behind early and ahead late",
    words=__doc__ or "",
    plan=Plan(arms=ARMS, sweeps=(rates(ARMS, RATES),)),
    judge=judge,
    draw=arms_and_differences("top-k"),
    size=(8.4, 4.6),
)
