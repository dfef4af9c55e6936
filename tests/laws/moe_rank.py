"""One of two processes that train a mixture of experts; `test_moe_ranks.py` starts it as a module.

Every part leaves what it found in the folder, a file for each process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.laws.training import make_objective, start_run, tiny_moe, train_in
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from phikit.base.device import Rank
from phikit.models.moe import MoEModel
from phikit.nn.moe.experts import Experts
from phikit.nn.moe.router import Router
from phikit.nn.moe.session import RouterSession, RoutingConfig
from phikit.train.optim import OptimConfig

STEPS = 3
OPTIM = OptimConfig(adam_lr=1e-2, eps=1e-2, muon_lr=None)
GLOBAL = RoutingConfig(sampled=False, balance="global", balance_coefficient=0.5, z_coefficient=0.1)
BIAS = RoutingConfig(balance="bias", bias_rate=0.05)
TOKENS = torch.arange(64).view(4, 16)


def train_globally(folder: Path, rank: Rank) -> MoEModel:
    """The balance loss of the whole step; no draws, so that any number of ranks is the same."""
    model = tiny_moe()
    objective = make_objective("sft", model, rank=rank)
    train_in(folder, model, objective, optim=OPTIM, steps=STEPS, routing=GLOBAL)
    return model


def train_by_bias(folder: Path, rank: Rank) -> MoEModel:
    model = tiny_moe(router={"kind": "sigmoid"}, norm="rms")
    objective = make_objective("lm", model, rank=rank)
    train_in(folder, model, objective, optim=OPTIM, steps=STEPS, routing=BIAS)
    return model


def train_unevenly(folder: Path, rank: Rank) -> MoEModel:
    """GRPO, of which ranks have different numbers of micro-batches, down to none."""
    model = tiny_moe()
    objective = make_objective("grpo", model, micro=2, steps=4, rank=rank)
    train_in(folder, model, objective, optim=OPTIM, steps=4, routing=GLOBAL)
    return model


RUNS = {"global": train_globally, "bias": train_by_bias, "uneven": train_unevenly}


def weights_of(model: MoEModel) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def choices(group: dist.ProcessGroup | None) -> Tensor:
    """What the routers draw for the same tokens on every rank."""
    model = tiny_moe(router={"kind": "sparsemixer", "jitter_eps": None})
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *call: seen.append(call[2].ids_TC))
    session = RouterSession(model, RoutingConfig(), seed=1, group=group)
    session.begin(0, batches=1, tokens=TOKENS.numel())
    with session.micro_batch(torch.ones_like(TOKENS, dtype=torch.bool)):
        model(TOKENS)
    session.end()
    return torch.stack(seen)


@torch.no_grad()
def tensor_parallel(rank: Rank) -> Tensor:
    """Every rank has a share of every expert's hidden width; the sum of their outputs is whole."""
    model = tiny_moe()
    whole = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(whole, Experts)
    gate, up = whole.gate_up_proj.weight.chunk(2, 1)
    mine = [part.chunk(rank.size, 1)[rank.index] for part in (gate, up)]
    part = Experts(4, 32, 16 // rank.size)
    part.gate_up_proj.weight.copy_(torch.cat(mine, 1))
    part.down_proj.weight.copy_(whole.down_proj.weight.chunk(rank.size, 2)[rank.index])
    router = model.get_submodule("model.layers.0.mlp.router")
    x = model.embed(TOKENS).flatten(0, 1)
    gates, ids, *_ = router(x)
    y = part(x, ids, gates)
    if rank.size > 1:
        dist.all_reduce(y)
    return y


def sharded_gradients(rank: Rank) -> dict[str, Tensor]:
    """FSDP2: weights and gradients split over ranks, gradients summed and gathered again.

    Each rank has its share of the tokens; nothing is drawn, so one rank alone is the reference.
    """
    model = tiny_moe()
    session = RouterSession(model, GLOBAL)
    if rank.size > 1:
        for part in (*model.model.layers, model):
            fully_shard(part)  # pyright: ignore[reportArgumentType, reportCallIssue]
            # Sums, not means; gloo knows no scaled sum.
            part.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportCallIssue]
            part.set_gradient_divide_factor(1.0)  # pyright: ignore[reportCallIssue]
    tokens = TOKENS[rank.index :: rank.size]
    session.begin(0, batches=1, tokens=TOKENS.numel())
    with session.micro_batch(torch.ones_like(tokens, dtype=torch.bool)):
        loss = model.train()(tokens).logsumexp(-1).sum() / TOKENS.numel()
    loss.backward()
    session.end()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: (g.full_tensor() if isinstance(g, DTensor) else g) for name, g in gradients.items()
    }


def run_all(folder: Path, rank: Rank) -> None:
    """Everything one process does."""
    for name, run in RUNS.items():
        model = run(folder / name, rank)
        save_file(weights_of(model), folder / f"{name}-{rank.index}.safetensors")
    alone = None
    if rank.size > 1:
        alone, _ = dist.new_subgroups(group_size=1)
        assert isinstance(alone, dist.ProcessGroup)
    draws = {"data": choices(None), "tensor": choices(alone)}
    save_file(draws, folder / f"draws-{rank.index}.safetensors")
    save_file({"y": tensor_parallel(rank)}, folder / f"parts-{rank.index}.safetensors")
    save_file(sharded_gradients(rank), folder / f"sharded-{rank.index}.safetensors")


def prepare(folder: Path) -> None:
    """Make the run folders, which all processes share."""
    for name in RUNS:
        start_run(folder / name)


if __name__ == "__main__":
    place, index, size = sys.argv[1:]
    torch.set_num_threads(1)
    this = Rank(int(index), int(size))
    store = f"file://{place}/store"
    dist.init_process_group("gloo", init_method=store, rank=this.index, world_size=this.size)
    run_all(Path(place), this)
    dist.destroy_process_group()
