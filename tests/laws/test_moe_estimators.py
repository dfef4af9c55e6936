"""SparseMixer's estimators against the gradient they estimate, by enumeration in float64.

Nothing is sampled unless said: every draw is forced in turn and weighed by its probability. Two
objectives have a true gradient. A (equation 7 of GRIN) is what `v2` was derived for: the gate is a
constant in f, and only the choice is credited. B (equation 4) credits the gate as well.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from experiments.grin.c2 import AsTransformers
from torch import Tensor

from phikit.nn.moe.estimator import ESTIMATORS, Estimator, Picked, RandomDraws, sparse_mixer
from phikit.nn.moe.experts import Experts
from phikit.nn.moe.router import SampledGateConfig, SparseMixerConfig, build_router

EXPERTS, WIDTH = 4, 3
Function = Callable[[Tensor], Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SCORES, OUTPUTS = drawn(EXPERTS, seed=1), drawn(EXPERTS, WIDTH, seed=2)
COEFFICIENTS, MIXING = drawn(4, WIDTH, seed=3), drawn(5, WIDTH, seed=4)


def polynomial(degree: int) -> Function:
    """Of the given degree, with all lower powers in it."""

    def f(h: Tensor) -> Tensor:
        products = h @ COEFFICIENTS[:degree].T
        return sum(products[..., k] ** (k + 1) for k in range(degree))  # pyright: ignore

    return f


def network(h: Tensor) -> Tensor:
    return (h @ MIXING.T).tanh().sum(-1) + 0.3 * (h @ MIXING.T).tanh()[..., 0] ** 2


class Forced:
    """Draws that pick these experts in turn, and run the full output or not."""

    def __init__(self, choices: list[int], full: list[bool]) -> None:
        self.choices, self.full = iter(choices), iter(full)

    def exponential(self, like: Tensor) -> Tensor:
        noise = torch.ones_like(like)
        noise[:, next(self.choices)] = 1e-200  # the smallest wins the race
        return noise

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, 1 - 1e-12 if next(self.full) else 0.0)


def mix(scores: Tensor, estimator: Estimator, draws: Forced | None, **how) -> Picked:
    settings = {"num_choices": 1, "jitter_eps": None} | how
    return sparse_mixer(scores[None], estimator=estimator, draws=draws, **settings)


def chances(scores: Tensor, estimator: Estimator, **how) -> Iterator[tuple[float, Forced]]:
    """Every draw of one choice, with its probability."""
    [shares] = mix(scores, estimator, None, **how).shares
    for expert in shares[0].nonzero()[:, 0].tolist():
        for is_full in (False, True):
            coin = estimator.full if is_full else 1 - estimator.full
            yield float(shares[0, expert]) * coin, Forced([expert], [is_full])


def expected(f: Function, estimator: Estimator, *, scale: float = 1.0, **how) -> Tensor:
    """The estimator's mean gradient with respect to the scores."""
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    for probability, draws in chances(SCORES, estimator, **how):
        scores = SCORES.clone().requires_grad_()
        picked = mix(scores, estimator, draws, **how)
        y = picked.gates_TC[0, 0] * scale * OUTPUTS[picked.ids_TC[0, 0]]
        total += probability * torch.autograd.grad(f(y), scores)[0]
    return total


def truth(f: Function, objective: str, *, temperature: float = 1.0, scale: float = 1.0) -> Tensor:
    scores = SCORES.clone().requires_grad_()
    shares = (scores / temperature).softmax(-1)
    gates = shares.detach() if objective == "A" else shares
    loss = (shares * f(gates[:, None] * scale * OUTPUTS)).sum()
    return torch.autograd.grad(loss, scores)[0]


def bias(f: Function, name: str, objective: str, *, delta: bool | None = None, **how) -> float:
    """Norm of (mean estimate - truth) over norm of the truth."""
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    if delta is not None:
        estimator = estimator._replace(delta=delta)
    true = truth(f, objective, temperature=estimator.temperature, **how)
    return float((expected(f, estimator, **how) - true).norm() / true.norm())


# --- What is exact, and what is not --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "degree"), [("euler", 1), ("midpoint", 1), ("midpoint", 2), ("heun3", 3), ("v2", 1)]
)
def test_exact_for_the_choice(name: str, degree: int):
    assert bias(polynomial(degree), name, "A") < 1e-12


@pytest.mark.parametrize(("name", "degree"), [("euler", 2), ("midpoint", 3), ("heun3", 4)])
def test_and_no_further(name: str, degree: int):
    assert bias(polynomial(degree), name, "A") > 1e-3


@pytest.mark.parametrize("name", ["v1", "v2star"])
def test_those_with_both_paths_are_exact_for_linear_functions(name: str):
    assert bias(polynomial(1), name, "B") < 1e-12


def test_v2_is_half_the_gradient_of_a_linear_function():
    """The path through the gate, left out, is as large as the one through the choice."""
    found, true = expected(polynomial(1), ESTIMATORS["v2"]), truth(polynomial(1), "B")
    torch.testing.assert_close(found, true / 2, rtol=1e-12, atol=1e-14)


def test_without_its_rule_for_the_argmax_v2star_is_exact_up_to_cubics():
    assert bias(polynomial(3), "v2star", "B", delta=False) < 1e-12
    assert bias(polynomial(3), "v2star", "B") > 5e-3


def test_v2_is_its_formula():
    """Sum over D and B of the probability times f'(c p E) E dp/dz, c = 1 for the argmax."""
    shares = SCORES.softmax(-1)
    jacobian = torch.diag(shares) - torch.outer(shares, shares)
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    for expert in range(EXPERTS):
        for part, probability in ((1.0, 1 / 4), (1 / 3, 3 / 4)):
            if expert == int(SCORES.argmax()):
                part = 1.0
            h = (part * shares[expert] * OUTPUTS[expert]).requires_grad_()
            [slope] = torch.autograd.grad(network(h), h)
            total += probability * shares[expert] * (slope @ OUTPUTS[expert]) * jacobian[expert]
    torch.testing.assert_close(expected(network, ESTIMATORS["v2"]), total, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "objective", "delta", "order"),
    [
        ("euler", "A", None, 2),
        ("midpoint", "A", None, 3),
        ("heun3", "A", None, 4),
        ("v2", "A", None, 2),
        ("midpoint", "A", True, 2),
        ("v1", "B", None, 2),
        ("v2star", "B", None, 2),
        ("v2", "B", None, 1),
        ("euler", "B", None, 1),
    ],
)
def test_orders(name: str, objective: str, delta: bool | None, order: int):
    """How the error falls with the size of the experts' outputs; the rule for the argmax, which
    most draws meet, makes every estimator one of second order in this count (Euler's)."""
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    if delta is not None:
        estimator = estimator._replace(delta=delta)
    errors = []
    for scale in (1e-2, 5e-3):
        true = truth(polynomial(4), objective, temperature=estimator.temperature, scale=scale)
        errors.append(float((expected(polynomial(4), estimator, scale=scale) - true).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_the_best_expert_taken_always_has_an_error_of_first_order():
    """Plain top-1 gating: no credit for the choice at all."""
    errors = []
    for scale in (1e-2, 5e-3):
        scores = SCORES.clone().requires_grad_()
        best = int(SCORES.argmax())
        loss = polynomial(4)(scores.softmax(-1)[best] * scale * OUTPUTS[best])
        [found] = torch.autograd.grad(loss, scores)
        errors.append(float((found - truth(polynomial(4), "B", scale=scale)).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def two_choices(estimator: Estimator, f: Function) -> tuple[Tensor, Tensor]:
    """Mean estimate, and the truth for objective A, of two choices without replacement."""
    found, true = (torch.zeros(EXPERTS, dtype=torch.float64) for _ in range(2))
    for first in range(EXPERTS):
        for second in set(range(EXPERTS)) - {first}:
            scores = SCORES.clone().requires_grad_()
            draws = Forced([first, second], [True, True])
            picked = mix(scores, estimator, draws, num_choices=2)
            chance = picked.shares[0][0, first] * picked.shares[1][0, second]
            h = picked.gates_TC[0] @ OUTPUTS[picked.ids_TC[0]]
            [estimate] = torch.autograd.grad(f(h), scores, retain_graph=True)
            [credit] = torch.autograd.grad(chance * f(h).detach(), scores)
            found += float(chance.detach()) * estimate
            true += credit
    return found, true


def test_two_choices_are_biased_even_for_linear_functions():
    """The first draw is not credited for what it leaves to the second: here by a third."""
    found, true = two_choices(ESTIMATORS["euler"], polynomial(1))
    assert float((found - true).norm() / true.norm()) == pytest.approx(0.345, abs=1e-3)


def test_the_control_arm_is_eulers_rule():
    """The gradient of a drawn gate is Euler's estimate: they are one algorithm under two names."""
    x = drawn(50, WIDTH, seed=5)
    gradients = []
    for config in (
        SampledGateConfig(jitter_eps=0.4),
        SparseMixerConfig(jitter_eps=0.4, estimator="euler"),
    ):
        router = build_router(config, WIDTH, EXPERTS, top_k=2).double()
        router.gate.weight.data = drawn(EXPERTS, WIDTH, seed=6)
        draws = RandomDraws(torch.Generator().manual_seed(0))
        gates, ids, *_ = router(x, draws=draws)
        weights = drawn(EXPERTS, seed=7)[ids]
        gradients.append(torch.autograd.grad((gates * weights).sum(), router.gate.weight)[0])
    assert torch.equal(*gradients)


# --- The experts' gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v2", "v2star"])
@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_the_paper_s_algorithms(name: str, is_full: bool, expert: int):
    """Algorithms 1 and 2, written with stopped gradients: y, and the gradients of all weights."""
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    experts = Experts(EXPERTS, WIDTH, 2).double()
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = drawn(*parameter.shape, seed=20 + seed)
    x, scores = drawn(1, WIDTH, seed=8), SCORES.clone().requires_grad_()
    leaves = [scores, *experts.parameters()]
    picked = mix(scores, estimator, Forced([expert], [is_full]), expert_grad="paper")
    y = experts(x, picked.ids_TC, picked.gates_TC, picked.expert_scale_TC)
    ours = torch.autograd.grad(network(y).sum(), leaves)

    shares = (scores / estimator.temperature).softmax(-1)
    one = torch.ones(1, 1, dtype=torch.float64)
    h = experts(x, torch.tensor([[expert]]), one) * shares[expert]
    is_best = expert == int(SCORES.argmax())
    part = max(float(is_best), (1 + 2 * is_full) / 3)
    copies = 1 if name == "v2" else 2
    written = copies * h + (part * h - copies * h).detach()
    torch.testing.assert_close(y, written, rtol=1e-12, atol=1e-14)
    for a, b in zip(ours, torch.autograd.grad(network(written).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_code_s_experts_learn_by_their_gate():
    """In the released code the experts' gradient is that of y = c p E: a third of the paper's."""
    experts, x = Experts(EXPERTS, WIDTH, 2).double(), drawn(1, WIDTH, seed=8)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = drawn(*parameter.shape, seed=20 + seed)
    weak = int(SCORES.argmin())
    gradients = []
    for expert_grad in ("code", "paper"):
        draws = Forced([weak], [False])
        picked = mix(SCORES, ESTIMATORS["v2"], draws, expert_grad=expert_grad)
        y = experts(x, picked.ids_TC, picked.gates_TC, picked.expert_scale_TC)
        gradients.append(torch.autograd.grad(y.sum(), experts.down_proj.weight)[0])
    torch.testing.assert_close(3 * gradients[0], gradients[1], rtol=1e-12, atol=0)


# --- Drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v2", "v2star", "heun3", "midpoint", "euler"])
def test_the_mean_of_many_draws(name: str):
    """200 000 draws are within four standard errors of the enumeration."""
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    draws = RandomDraws(torch.Generator().manual_seed(1))
    scores = SCORES.expand(200_000, EXPERTS).clone().requires_grad_()
    picked = sparse_mixer(scores, num_choices=1, jitter_eps=0.5, estimator=estimator, draws=draws)
    y = picked.gates_TC * OUTPUTS[picked.ids_TC[:, 0]]
    [found] = torch.autograd.grad(network(y).sum(), scores)
    error = found.std(0) / len(found) ** 0.5
    true = expected(network, estimator, jitter_eps=0.5)
    assert ((found.mean(0) - true).abs() <= 4 * error + 1e-15).all()


@pytest.mark.parametrize("name", ["v2", "v2star"])
def test_frequencies(name: str):
    """Chi-squared of both choices together, 11 degrees of freedom: 35.6 has probability 2e-4."""
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    draws = RandomDraws(torch.Generator().manual_seed(2))
    count = 200_000
    scores = SCORES.expand(count, EXPERTS)
    picked = sparse_mixer(scores, num_choices=2, jitter_eps=None, estimator=estimator, draws=draws)
    shares = (SCORES / estimator.temperature).softmax(-1)
    first, second = picked.ids_TC.unbind(1)
    assert (first != second).all()
    statistic = 0.0
    for a in range(EXPERTS):
        for b in set(range(EXPERTS)) - {a}:
            chance = float(shares[a] * shares[b] / (1 - shares[a]))
            seen = int(((first == a) & (second == b)).sum())
            statistic += (seen - count * chance) ** 2 / (count * chance)
    assert statistic < 35.6


# --- What the router learns from ------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("jitter_eps", [0.02, 0.2, None])
def test_gradients_of_the_router(name: str, jitter_eps: float | None):
    """Zero in sum, zero on experts that were no candidates, zero for a lone candidate."""
    scores = drawn(500, 6, seed=9).requires_grad_()
    estimator = ESTIMATORS[name]  # pyright: ignore[reportArgumentType]
    draws = RandomDraws(torch.Generator().manual_seed(3))
    picked = sparse_mixer(
        scores, num_choices=2, jitter_eps=jitter_eps, estimator=estimator, draws=draws
    )
    kinds = set()
    for choice, shares in enumerate(picked.shares):
        gate = picked.gates_TC[:, choice]
        [gradient] = torch.autograd.grad(gate.sum(), scores, retain_graph=True)
        assert gradient.sum(-1).abs().max() <= 1e-15
        assert (gradient[shares == 0] == 0).all()
        is_lone = (shares > 0).sum(-1) == 1
        assert (gradient[is_lone] == 0).all()
        assert gradient[~is_lone].abs().sum(-1).min() > 0 if (~is_lone).any() else True
        kinds |= set(is_lone.tolist())
    assert kinds == ({False, True} if jitter_eps else {False})


def test_at_the_published_threshold_a_new_router_hardly_learns():
    """16 independent normal scores: 95 of 100 choices have one candidate; at 0.1, about half."""
    scores = drawn(20_000, 16, seed=10)
    for jitter_eps, first, second in ((0.01, 0.95, 0.94), (0.1, 0.55, 0.47)):
        picked = sparse_mixer(scores, num_choices=2, jitter_eps=jitter_eps)
        lone = [float(((s > 0).sum(-1) == 1).double().mean()) for s in picked.shares]
        assert lone == pytest.approx([first, second], abs=0.02)


# --- The released code ----------------------------------------------------------------------------


@pytest.mark.parametrize("jitter_eps", [0.01, 0.1, 0.5])
def test_equal_to_transformers(jitter_eps: float):
    """Same choices, same gates where the full output ran, 0.3333 for 1/3 elsewhere."""
    phimoe = pytest.importorskip(
        "transformers.models.phimoe.modeling_phimoe", reason="the reference of this test"
    )
    weights = torch.randn(400, 2, generator=torch.Generator().manual_seed(4))
    ours, theirs = (drawn(400, 16, seed=11).float().requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    gates, ids = phimoe.sparsemixer(theirs, jitter_eps=jitter_eps, training=True)
    torch.manual_seed(5)
    picked = sparse_mixer(ours, num_choices=2, jitter_eps=jitter_eps, draws=AsTransformers())
    assert torch.equal(picked.ids_TC, ids)
    shares = torch.stack(picked.shares, 1).gather(-1, ids[..., None])[..., 0]
    is_full = picked.gates_TC == shares
    assert is_full.any() and not is_full.all()
    assert torch.equal(picked.gates_TC[is_full], gates[is_full])
    torch.testing.assert_close(0.9999 * picked.gates_TC[~is_full], gates[~is_full])
    [a] = torch.autograd.grad((gates * weights).sum(), theirs)
    [b] = torch.autograd.grad((picked.gates_TC * weights).sum(), ours)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    found = sparse_mixer(ours, num_choices=2, jitter_eps=jitter_eps)
    gates, ids = phimoe.sparsemixer(theirs, jitter_eps=jitter_eps, training=False)
    assert torch.equal(found.gates_TC, gates) and torch.equal(found.ids_TC, ids)
