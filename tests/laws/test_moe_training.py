"""Routers in the loop: their losses' gradients, chance that repeats itself, and the log."""

import gc
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.test_train_resume import After, Killed
from tests.laws.training import (
    KINDS,
    ROWS,
    Kind,
    assert_equal_gradients,
    gradient_of_step,
    make_objective,
    metrics_of,
    tiny_model,
    tiny_moe,
    train_in,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phikit.base.errors import ConfigError
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.moe import MoEModel
from phikit.nn.moe.balance import balance_loss, bias_step, max_violation, z_loss
from phikit.nn.moe.router import Router, RouterStats
from phikit.nn.moe.session import RouterSession, RoutingConfig
from phikit.train.optim import OptimConfig, Optimiser, orthogonalise

OPTIM = OptimConfig(adam_lr=3e-3, muon_lr=0.02, weight_decay=0.1, warmup=0.3, decay=0.5)
STILL = RoutingConfig(sampled=False)
LOSSES = RoutingConfig(balance="global", balance_coefficient=0.7, z_coefficient=0.3)


def routers_of(model: MoEModel) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def set_checkpointing(model: MoEModel, *, reentrant: bool) -> None:
    """Every block runs again in the backward pass; torch is told to keep no random state."""
    for block in model.model.layers:
        again = partial(
            checkpoint, block.forward, use_reentrant=reentrant, preserve_rng_state=False
        )
        block.forward = again  # pyright: ignore[reportAttributeAccessIssue]


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [ROWS, 3])
@pytest.mark.parametrize("balance", [None, "local", "global"])
def test_gradients_are_those_of_all_losses_together(balance: Any, micro: int, tmp_path: Path):
    """The reference adds the losses up and differentiates; padding counts in none of them."""
    model = tiny_moe().double()
    routing = LOSSES.model_copy(update={"balance": balance, "sampled": False})
    objective = make_objective("sft", model, micro=micro)
    found = gradient_of_step(tmp_path, model, objective, routing=routing)

    batches, _ = objective.step_data(0)
    tokens = sum(batch.num_tokens for batch in batches)
    assert tokens < sum(batch.tokens_BT.numel() for batch in batches)
    seen: list[RouterStats] = []
    for router in routers_of(model):
        router.register_forward_hook(lambda *call: seen.append(call[2].stats))
    total = torch.zeros(())
    loads = [torch.zeros(4) for _ in range(2)]
    for batch in batches:
        counts = batch.is_text_BT.flatten().double()
        assert int(counts.sum()) == batch.num_tokens
        loss = objective.loss(model, batch).total
        total = total + loss / sum(map(objective.weight, batches))
        for layer, stats in enumerate(seen):
            load = stats.load_E(counts)
            loads[layer] = load if balance == "local" else loads[layer] + load
            aux = 0.3 * z_loss(stats.scores_TE, counts)
            if balance is not None:
                aux = aux + 0.7 * balance_loss(stats.share(stats.scores_TE), loads[layer], counts)
            total = total + aux / tokens
        seen.clear()
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(names.values()))
    assert_equal_gradients(found, dict(zip(names, (g.float() for g in gradients), strict=True)))


@pytest.mark.parametrize("kind", ["lm", "sft", "dpo"])
def test_accumulated_is_one_batch(kind: Kind, tmp_path: Path):
    """Without draws, and without a balance loss, which cannot know the loads to come."""
    gradients = []
    for micro in (ROWS, 3):
        model = tiny_moe()
        objective = make_objective(kind, model, micro=micro)
        routing = RoutingConfig(sampled=False, z_coefficient=0.3)
        gradients.append(gradient_of_step(tmp_path / f"{micro}", model, objective, routing=routing))
    assert_equal_gradients(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["sparsemixer", "sigmoid"])
def test_recomputed_is_computed(kind: str, reentrant: bool, tmp_path: Path):
    """Under activation checkpointing: the same draws, losses once, loads counted once."""
    found = []
    for way in ("plain", "again"):
        jitter = {"jitter_eps": 0.5} if kind == "sparsemixer" else {"input_jitter": 0.1}
        model = tiny_moe(router={"kind": kind} | jitter)
        if way == "again":
            set_checkpointing(model, reentrant=reentrant)
        objective = make_objective("lm", model, micro=3)
        found.append(gradient_of_step(tmp_path / way, model, objective, routing=LOSSES))
    assert_equal_gradients(*found, tolerance=1e-7)
    plain, again = (metrics_of(tmp_path / way) for way in ("plain", "again"))
    assert plain == again


def test_one_forward_pass_a_micro_batch():
    """A second one would take the loads of the first for its own."""
    model = tiny_moe().train()
    session = RouterSession(model, RoutingConfig())
    session.begin(0, batches=1, tokens=8)
    with session.micro_batch(torch.ones(1, 8, dtype=torch.bool)):
        model(torch.arange(8)[None])
        with pytest.raises(AssertionError, match="one forward pass"):
            model(torch.arange(8)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype):
    """Products in bfloat16 and routers in float32, whatever the dtype of the weights."""
    model, exact = tiny_moe(dtype=dtype), tiny_moe()
    tokens = torch.arange(60).view(2, 30)
    gradients = []
    for way in (model, exact):
        session = RouterSession(way, LOSSES, seed=1)
        session.begin(0, batches=1, tokens=60)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=way is model),
            session.micro_batch(torch.ones_like(tokens, dtype=torch.bool)),
        ):
            way.train()(tokens).float().logsumexp(-1).mean().backward()
        gradients.append([p.grad.float() for p in way.parameters() if p.grad is not None])
    for name, a, b in zip(dict(exact.named_parameters()), *gradients, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.2, name


# --- Chance ---------------------------------------------------------------------------------------


def run_in(folder: Path, *, seed: int = 0, routing: RoutingConfig = LOSSES, **changes) -> MoEModel:
    model = tiny_moe(seed=seed, **changes)
    objective = make_objective("lm", model, micro=3, steps=4)
    train_in(folder, model, objective, optim=OPTIM, steps=4, routing=routing)
    return model


def test_a_run_repeats_itself_whatever_else_is_drawn(tmp_path: Path):
    first = run_in(tmp_path / "a")
    torch.randn(7)
    second = run_in(tmp_path / "b")
    other = run_in(tmp_path / "c", routing=LOSSES.model_copy(update={"sampled": False}))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, c) for a, c in zip(first.parameters(), other.parameters()))  # noqa: B905
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("router", "balance"),
    [({"kind": "sparsemixer", "jitter_eps": 0.5}, "global"), ({"kind": "sigmoid"}, "bias")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_equals_unbroken(router: Any, balance: Any, dtype: torch.dtype, tmp_path: Path):
    """Killed after step 5 it goes on from 3: draws and biases are those of the unbroken run."""

    def trained(folder: Path, *, seed: int = 0, **how) -> MoEModel:
        model = tiny_moe(seed=seed, dtype=dtype, router=router)
        objective = make_objective("lm", model, micro=3, steps=6)
        routing = RoutingConfig(balance=balance, bias_rate=0.01)
        how |= {"routing": routing, "checkpoint_every": 3}
        train_in(folder, model, objective, optim=OPTIM, steps=6, **how)
        return model

    unbroken = trained(tmp_path / "unbroken")
    with pytest.raises(Killed):
        trained(tmp_path / "broken", trackers=[After(5, Killed)])
    resumed = trained(tmp_path / "broken", seed=7)
    state, expected = resumed.state_dict(), unbroken.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "unbroken")


def choices(model: MoEModel, session: RouterSession, step: int, *, batches: int = 1) -> Tensor:
    """Experts of all layers in the last of so many equal micro-batches."""
    tokens = torch.arange(40)[None]
    seen: list[Tensor] = []
    hooks = [
        r.register_forward_hook(lambda *c: seen.append(c[2].ids_TC)) for r in routers_of(model)
    ]
    session.begin(step, batches=batches, tokens=40 * batches)
    for _ in range(batches):
        with session.micro_batch(torch.ones_like(tokens, dtype=torch.bool)):
            model(tokens)
    session.end()
    for hook in hooks:
        hook.remove()
    return torch.stack(seen[-2:])


@torch.no_grad()
def test_what_a_draw_depends_on():
    model = tiny_moe(router={"kind": "sparsemixer", "jitter_eps": None})
    session = RouterSession(model, RoutingConfig(), seed=3)
    first = choices(model, session, 0)
    assert torch.equal(first, choices(model, session, 0))
    assert not torch.equal(first, choices(model, session, 1))
    assert not torch.equal(first, choices(model, session, 0, batches=2))
    assert not torch.equal(first, choices(model, RouterSession(model, RoutingConfig(), seed=4), 0))
    layers = first.sort(-1).values
    assert not torch.equal(layers[0], layers[1])


@torch.no_grad()
def test_outside_a_micro_batch_nothing_is_drawn():
    """Rollouts between the steps of a model in train mode are those of evaluation."""
    model = tiny_moe(router={"kind": "sparsemixer", "jitter_eps": None, "input_jitter": 0.3})
    session = RouterSession(model, RoutingConfig())
    tokens = torch.arange(40)[None]
    expected = model.eval()(tokens)
    choices(model.train(), session, 0)
    assert torch.equal(model(tokens), expected)
    request = Request(list(range(9)), max_new_tokens=20, temperature=0.0)
    replies = [Engine(model.train(mode)).generate([request])[0][0].tokens for mode in (True, False)]
    assert replies[0] == replies[1]


# --- Objectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_trains_a_mixture(kind: Kind, sampled: bool, tmp_path: Path):
    model, before = tiny_moe(), tiny_moe()
    routing = LOSSES.model_copy(update={"sampled": sampled, "balance_coefficient": 0.01})
    objective = make_objective(kind, model, micro=3, steps=3)
    train_in(tmp_path, model, objective, optim=OPTIM, steps=3, routing=routing)
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(a, b), name
    rows = [row for row in metrics_of(tmp_path) if row["tokens"]]
    assert rows
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        for layer in range(2):
            assert sum(row[f"router.load.{layer}.{e}"] for e in range(4)) == pytest.approx(1)
        if kind == "grpo" and not sampled:  # the routing of the rollouts: on policy
            assert row["sampler_kl"] == pytest.approx(0, abs=1e-6) and row["clipped"] == 0


# --- Choices of a stage ---------------------------------------------------------------------------


def test_frozen_routers_stay(tmp_path: Path):
    model, before = tiny_moe(), tiny_moe()
    objective = make_objective("sft", model)
    routing = RoutingConfig(frozen=True, sampled=False)
    train_in(tmp_path, model, objective, optim=OPTIM, steps=2, routing=routing)
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) == (".router." in name), name
        assert a.requires_grad


def test_routing_that_the_model_has_not_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no routers"):
        RouterSession(tiny_model(), STILL)
    with pytest.raises(ConfigError, match="needs sigmoid routers"):
        RouterSession(tiny_moe(), RoutingConfig(balance="bias"))
    model = tiny_model()
    train_in(tmp_path, model, make_objective("lm", model), optim=OPTIM, steps=1)
    assert not any(key.startswith("router") for key in metrics_of(tmp_path)[0])


# --- Balance --------------------------------------------------------------------------------------


def test_the_measures_of_balance():
    even, one = torch.full((4,), 5.0), torch.tensor([20.0, 0, 0, 0])
    shares, counts = torch.full((7, 4), 0.25), torch.ones(7)
    assert float(max_violation(even)) == 0 and float(max_violation(one)) == 3
    assert float(balance_loss(shares, even, counts)) / 7 == pytest.approx(1)
    collapsed = torch.eye(4)[[0] * 7]
    assert float(balance_loss(collapsed, one, counts)) / 7 == pytest.approx(4)
    step = bias_step(torch.tensor([9.0, 5.0, 5.0, 1.0]), rate=0.1)
    assert step.tolist() == pytest.approx([-0.1, 0, 0, 0.1])
    assert float(bias_step(one, rate=0.1).sum()) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("method", ["global", "bias"])
def test_balance_is_reached(method: Any, tmp_path: Path):
    """From routers that send nearly everything to one expert; without help they stay so."""
    last = {}
    for name, balance in (("none", None), ("with", method)):
        model = tiny_moe(router={"kind": "sigmoid"}, norm="rms")
        for router in routers_of(model):
            router.gate.weight.data[0] += 0.1
            assert isinstance(router.bias, Tensor)
            router.bias[0] = 0.2
        objective = make_objective("lm", model, steps=40)
        routing = RoutingConfig(balance=balance, balance_coefficient=1.0, bias_rate=0.02)
        optim = OptimConfig(adam_lr=3e-3)
        train_in(tmp_path / name, model, objective, optim=optim, steps=40, routing=routing)
        rows = metrics_of(tmp_path / name)
        last[name] = sum(row["router.max_vio"] for row in rows[-8:]) / 8
    assert last["with"] < 0.5 * last["none"], last


def test_the_log_says_what_the_routers_did(tmp_path: Path):
    model = tiny_moe(router={"kind": "sparsemixer", "jitter_eps": 0.05})
    objective = make_objective("sft", model, micro=3)
    seen: list[RouterStats] = []
    for router in routers_of(model):
        router.register_forward_hook(lambda *call: seen.append(call[2].stats))
    routing = LOSSES.model_copy(update={"balance": "local"})
    gradient_of_step(tmp_path, model, objective, routing=routing)
    [row] = metrics_of(tmp_path)
    batches, _ = objective.step_data(0)
    tokens = sum(batch.num_tokens for batch in batches)
    assert row["tokens"] == tokens
    sums = {"entropy": 0.0, "single": 0.0, "gate_sum": 0.0, "z": 0.0}
    loads, means = [torch.zeros(4), torch.zeros(4)], [torch.zeros(4), torch.zeros(4)]
    for number, stats in enumerate(seen):
        counts = batches[number // 2].is_text_BT.flatten()
        shares = stats.scores_TE.softmax(-1)[counts].detach()
        load = stats.load_E(counts.float()).float()
        loads[number % 2] += load
        sums["entropy"] -= float((shares * shares.log()).sum())
        sums["single"] += float(stats.is_single_T()[counts].sum())
        sums["gate_sum"] += float(stats.gates_TC.detach()[counts].sum())
        sums["z"] += float(stats.scores_TE.detach()[counts].logsumexp(-1).square().sum())
        means[number % 2] += shares.sum(0) / tokens
    for name, value in sums.items():
        assert row[f"router.{name}"] == pytest.approx(value / tokens / 2, rel=1e-4), name
    assert 0 < row["router.single"] < 1
    for layer, load in enumerate(loads):
        assert int(load.sum()) == 2 * tokens
        for expert in range(4):
            share = row[f"router.load.{layer}.{expert}"]
            assert share == pytest.approx(float(load[expert]) / (2 * tokens), rel=1e-5)
    even = sum(4 * float((a / a.sum()) @ b) for a, b in zip(loads, means, strict=True)) / 2
    assert row["router.balance"] == pytest.approx(even, rel=1e-4)
    worst = sum(float(max_violation(load)) for load in loads) / 2
    assert row["router.max_vio"] == pytest.approx(worst, rel=1e-5)


# --- The optimiser --------------------------------------------------------------------------------


def test_muon_takes_each_expert_s_matrices_and_adam_the_routers():
    model = tiny_moe(d_shared=16)
    optimiser = Optimiser(model.named_parameters(), OptimConfig(adam_lr=1e-3, muon_lr=0.02))
    muon = {name for k, names in optimiser.names.items() if k.startswith("muon") for name in names}
    matrices = {
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and ".layers." in name and ".router." not in name
    }
    assert muon == matrices
    assert sum(".experts." in name for name in muon) == 4
    everything = sorted(name for names in optimiser.names.values() for name in names)
    assert everything == sorted(name for name, _ in model.named_parameters())


def test_a_stack_of_experts_steps_like_its_matrices():
    """And an expert that no token met in this step is not moved by the others' gradient."""
    model = tiny_moe()
    config = OptimConfig(adam_lr=0.0, muon_lr=0.02, momentum=0.9, clip_norm=None)
    optimiser = Optimiser(model.named_parameters(), config)
    weight = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj.weight")
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad[2] = 0
    mixed = weight.grad.lerp(0.1 * weight.grad, 0.9)  # gradient and first momentum
    directions = [orthogonalise(matrix[None])[0] for matrix in mixed]
    optimiser.accumulate()
    optimiser.step(1.0)
    for expert, direction in enumerate(directions):
        expected = before[expert] - 0.02 * direction
        torch.testing.assert_close(weight[expert].detach(), expected, atol=2e-4, rtol=0)
    assert torch.equal(weight[2], before[2])


@pytest.mark.parametrize("balance", [None, "bias", "global"])
def test_a_step_leaves_no_tensor_behind(balance: Any):
    """Where nothing is added to the loss, what the statistics are computed of is let go too."""

    def steps(count: int) -> int:
        for step in range(count):
            session.begin(step, batches=1, tokens=tokens_BT.numel())
            with session.micro_batch(torch.ones_like(tokens_BT, dtype=torch.bool)):
                loss = model(tokens_BT).square().mean()
            loss.backward()
            session.end()
        del loss
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    model = tiny_moe(router={"kind": "sigmoid"})
    session = RouterSession(model, RoutingConfig(balance=balance))
    tokens_BT = torch.arange(12).view(2, 6)
    before = steps(2)
    assert steps(5) <= before
