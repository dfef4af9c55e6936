"""The models of the studies: two layers, 64 wide, the same active parameters with experts or not.

A run of 300 steps takes about half a minute on one core. `--wider` and `--longer` run the same
plans larger.
"""

from typing import Any

from experiments.grin.data import ROW_TOKENS, VOCABULARY

from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.nn.moe.router import RouterConfig, TopKConfig
from phikit.nn.moe.session import RoutingConfig

EXPERTS, CHOICES = 8, 2
BALANCED = RoutingConfig(balance="global", balance_coefficient=0.01)
"""How all mixtures of experts are trained where balance is not the question."""
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
    "max_context": ROW_TOKENS,
}
HIDDEN = 128
"""Hidden units of a block that one token meets."""


def dense() -> DenseConfig:
    """One block of 128 hidden units."""
    return DenseConfig.resolve({**_SHARED, "d_mlp": HIDDEN})


def moe(router: RouterConfig | None = None) -> MoEConfig:
    """Eight experts of 64 hidden units, two of them for a token."""
    own = {
        "d_mlp": HIDDEN // CHOICES,
        "num_experts": EXPERTS,
        "top_k": CHOICES,
        "router": router or TopKConfig(),
        "norm": "rms",
        "attention_bias": False,
        "head_bias": False,
    }
    return MoEConfig.resolve({**_SHARED, **own})
