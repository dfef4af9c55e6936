"""**Hypothesis.** Balance over the whole step lets experts specialise; balance within each rank,
where a rank sees one domain, forbids it.

**Measure.** Four domains of text, a quarter of every step each. `local`: each domain is a
micro-batch with a balance loss of its own, as on four ranks that see a domain each. `global`:
one loss on the loads of all four. A top-k router, which draws nothing, so that the scope of the
loss is the only difference. Tuned for each arm: the learning rate by loss (4 trials, 2
seeds), then the loss's coefficient, of 4, so that MaxVio over all held-out text is nearest to
0.5: arms are compared at about the same balance. Then over 5 other seeds: `similarity`, the mean
cosine between the loads of two domains (1 if all domains use experts alike), and held-out loss.

**Decision.** Reproduced if the 95 % interval of the similarity, global minus local, lies below
zero and that of the loss does not lie above it. Contradicted if the similarity's lies above.
Otherwise null. MaxVio is reported: if its interval does not cover zero, the arms were not
matched.
"""

from experiments.grin.claim import Claim, Findings, Plan, Sweep, Verdict, compare, rates
from experiments.grin.pictures import arms_and_differences
from experiments.grin.shapes import moe
from experiments.grin.study import StudyConfig

from phikit.nn.moe.session import RoutingConfig

LOCAL, GLOBAL = RoutingConfig(balance="local"), RoutingConfig(balance="global")
ARMS = {
    "local": StudyConfig(model=moe(), routing=LOCAL, counts="domain"),
    "global": StudyConfig(model=moe(), routing=GLOBAL, counts="step"),
}
STRENGTHS = tuple(f"routing.balance_coefficient={x}" for x in (0.001, 0.004, 0.016, 0.064))


def judge(found: Findings) -> Verdict:
    runs = found.runs
    comparisons = [
        compare(f"global − local, {measure}", runs["global"], runs["local"], measure=measure)
        for measure in ("similarity", "loss", "max_vio")
    ]
    similarity, loss, balance = comparisons
    matched = balance.low <= 0 <= balance.high
    note = "" if matched else " The arms were not equally balanced, so this may be balance alone."
    if similarity.is_lower and not loss.is_higher:
        outcome, words = "reproduced", "Domains part ways under the global loss, at no cost."
    elif similarity.is_lower:
        outcome, words = "partly reproduced", "Domains part ways, at a cost in loss."
    elif similarity.is_higher:
        outcome, words = "contradicted", "Domains are routed more alike under the global loss."
    else:
        outcome, words = "null", "The scope of the loss makes no measurable difference here."
    return Verdict(outcome, words + note, comparisons)


CLAIM = Claim(
    number="C5",
    title="Global balance lets experts specialise",
    words=__doc__ or "",
    plan=Plan(
        arms=ARMS,
        sweeps=(
            rates(ARMS),
            Sweep(
                name="balance coefficient",
                trials=dict.fromkeys(ARMS, STRENGTHS),
                measure="max_vio",
                aim=0.5,
            ),
        ),
    ),
    judge=judge,
    draw=arms_and_differences("local"),
)
