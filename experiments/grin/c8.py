"""**Hypothesis.** A mixture of experts made from a trained dense model is ahead of one from random
weights for as long as the budget is small.

**Measure.** A dense model trained for 300 steps is cut into 8 experts of half its width, two a
token (granularity 2, a top-k router whose gates sum to 1), so that active parameters stay the
same. The loss before the first step is compared with the dense model's. Then 60, 180 or 300
steps of `up`, and as many of `scratch` from random weights. Two controls see as many steps as
`up` in all: `dense`, the dense model trained on for 180 or 300 steps, and `scratch 600`. All
with the schedule of their own length; text goes on where the dense model's ended; the global
balance loss at 0.01, learning rates tuned for each arm by 4 trials on 2 seeds; 5 other seeds.

**Decision.** Reproduced if the losses before the first step agree within 1e-5 in every run, and
the 95 % intervals of up minus scratch lie below zero at 60 and at 180 steps. Partly if at one
of them. Contradicted if the interval at 60 steps lies above. Otherwise null. The rest is
reported: whether it pays to upcycle, counting the dense model's steps, is what `scratch 600`
and `dense` say.
"""

from experiments.grin.claim import Claim, Findings, Plan, Verdict, compare, rates
from experiments.grin.pictures import arms_and_differences
from experiments.grin.shapes import BALANCED, CHOICES, EXPERTS, dense, moe
from experiments.grin.study import StudyConfig

from phikit.nn.moe.router import TopKConfig
from phikit.weights.upcycle import UpcycleConfig

START = StudyConfig(model=dense())
UPCYCLE = UpcycleConfig(
    num_experts=EXPERTS, top_k=CHOICES, router=TopKConfig(), granularity=CHOICES
)
UP = StudyConfig(model=moe(), routing=BALANCED, start=START, upcycle=UPCYCLE)
SCRATCH = StudyConfig(model=moe(), routing=BALANCED)
DENSE = StudyConfig(model=dense(), start=START)
BUDGETS = (60, 180, 300)


def of_steps(config: StudyConfig, steps: int) -> StudyConfig:
    return config.model_copy(update={"steps": steps})


ARMS = {
    **{f"up {steps}": of_steps(UP, steps) for steps in BUDGETS},
    **{f"scratch {steps}": of_steps(SCRATCH, steps) for steps in (*BUDGETS, 600)},
    **{f"dense {steps}": of_steps(DENSE, steps) for steps in BUDGETS[1:]},
}


def judge(found: Findings) -> Verdict:
    runs = found.runs
    offs = [
        abs(run["before"]["made"] - run["before"]["start"])
        for arm, of_arm in runs.items()
        if arm.startswith("up")
        for run in of_arm
    ]
    early = [
        compare(f"up {n} − scratch {n}", runs[f"up {n}"], runs[f"scratch {n}"]) for n in BUDGETS
    ]
    rest = [
        compare("up 300 − scratch 600", runs["up 300"], runs["scratch 600"]),
        *(compare(f"up {n} − dense {n}", runs[f"up {n}"], runs[f"dense {n}"]) for n in BUDGETS[1:]),
    ]
    is_same = max(offs) <= 1e-5
    wins = [comparison.is_lower for comparison in early[:2]]
    if is_same and all(wins):
        outcome, words = "reproduced", "Upcycling is ahead at both small budgets."
    elif any(wins):
        outcome, words = "partly reproduced", "Upcycling is ahead at one small budget."
    elif early[0].is_higher:
        outcome, words = "contradicted", "Random weights are ahead after 60 steps."
    else:
        outcome, words = "null", "These runs cannot tell the two apart."
    words += f" Before the first step the losses differ by at most {max(offs):.1e}."
    return Verdict(outcome, words, early + rest)


CLAIM = Claim(
    number="C8",
    title="Upcycling beats random weights at small budgets",
    words=__doc__ or "",
    plan=Plan(arms=ARMS, sweeps=(rates(ARMS),)),
    judge=judge,
    draw=arms_and_differences(None),
)
