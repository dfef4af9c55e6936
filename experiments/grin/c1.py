"""**Hypothesis.** SparseMixer's estimators have the errors that their derivation says; as shipped,
with the full output for every drawn argmax, they have the order of Euler's rule (2, as counted
here), whatever the rule beside it.

**Measure.** Nothing is drawn: every choice D and coin B is forced in turn through the library's
own `sparse_mixer`, and the gradients are added up by their probability, in float64. 4 experts of
width 3, one choice, all experts candidates, 20 random problems. A is the gradient of E f(sg(p_D)
E_D), which credits the choice alone (equation 7 of GRIN); B that of E f(p_D E_D), which credits
the gate too (equation 4). Bias: norm of (mean estimate − truth) over norm of the truth, median
of the problems. Order: how the absolute error falls when the experts' outputs shrink from 0.01
to 0.005 of their size, f a quartic, on the first problem.

**Decision.** Reproduced if every identity and every order below holds; contradicted otherwise.
"""

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from experiments.grin.claim import Claim, Verdict
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from phikit.evals.plots import Palette, finish, legend
from phikit.nn.moe.estimator import ESTIMATORS, Estimator, sparse_mixer

EXPERTS, WIDTH, PROBLEMS = 4, 3, 20
SCALES = (1e-2, 5e-3)
CURVE_SCALES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
RULES: dict[str, Estimator] = {
    **ESTIMATORS,
    "midpoint with the argmax rule": ESTIMATORS["midpoint"]._replace(delta=True),
    "v2star without its argmax rule": ESTIMATORS["v2star"]._replace(delta=False),
}
TOP_1 = "top-1 gate"
"""No draw and no credit for the choice: the best expert and the gradient of its gate."""
FUNCTIONS = ("linear", "quadratic", "cubic", "quartic", "network")
EXACT = (
    ("euler", "A", 1),
    ("midpoint", "A", 2),
    ("heun3", "A", 3),
    ("v2", "A", 1),
    ("v1", "B", 1),
    ("v2star", "B", 1),
    ("v2star without its argmax rule", "B", 3),
)
"""Rule, objective, and the degree up to which it is exact."""
ORDERS = (
    ("euler", "A", 2),
    ("midpoint", "A", 3),
    ("heun3", "A", 4),
    ("v2", "A", 2),
    ("midpoint with the argmax rule", "A", 2),
    ("v1", "B", 2),
    ("v2star", "B", 2),
    ("v2", "B", 1),
    ("euler", "B", 1),
    (TOP_1, "B", 1),
)
TOLERANCE = 1e-10


class Problem(NamedTuple):
    """Scores [E], experts' outputs [E, D], and what functions are made of."""

    scores: Tensor
    outputs: Tensor
    coefficients: Tensor
    mixing: Tensor

    def function(self, name: str) -> Callable[[Tensor], Tensor]:
        """f: outputs [..., D] to [...]; a polynomial has all powers up to its degree."""
        if name == "network":
            return lambda h: (h @ self.mixing.T).tanh().sum(-1)
        powers = torch.arange(1, FUNCTIONS.index(name) + 2)
        rows = self.coefficients[: len(powers)]
        return lambda h: ((h @ rows.T) ** powers).sum(-1)


class Forced:
    """Row r picks expert r mod E; the second half of the rows runs the full output."""

    def exponential(self, like: Tensor) -> Tensor:
        rows = torch.arange(len(like))
        noise = torch.ones_like(like)
        noise[rows, rows % EXPERTS] = 1e-200  # the smallest wins the race
        return noise

    def uniform(self, like: Tensor) -> Tensor:
        is_full = torch.arange(len(like)) >= EXPERTS
        return torch.where(is_full[:, None], 1 - 1e-12, 0.0).to(like.dtype)


def problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((EXPERTS,), (EXPERTS, WIDTH), (4, WIDTH), (5, WIDTH))
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Problem(*drawn)


def expected(given: Problem, name: str, rule: str, scale: float) -> Tensor:
    """The mean of the estimated gradient with respect to the scores, [E]."""
    f = given.function(name)
    if rule == TOP_1:
        scores = given.scores.clone().requires_grad_()
        best = int(scores.argmax())
        return _gradient(f(scores.softmax(-1)[best] * scale * given.outputs[best]), scores)
    estimator = RULES[rule]
    scores = given.scores.expand(2 * EXPERTS, EXPERTS).clone().requires_grad_()
    picked = sparse_mixer(
        scores, num_choices=1, jitter_eps=None, estimator=estimator, draws=Forced()
    )
    shares = picked.shares[0][0].detach()
    chances = torch.cat([shares * (1 - estimator.full), shares * estimator.full])
    y = picked.gates_TC * scale * given.outputs[picked.ids_TC[:, 0]]
    return _gradient((chances * f(y)).sum(), scores).sum(0)


def truth(given: Problem, name: str, objective: str, rule: str, scale: float) -> Tensor:
    """The gradient that is estimated, [E]."""
    scores = given.scores.clone().requires_grad_()
    temperature = 1.0 if rule == TOP_1 else RULES[rule].temperature
    shares = (scores / temperature).softmax(-1)
    gates = shares.detach() if objective == "A" else shares
    values = given.function(name)(gates[:, None] * scale * given.outputs)
    return _gradient((shares * values).sum(), scores)


def _gradient(value: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(value, scores)[0]


def error(given: Problem, name: str, objective: str, rule: str, scale: float = 1.0) -> float:
    """Norm of (mean estimate − truth)."""
    true = truth(given, name, objective, rule, scale)
    return float((expected(given, name, rule, scale) - true).norm())


def bias(given: Problem, name: str, objective: str, rule: str) -> float:
    """The error over the norm of the truth."""
    return error(given, name, objective, rule) / float(
        truth(given, name, objective, rule, 1.0).norm()
    )


def measure() -> tuple[dict[str, Any], Verdict]:
    given = [problem(seed) for seed in range(PROBLEMS)]
    biases = {
        f"{rule} ({objective})": {
            name: median(bias(p, name, objective, rule) for p in given) for name in FUNCTIONS
        }
        for rule, objective in dict.fromkeys(row[:2] for row in (*ORDERS, *EXACT))
    }
    exact = {
        f"{rule} ({objective}), degree {degree}": max(
            bias(p, FUNCTIONS[k], objective, rule) for p in given for k in range(degree)
        )
        for rule, objective, degree in EXACT
    }
    halves = [
        expected(p, "linear", "v2", 1.0) - truth(p, "linear", "B", "v2", 1.0) / 2 for p in given
    ]
    exact["v2 is half of B, degree 1"] = max(float(half.norm()) for half in halves)
    slopes = {
        f"{rule} ({objective})": (slope(given[0], objective, rule), order)
        for rule, objective, order in ORDERS
    }
    curves = {
        f"{rule} (A)": [error(given[0], "quartic", "A", rule, scale) for scale in CURVE_SCALES]
        for rule in ("euler", "midpoint", "heun3", "v2")
    }
    failed = [name for name, found in exact.items() if found > TOLERANCE]
    failed += [name for name, (found, order) in slopes.items() if abs(found - order) > 0.1]
    figures = {
        "bias": biases,
        "exact": exact,
        "orders": slopes,
        "scales": CURVE_SCALES,
        "errors": curves,
    }
    words = f"{len(exact)} identities and {len(slopes)} orders hold."
    if failed:
        return figures, Verdict("contradicted", f"Not so: {'; '.join(failed)}.", [])
    return figures, Verdict("reproduced", words, [])


def slope(given: Problem, objective: str, rule: str) -> float:
    """The order of the absolute error in the size of the experts' outputs."""
    coarse, fine = (error(given, "quartic", objective, rule, scale) for scale in SCALES)
    return math.log(coarse / fine) / math.log(SCALES[0] / SCALES[1])


def draw(figure: Figure, palette: Palette, record: Mapping[str, Any]) -> None:
    """Absolute error over the size of the experts' outputs."""
    figures, axes = record["figures"], figure.subplots()
    for number, (name, errors) in enumerate(figures["errors"].items()):
        style = "--" if name.startswith("v2") else "-"
        axes.loglog(figures["scales"], errors, style, color=palette.series[1 + number], label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.minorticks_off()
    axes.set_title("Error of the mean estimate, f a quartic")
    axes.set_xlabel("size of the experts' outputs", color=palette.muted)
    finish(axes, palette)
    legend(axes, palette)


CLAIM = Claim(
    number="C1",
    title="What the estimators estimate",
    words=__doc__ or "",
    measure=measure,
    draw=draw,
    size=(6.4, 3.6),
)
