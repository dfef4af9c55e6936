"""From a dense decoder to a mixture of experts that computes the same (arXiv 2212.05055).

Every expert starts as a copy of the feed-forward block. Where a token is sent does not matter then,
if its gates sum to 1: the first loss is the dense model's. With `granularity` G the block is cut
into G shards instead, experts are copies of shards, and a token's choices are whole sets of them:
the router's rows start as G equal ones, so the shards of a set win or lose together ("virtual
groups", arXiv 2410.07524).

SparseMixer's gates do not sum to 1: each choice has nearly all of its own softmax. The output is
divided by their number, which is exact for a token whose choices have one candidate each, and too
small for the others. With an even start in mind take a router whose gates sum to 1.
"""

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from phikit.base.config import Config
from phikit.base.errors import ConfigError
from phikit.models.dense import DenseModel
from phikit.models.moe import MoEConfig, MoEModel
from phikit.nn.moe.block import MoE
from phikit.nn.moe.router import (
    DenseSTConfig,
    RouterConfig,
    SampledGateConfig,
    SigmoidConfig,
    SparseMixerConfig,
    TopKConfig,
)


class UpcycleConfig(Config):
    """What becomes of each feed-forward block."""

    num_experts: int = Field(ge=2)
    top_k: PositiveInt = 2
    router: RouterConfig = TopKConfig()
    granularity: PositiveInt = 1
    """Shards of the dense block; it divides its width, `num_experts` and `top_k`."""
    router_std: float = Field(default=0.02, ge=0)
    """Of the router's first weights. Zero would send all tokens to the same experts."""


@torch.no_grad()
def upcycle(
    dense: DenseModel, config: UpcycleConfig, *, generator: torch.Generator | None = None
) -> MoEModel:
    """A mixture of experts, in the dense model's dtype, that shares no memory with it.

    Raises ConfigError for a granularity that does not divide or that a drawing router cannot
    follow, and for gates without a fixed sum.
    """
    shards = config.granularity
    d_mlp = dense.config.d_mlp
    if d_mlp % shards or config.num_experts % shards or config.top_k % shards:
        raise ConfigError(
            f"granularity is {shards}; it has to divide the block's width {d_mlp}, "
            f"num_experts {config.num_experts} and top_k {config.top_k}",
            fix="choose a common divisor",
        )
    total = _gate_sum(config.router, config.top_k, shards=shards)
    shared = dense.config.model_dump(exclude={"layout", "d_mlp"})
    changes = {
        "d_mlp": d_mlp // shards,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "router": config.router,
        "norm": "rms",
        "attention_bias": False,
        "head_bias": False,
    }
    model = MoEModel(MoEConfig.resolve(shared | changes)).to(dense.device, dense.dtype)
    weights = dense.state_dict()
    rest = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    model.load_state_dict(rest, strict=False)
    for layer, block in enumerate(model.model.layers):
        mlp = f"model.layers.{layer}.mlp"
        moe = block.mlp
        assert isinstance(moe, MoE)
        _fill(
            moe,
            gate_up=weights[f"{mlp}.gate_up_proj.weight"],
            # A shard's share of the gates is 1/G, as all shards of a set are chosen.
            down=weights[f"{mlp}.down_proj.weight"] * (shards / total),
            shards=shards,
        )
        rows_ED = moe.get_parameter("router.gate.weight")
        drawn = torch.empty(len(rows_ED) // shards, rows_ED.shape[1])
        drawn.normal_(0.0, config.router_std, generator=generator)
        rows_ED.copy_(drawn.repeat_interleave(shards, 0))
    return model


def _gate_sum(router: RouterConfig, top_k: int, *, shards: int) -> float:
    """What a token's gates sum to in a router that is about to start."""
    match router:
        case SparseMixerConfig() | SampledGateConfig() if router.jitter_eps is not None:
            if shards > 1:
                raise ConfigError(
                    f"a {router.kind} router picks shards one by one, not sets of {shards}",
                    fix="set granularity to 1, or choose the router topk or sigmoid",
                )
            return top_k
        case TopKConfig(normalise=True) | DenseSTConfig(normalise=True):
            return 1.0
        case SigmoidConfig(normalise=True):
            return router.scale
    raise ConfigError(
        f"the gates of this {router.kind} router have no fixed sum, so no copy computes the same",
        fix="set router.normalise to true, or for draws a router.jitter_eps",
    )


def _fill(moe: MoE, *, gate_up: Tensor, down: Tensor, shards: int) -> None:
    """Experts e, e + G, ... are shard e of the dense matrices, [2F, D] and [D, F]."""
    gates, ups = gate_up.chunk(2)
    pieces = zip(gates.chunk(shards), ups.chunk(shards), down.chunk(shards, 1), strict=True)
    for shard, (gate, up, part) in enumerate(pieces):
        moe.get_parameter("experts.gate_up_proj.weight")[shard::shards] = torch.cat([gate, up])
        moe.get_parameter("experts.down_proj.weight")[shard::shards] = part
