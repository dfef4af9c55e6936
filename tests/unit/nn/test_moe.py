"""Routing by the rule of the released code, and experts whose implementations all agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phikit.nn.mlp import SwiGLU
from phikit.nn.moe.block import MoE
from phikit.nn.moe.estimator import sparse_mixer
from phikit.nn.moe.experts import Experts, can_group, grouped_product, looped_product
from phikit.nn.moe.router import (
    RouterStats,
    Routing,
    SparseMixerConfig,
    SparseMixerRouter,
)

EXPERTS, WIDTH, HIDDEN = 6, 16, 12
SHARE = 1 / (1 + torch.e**-0.5)
"""Softmax of the better of two scores that are half a unit apart."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_experts(d_model: int = WIDTH, d_mlp: int = HIDDEN, *, count: int = EXPERTS) -> Experts:
    experts = Experts(count, d_model, d_mlp)
    for seed, parameter in enumerate(experts.parameters(), start=1):
        parameter.data = drawn(*parameter.shape, seed=seed) * 0.3
    return experts


def make_router() -> SparseMixerRouter:
    router = SparseMixerRouter(SparseMixerConfig(jitter_eps=0.1), WIDTH, EXPERTS, top_k=2)
    router.gate.weight.data = drawn(EXPERTS, WIDTH, seed=3)
    return router


def masked_dense(experts: Experts, x_TD: Tensor, ids_TC: Tensor, gates_TC: Tensor) -> Tensor:
    """Every expert on every token, and zero gates where a token was not sent."""
    gates_TE = torch.zeros(len(x_TD), len(experts.down_proj.weight), dtype=x_TD.dtype)
    gates_TE = gates_TE.scatter(1, ids_TC, gates_TC)
    gate_ETF, up_ETF = (x_TD @ experts.gate_up_proj.weight.mT).chunk(2, dim=-1)
    y_ETD = F.silu(gate_ETF) * up_ETF @ experts.down_proj.weight.mT
    return torch.einsum("etd,te->td", y_ETD, gates_TE)


def assignments(kind: str, tokens: int) -> Tensor:
    """Two different experts for each token."""
    if kind == "all to one pair":
        return torch.tensor([[3, 1]]).expand(tokens, 2)
    generator = torch.Generator().manual_seed(tokens)
    among = {"anywhere": EXPERTS, "most experts empty": 2}[kind]
    return torch.rand(tokens, among, generator=generator).argsort(1)[:, :2]


# --- Routing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "gates", "ids"),
    [
        # (10 - 9.5) / 10 = 0.05 is within 2 x 0.03 of the best; then 9.5 is alone.
        ([10.0, 9.5, 3.0, -1.0], [SHARE, 1.0], [0, 1]),
        # A score beyond the threshold of the best one may be within that of the second.
        ([12.0, 9.5, 9.0, -1.0], [1.0, SHARE], [0, 1]),
        # Negative scores: the larger magnitude is the other one's, |s| = 10.
        ([-10.0, -9.5, -20.0, -30.0], [SHARE, 1.0], [1, 0]),
        # Nothing but zeros: 0 / 0 keeps everybody.
        ([0.0, 0.0, 0.0, 0.0], [1 / 4, 1 / 3], [0, 1]),
    ],
)
def test_threshold(scores: list[float], gates: list[float], ids: list[int]):
    found = sparse_mixer(torch.tensor([scores]), num_choices=2, jitter_eps=0.03)
    assert found.ids_TC.tolist() == [ids]
    torch.testing.assert_close(found.gates_TC, torch.tensor([gates]))


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_the_rule_knows_no_scale(seed: int, scale: float):
    """A candidate stays one when all scores grow; the gates of lone candidates stay exactly 1."""
    scores = drawn(5, EXPERTS, seed=seed).double()
    gates, ids, *_ = sparse_mixer(scores, num_choices=2, jitter_eps=0.05)
    scaled_gates, scaled_ids, *_ = sparse_mixer(scores * scale, num_choices=2, jitter_eps=0.05)
    assert torch.equal(ids, scaled_ids)
    assert torch.equal(gates == 1, scaled_gates == 1)


def test_gates_are_not_normalised_and_mostly_one():
    gates, ids, *_ = sparse_mixer(drawn(2000, 16), num_choices=2, jitter_eps=0.01)
    assert float((gates == 1).float().mean()) == pytest.approx(0.95, abs=0.02)
    assert torch.equal(ids, drawn(2000, 16).topk(2).indices)


def test_gradient_of_the_gates():
    """Softmax over the candidates: zero in sum, zero elsewhere, zero for a lone candidate."""
    scores = torch.tensor([[10.0, 9.5, 3.0, -1.0]], requires_grad=True)
    gates, *_ = sparse_mixer(scores, num_choices=2, jitter_eps=0.03)
    [gradient] = torch.autograd.grad(gates.sum(), scores)
    slope = SHARE * (1 - SHARE)
    torch.testing.assert_close(gradient, torch.tensor([[slope, -slope, 0.0, 0.0]]))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_every_token_is_assigned(tokens: int):
    routing: Routing = make_router()(drawn(tokens, WIDTH))
    assert routing.stats.load_E().shape == (EXPERTS,)
    assert int(routing.stats.load_E().sum()) == 2 * tokens
    assert (routing.ids_TC[:, 0] != routing.ids_TC[:, 1]).all()


# --- Experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("kind", ["anywhere", "most experts empty", "all to one pair"])
def test_experts_are_the_masked_dense_sum(kind: str, tokens: int):
    experts, x = make_experts(), drawn(tokens, WIDTH)
    assert can_group(experts.gate_up_proj.weight) and can_group(experts.down_proj.weight)
    ids, gates = assignments(kind, tokens), drawn(tokens, 2, seed=8)
    y = experts(x, ids, gates)
    assert y.shape == x.shape
    torch.testing.assert_close(y, masked_dense(experts, x, ids, gates), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [[0, 0, 9, 9, 12, 12], [12] * 6, [0, 0, 0, 0, 0, 12], [0] * 6])
def test_grouped_is_looped(dtype: torch.dtype, ends: list[int]):
    weight = drawn(EXPERTS, 24, 16, seed=1, dtype=dtype).requires_grad_()
    x = drawn(ends[-1], 16, seed=2, dtype=dtype).requires_grad_()
    results = []
    for product in (grouped_product, looped_product):
        y = product(x, weight, torch.tensor(ends, dtype=torch.int32))
        gradients = torch.autograd.grad((y * drawn(*y.shape, dtype=dtype)).sum(), [x, weight])
        results.append((y, *gradients))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [3, 17, 31, 40, 63])
def test_weight_gradient_reads_no_leftovers(rows: int):
    """oneDNN reads past the rows of an expert; memory is full of NaN here before it does."""
    weight = drawn(2, 64, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    x, ends = drawn(rows, 32, dtype=torch.bfloat16), torch.tensor([rows // 3, rows])
    y = grouped_product(x, weight, ends.int())
    for padded in range(rows, rows + 64):
        torch.full((64, padded), math.nan, dtype=torch.bfloat16)
    [gradient] = torch.autograd.grad(y.float().square().sum(), weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("d_model", "d_mlp"), [(16, 6), (14, 12), (7, 5)])
def test_rows_of_uneven_bytes(d_model: int, d_mlp: int):
    """torch's grouped product refuses these, so the loop takes them."""
    experts, x = make_experts(d_model, d_mlp), drawn(9, d_model)
    weights = (experts.gate_up_proj.weight, experts.down_proj.weight)
    assert not all(can_group(weight) for weight in weights)
    ids, gates = assignments("anywhere", 9), drawn(9, 2, seed=8)
    expected = masked_dense(experts, x, ids, gates)
    torch.testing.assert_close(experts(x, ids, gates), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_gradients_in_double_precision(tokens: int):
    experts = make_experts().double()
    x = drawn(tokens, WIDTH, dtype=torch.float64).requires_grad_()
    gates = drawn(tokens, 2, seed=8, dtype=torch.float64).requires_grad_()
    ids = assignments("anywhere", tokens)
    leaves = [x, gates, *experts.parameters()]
    weights = drawn(tokens, WIDTH, seed=9, dtype=torch.float64)
    ours = torch.autograd.grad((experts(x, ids, gates) * weights).sum(), leaves)
    dense = torch.autograd.grad((masked_dense(experts, x, ids, gates) * weights).sum(), leaves)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_autocast():
    """Autocast reaches the loop; the grouped product would stay in float32."""
    experts, x = make_experts(), drawn(9, WIDTH)
    ids, gates = assignments("anywhere", 9), drawn(9, 2, seed=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.gate_up_proj(x, torch.tensor([9] * EXPERTS).int()).dtype == torch.bfloat16
        y = experts(x, ids, gates)
    torch.testing.assert_close(y.float(), experts(x, ids, gates), atol=0.05, rtol=0.02)


# --- Both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8])
def test_one_expert_is_a_dense_block(tokens: int):
    experts, dense = make_experts(count=1), SwiGLU(WIDTH, HIDDEN)
    dense.gate_up_proj.weight.data = experts.gate_up_proj.weight[0].detach()
    dense.down_proj.weight.data = experts.down_proj.weight[0].detach()
    moe = MoE(SparseMixerRouter(SparseMixerConfig(), WIDTH, 1, top_k=1), experts)
    x = drawn(1, tokens, WIDTH)
    torch.testing.assert_close(moe(x), dense(x), atol=1e-6, rtol=0)


def test_a_token_does_not_depend_on_its_neighbours():
    moe = MoE(make_router(), make_experts()).double()
    x = drawn(2, 5, WIDTH, dtype=torch.float64)
    alone = torch.stack([moe(token[None, None])[0, 0] for token in x.flatten(0, 1)])
    torch.testing.assert_close(moe(x), alone.view_as(x), atol=1e-12, rtol=0)


def test_a_router_is_all_that_differs():
    """Anything that returns a Routing will do."""

    class ToTheFirst(torch.nn.Module):
        def forward(self, x_TD: Tensor) -> Routing:
            ids, gates = (
                torch.zeros(len(x_TD), 1, dtype=torch.long),
                torch.full((len(x_TD), 1), 0.5),
            )
            scores = torch.zeros(len(x_TD), EXPERTS)
            return Routing(gates, ids, RouterStats(scores, gates, ids, torch.sigmoid))

    experts, x = make_experts(), drawn(1, 6, WIDTH)
    ids = torch.zeros(6, 1, dtype=torch.long)
    expected = masked_dense(experts, x[0], ids, torch.full((6, 1), 0.5))
    torch.testing.assert_close(MoE(ToTheFirst(), experts)(x)[0], expected, atol=1e-6, rtol=0)
