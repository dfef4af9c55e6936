"""Every kind of router, and what is built on them: the block, upcycling, adapters, quantisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.laws.training import tiny_model, tiny_moe
from torch import Tensor, nn

from phikit.base.errors import ConfigError, WeightsError
from phikit.chat.render import renderer_for
from phikit.models.moe import MoEModel
from phikit.models.registry import config_from_hf, config_to_hf
from phikit.nn.lora import attach_lora, choose_adapter, merge_lora, route_adapters
from phikit.nn.mlp import SwiGLU
from phikit.nn.moe.block import MoE
from phikit.nn.moe.estimator import RandomDraws
from phikit.nn.moe.experts import Experts
from phikit.nn.moe.router import (
    DenseSTConfig,
    Router,
    RouterConfig,
    SampledGateConfig,
    SigmoidConfig,
    SparseMixerConfig,
    TopKConfig,
    build_router,
)
from phikit.nn.quantised import QuantConfig, QuantExpertLinear
from phikit.weights.adapter import save_adapter
from phikit.weights.build import build_model
from phikit.weights.load import Loaded
from phikit.weights.quantise import quantise
from phikit.weights.safetensors_files import open_folder, write_tensors
from phikit.weights.save import checkpoint_tensors
from phikit.weights.upcycle import UpcycleConfig, upcycle

EXPERTS, WIDTH, HIDDEN = 6, 8, 12
CONFIGS: list[RouterConfig] = [
    TopKConfig(),
    TopKConfig(normalise=False, input_jitter=0.1),
    SigmoidConfig(scale=2.5),
    SparseMixerConfig(jitter_eps=0.3),
    SparseMixerConfig(jitter_eps=None, estimator="v2star", expert_grad="paper"),
    SampledGateConfig(jitter_eps=0.3),
    DenseSTConfig(),
    DenseSTConfig(normalise=True),
]
KINDS = [f"{c.kind}-{i}" for i, c in enumerate(CONFIGS)]
every_router = pytest.mark.parametrize("config", CONFIGS, ids=KINDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_router(config: RouterConfig, *, top_k: int = 2) -> Router:
    router = build_router(config, WIDTH, EXPERTS, top_k=top_k).double()
    router.gate.weight.data = drawn(EXPERTS, WIDTH, seed=1)
    return router


def make_experts() -> Experts:
    experts = Experts(EXPERTS, WIDTH, HIDDEN).double()
    for seed, parameter in enumerate(experts.parameters(), start=2):
        parameter.data = 0.3 * drawn(*parameter.shape, seed=seed)
    return experts


def outputs(experts: Experts, x: Tensor) -> Tensor:
    """Every expert on every token, [T, E, D]."""
    gate, up = torch.einsum("td,efd->tef", x, experts.gate_up_proj.weight).chunk(2, -1)
    return torch.einsum("tef,edf->ted", F.silu(gate) * up, experts.down_proj.weight)


def draws(seed: int = 0) -> RandomDraws:
    return RandomDraws(torch.Generator().manual_seed(seed))


# --- Choices and gates ----------------------------------------------------------------------------


@every_router
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_no_token_is_lost(config: RouterConfig, tokens: int):
    router, x = make_router(config, top_k=3), drawn(tokens, WIDTH)
    for chance in (None, draws()):
        stats = router(x, draws=chance).stats
        assert int(stats.load_E().sum()) == 3 * tokens
        assert stats.ids_TC.sort(1).values.diff(dim=1).gt(0).all()
        half = torch.arange(tokens) % 2
        assert int(stats.load_E(half.double()).sum()) == 3 * int(half.sum())


@every_router
def test_the_block_is_the_sum_of_its_experts_by_their_gates(config: RouterConfig):
    """With all experts run on all tokens as the reference, drawing or not, one token or many."""
    router, experts, x = make_router(config), make_experts(), drawn(7, WIDTH, seed=5)
    for chance in (None, draws()):
        gates, ids, _, _ = router(x, draws=chance, is_learning=chance is not None)
        y = experts(x, ids, gates)
        dense = outputs(experts, x).gather(1, ids[..., None].expand(-1, -1, WIDTH))
        torch.testing.assert_close(y, (gates[..., None] * dense).sum(1), rtol=1e-12, atol=1e-14)
        alone = torch.cat([experts(x[t, None], ids[t, None], gates[t, None]) for t in range(7)])
        torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-14)


@every_router
def test_without_draws_a_router_is_a_function_of_its_input(config: RouterConfig):
    router, x = make_router(config), drawn(40, WIDTH)
    first, second = router(x), router(x)
    assert torch.equal(first.ids_TC, second.ids_TC)
    assert torch.equal(first.gates_TC, second.gates_TC)
    best = router.share(first.stats.scores_TE).topk(2).indices
    assert torch.equal(first.stats.ids_TC, best)
    same = router(x, draws=draws(3)).gates_TC
    assert torch.equal(same, router(x, draws=draws(3)).gates_TC)
    can_draw = "jitter_eps" in type(config).model_fields or config.input_jitter > 0
    assert can_draw != torch.equal(same, router(x, draws=draws(4)).gates_TC)


def test_sums_of_gates():
    x = drawn(50, WIDTH)
    for config, total in ((TopKConfig(), 1.0), (SigmoidConfig(scale=2.5), 2.5)):
        sums = make_router(config)(x).stats.gate_sum_T()
        torch.testing.assert_close(sums, torch.full_like(sums, total))
    shares = make_router(TopKConfig(normalise=False))(x).stats
    top = shares.share(shares.scores_TE).topk(2).values.sum(-1)
    torch.testing.assert_close(shares.gate_sum_T(), top)


def test_the_bias_of_sigmoid_routers_moves_choices_and_no_gate():
    router, x = make_router(SigmoidConfig(normalise=False)), drawn(30, WIDTH)
    assert isinstance(router.bias, Tensor)
    router.bias[4] = 10.0
    gates, ids, stats, _ = router(x)
    assert (ids[:, 0] == 4).all()
    torch.testing.assert_close(gates, stats.scores_TE.sigmoid().gather(1, ids))


def test_dense_st_teaches_its_router_what_every_expert_would_have_done():
    """Forward, gates and experts' gradients are those of top-k; the router's are those of all."""
    x, weights = drawn(9, WIDTH, seed=5), drawn(9, WIDTH, seed=6)
    experts = make_experts()
    results = {}
    for config in (DenseSTConfig(), TopKConfig(normalise=False)):
        router = make_router(config)
        gates, ids, *_ = router(x, is_learning=True)
        y = experts(x, ids, gates)
        leaves = [router.gate.weight, *experts.parameters()]
        results[config.kind] = (y, *torch.autograd.grad((y * weights).sum(), leaves))
    (y, routers, *of_experts), (same_y, others, *same) = results["dense_st"], results["topk"]
    torch.testing.assert_close(y, same_y, rtol=1e-12, atol=1e-14)
    for a, b in zip(of_experts, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    router = make_router(DenseSTConfig())
    values = torch.einsum("ted,td->te", outputs(experts, x).detach(), weights)
    shares = (x @ router.gate.weight.T).softmax(-1)
    [true] = torch.autograd.grad((shares * values).sum(), router.gate.weight)
    torch.testing.assert_close(routers, true, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(routers, others)


def test_input_jitter_reaches_the_router_alone():
    """Scores move by the jitter and the experts see the token as it is."""
    router = make_router(TopKConfig(input_jitter=0.2))
    x = drawn(200, WIDTH)
    before, after = router(x).stats.scores_TE, router(x, draws=draws()).stats.scores_TE
    bound = 0.2 * x.abs() @ router.gate.weight.abs().T
    moved = (before - after).detach().abs()
    assert moved.max() > 0 and (moved <= bound).all()


@pytest.mark.parametrize("is_learning", [True, False])
def test_scores_are_of_float32(is_learning: bool):
    """In bfloat16 models and under autocast; a released checkpoint's evaluation keeps its dtype."""
    model = tiny_moe(dtype=torch.bfloat16)
    [router, _] = [m for m in model.modules() if isinstance(m, Router)]
    x = drawn(8, 32).bfloat16()
    exact = x.float() @ router.gate.weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        scores = router(x, is_learning=is_learning).stats.scores_TE
    assert router.keeps_dtype and scores.dtype == (torch.float32 if is_learning else torch.bfloat16)
    torch.testing.assert_close(scores.float(), exact, atol=1e-6 if is_learning else 0.1, rtol=0.01)
    assert model(torch.arange(6)[None]).dtype == torch.bfloat16
    own = tiny_moe(dtype=torch.bfloat16, norm="rms")
    assert own.model.layers[0].mlp.router(x).stats.scores_TE.dtype == torch.float32  # pyright: ignore


@every_router
def test_shared_and_fine_grained_experts(config: RouterConfig):
    """A shared expert is added; eight narrow experts, four of them met, are no other code."""
    model = tiny_moe(
        router=config, num_experts=8, top_k=4, d_mlp=8, d_shared=16, init_std=0.3
    ).double()
    block: Any = model.model.layers[0]
    x = drawn(1, 5, 32)
    moe: MoE = block.mlp
    assert moe.shared is not None
    with_shared = moe(x)
    shared, moe.shared = moe.shared, None
    torch.testing.assert_close(with_shared, moe(x) + shared(x), rtol=1e-12, atol=1e-14)


def test_one_expert_is_a_dense_block():
    experts, dense = Experts(1, WIDTH, HIDDEN), SwiGLU(WIDTH, HIDDEN)
    for stacked, single in zip(experts.parameters(), dense.parameters(), strict=True):
        stacked.data = single.detach()[None].normal_()
        single.data = stacked[0].detach()
    x = drawn(2, 5, WIDTH).float()
    for config in (SparseMixerConfig(), TopKConfig(), SampledGateConfig()):
        moe = MoE(build_router(config, WIDTH, 1, top_k=1), experts)
        torch.testing.assert_close(moe(x), dense(x), atol=1e-6, rtol=0)


# --- Files ----------------------------------------------------------------------------------------


@every_router
def test_a_model_of_any_router_is_read_as_it_was_written(config: RouterConfig, tmp_path: Path):
    model = tiny_moe(router=config, d_shared=8, norm="rms")
    for name, buffer in model.named_buffers():
        assert name.endswith("router.bias")
        buffer.normal_(generator=torch.Generator().manual_seed(1))
    write_tensors(tmp_path / "model.safetensors", checkpoint_tensors(model), dtype=torch.float32)
    values = config_to_hf(model.config)
    assert values["model_type"] == "phikit_moe" and config_from_hf(values) == model.config
    with open_folder(tmp_path) as source:
        again = build_model(model.config, source, dtype=None)
    tokens = torch.arange(20)[None]
    assert torch.equal(model.eval()(tokens), again.eval()(tokens))


# --- Upcycling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 4, "top_k": 1, "router": {"kind": "sparsemixer", "jitter_eps": 0.0}},
        {"router": {"kind": "sparsemixer", "jitter_eps": 0.0}},
        {"router": {"kind": "sigmoid", "scale": 2.5}},
        {"router": {"kind": "dense_st", "normalise": True}},
        {"num_experts": 12, "top_k": 6, "granularity": 3},
        {"num_experts": 8, "top_k": 4, "granularity": 2, "router": {"kind": "sigmoid"}},
    ],
    ids=str,
)
@torch.no_grad()
def test_an_upcycled_model_begins_as_the_dense_one(changes: dict[str, Any]):
    dense = tiny_model().double()
    config = UpcycleConfig.resolve({"num_experts": 4} | changes)
    model = upcycle(dense, config, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(100).view(2, 50)
    expected = dense(tokens)
    torch.testing.assert_close(model.double()(tokens), expected, atol=1e-7, rtol=0)
    loads = model.model.layers[0].mlp.router(model.embed(tokens).flatten(0, 1)).stats.load_E()  # pyright: ignore
    assert (loads > 0).sum() > config.top_k
    model.model.embed_tokens.weight.zero_()
    assert torch.equal(dense(tokens), expected)


def test_upcycling_to_drawn_gates_is_near_and_says_so():
    """At 0.01 a few tokens have two candidates, and their gate is about a half."""
    dense = tiny_model()
    router = SparseMixerConfig(jitter_eps=0.01)
    config = UpcycleConfig(num_experts=4, router=router)
    model = upcycle(dense, config, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(200).view(2, 100)
    off = (model(tokens) - dense(tokens)).abs()
    assert float(off.median()) < 0.1 * float(dense(tokens).std()) and float(off.max()) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": TopKConfig(normalise=False)}, "no fixed sum"),
        ({"router": SparseMixerConfig(jitter_eps=None)}, "no fixed sum"),
        ({"granularity": 5}, "granularity is 5"),
        ({"granularity": 2, "router": SparseMixerConfig()}, "one by one"),
        ({"top_k": 9}, "top_k is 9"),
    ],
)
def test_upcycling_that_would_not_preserve_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        upcycle(tiny_model(), UpcycleConfig(num_experts=4).model_copy(update=changes))


# --- Adapters and quantised experts ---------------------------------------------------------------


def adapted() -> tuple[MoEModel, list[nn.Parameter]]:
    model = tiny_moe().double()
    trainable = attach_lora(
        model,
        name="a",
        targets=["qkv_proj", "gate_up_proj", "down_proj"],
        rank=4,
        alpha=8,
        generator=torch.Generator().manual_seed(3),
    )
    return model, trainable


def test_an_adapter_on_experts():
    """It begins as nothing, learns, and merged it computes the same, for one token and for many."""
    model, trainable = adapted()
    tokens = torch.arange(30).view(2, 15)
    base = tiny_moe().double()
    assert torch.equal(model(tokens), base(tokens))
    shapes = {tuple(p.shape) for p in trainable if p.ndim == 3}
    assert shapes == {(4, 4, 32), (4, 32, 4), (4, 4, 16)}
    model(tokens).square().mean().backward()
    moved = [p for p in trainable if p.grad is not None and p.grad.abs().max() > 0]
    assert len(moved) * 2 == len(trainable)  # B is zero, so A waits
    for parameter in trainable:
        parameter.data = 0.1 * drawn(*parameter.shape, seed=7)
    expected, single = model(tokens), model(tokens[:1, :1])
    assert not torch.allclose(expected, base(tokens))
    choose_adapter(model, None)
    assert torch.equal(model(tokens), base(tokens))
    choose_adapter(model, "a")
    merge_lora(model, "a")
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(tokens[:1, :1]), single, rtol=0, atol=1e-6)


def test_rows_of_one_batch_share_the_adapter_of_the_experts(tmp_path: Path):
    model, _ = adapted()
    with route_adapters(model, ["a", "a"]):
        model(torch.arange(30).view(2, 15))
    choose_adapter(model, None)
    with (
        route_adapters(model, ["a", None]),
        pytest.raises(ConfigError, match="only some rows"),
    ):
        model(torch.arange(30).view(2, 15))
    with pytest.raises(WeightsError, match="merge"):
        save_adapter(tmp_path, model, name="a")


def test_a_router_cannot_be_adapted():
    with pytest.raises(ConfigError, match="no linear layer 'gate'"):
        attach_lora(tiny_moe(), name="a", targets=["gate"], rank=2, alpha=2)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_experts(bits: Any, nano_tokenizer):
    """The router stays as it is, and outputs move by about what the bits allow."""
    model, exact = (tiny_moe(norm="rms", d_model=64, d_mlp=32, head_dim=16) for _ in range(2))
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    quantise(Loaded(model, nano_tokenizer, renderer), QuantConfig(bits=bits))
    moe: Any = model.model.layers[0].mlp
    assert isinstance(moe.experts.down_proj, QuantExpertLinear)
    assert torch.equal(moe.router.gate.weight, exact.model.layers[0].mlp.router.gate.weight)  # pyright: ignore
    x = drawn(12, 64).float()
    routing = moe.router(x)
    for rows in (slice(None), slice(0, 1)):
        given = x[rows], routing.ids_TC[rows], routing.gates_TC[rows]
        y, true = moe.experts(*given), exact.model.layers[0].mlp.experts(*given)  # pyright: ignore
        assert float((y - true).norm() / true.norm()) < {8: 0.02, 4: 0.25}[bits]
