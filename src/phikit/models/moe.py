"""The mixture-of-experts decoder: GRIN-MoE, Phi-3.5-MoE, and the SlimMoE models cut from it.

The dense block with three changes: experts under a SparseMixer router in place of the SwiGLU
block, LayerNorm in place of RMSNorm, and biases in attention and head. LongRoPE scales cos and sin
by two constants of the checkpoint (`short_mscale`, `long_mscale`) in place of the usual factor.
Models of one's own may have other routers (`nn.moe.router`), a shared expert, and the norms and
positions of the dense family, from which they can be upcycled (`weights.upcycle`).

What transformers can run is written as `phimoe`, all else as `phikit_moe`, which it refuses: it
would compute something else.

The checkpoints were made under three sets of names (`GRINMoE`, `PhiMoE`, SlimMoE's `PhiMoE`) that
all hold q, k, v apart and each expert's w1 (gate), w3 (up), w2 (down) apart. transformers' own
`phimoe` reads them too, but never uses the long factors of LongRoPE: beyond the original context it
departs from the released code, which this module follows (`tests/parity/test_moe.py`).

Sources: GRIN (arXiv 2409.12136), Phi-3 (2404.14219), SlimMoE (2506.18349).
"""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, TypeAdapter, model_validator
from torch import Tensor, nn

from phikit.base.errors import ConfigError
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.hf import check_activation, qkv_parts, read_rope, read_sizes, write_rope
from phikit.nn.attention import Attend, SelfAttention
from phikit.nn.mlp import SwiGLU
from phikit.nn.moe.block import MoE
from phikit.nn.moe.experts import Experts
from phikit.nn.moe.router import RouterConfig, SparseMixerConfig, build_router
from phikit.nn.norm import RMSNorm
from phikit.nn.rope import RopeTables


class MoEConfig(DecoderConfig):
    """Architecture of a mixture-of-experts decoder."""

    d_mlp: PositiveInt
    """Hidden width of one expert."""
    num_experts: int = Field(ge=2)
    top_k: PositiveInt = 2
    """Experts per token."""
    router: RouterConfig = SparseMixerConfig()
    d_shared: PositiveInt | None = None
    """Hidden width of an expert that every token meets besides; None has none."""
    norm: Literal["layer", "rms"] = "layer"
    attention_bias: bool = True
    head_bias: bool = True

    @property
    def idle_parameters(self) -> int:
        """Parameters a token does not meet: those of the experts it is not sent to."""
        idle_experts = self.num_layers * (self.num_experts - self.top_k)
        return idle_experts * 3 * self.d_model * self.d_mlp

    @property
    def is_phimoe(self) -> bool:
        """Whether the model is one of the released shape, which transformers evaluates as we do."""
        router, rope = self.router, self.longrope
        return (
            isinstance(router, SparseMixerConfig)
            and router.rule.temperature == 1
            and router.jitter_eps is not None
            and (self.top_k, self.d_shared, self.norm, self.partial_rotary) == (2, None, "layer", 1)
            and (rope is None or None not in (rope.short_mscale, rope.long_mscale))
        )

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, of {self.num_experts} experts")
        if self.top_k == 1 and getattr(self.router, "normalise", False):
            raise ValueError(
                "with top_k 1 a normalised gate is always 1 and teaches the router nothing; "
                "set router.normalise to false"
            )
        return self


class Block(nn.Module):
    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        width, num_experts = config.d_model, config.num_experts
        self.input_layernorm = make_norm(config)
        self.self_attn = SelfAttention(config.attention, layer, bias=config.attention_bias)
        self.post_attention_layernorm = make_norm(config)
        router = build_router(config.router, width, num_experts, top_k=config.top_k)
        router.keeps_dtype = config.is_phimoe
        shared = SwiGLU(width, config.d_shared) if config.d_shared else None
        self.mlp = MoE(router, Experts(num_experts, width, config.d_mlp), shared=shared)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def make_norm(config: MoEConfig) -> nn.Module:
    """One of the model's norms."""
    kind = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.d_model, eps=config.norm_eps)


class MoEModel(Decoder):
    """Decoder with a language-model head: token ids [B, T] in, logits [B, T, V] out."""

    config: MoEConfig

    def __init__(self, config: MoEConfig) -> None:
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        super().__init__(config, blocks, make_norm(config), head_bias=config.head_bias)


# --- Hugging Face configuration -----------------------------------------------------------------


# fmt: off
KEYS = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "lm_head_bias", "max_position_embeddings", "num_attention_heads", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "original_max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "router_jitter_noise", "sliding_window", "tie_word_embeddings", "vocab_size",
    "partial_rotary_factor", "phikit_router", "phikit_norm", "phikit_shared_size",
    "expert_dropout", "input_jitter_noise", "output_router_logits", "router_aux_loss_coef",
})
# fmt: on
"""Keys of `config.json`. Those of the last line matter in the training of their authors alone."""

OWN_TYPE = "phikit_moe"
"""The `model_type` of what phikit alone can run."""
ROPE_THETA = 1_000_000.0
"""What an absent `rope_theta` means to the released code; all published models say 10000."""


def to_hf_config(config: MoEConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model, or refuses it."""
    is_phimoe, router = config.is_phimoe, config.router
    values = {
        "architectures": ["PhimoeForCausalLM" if is_phimoe else "PhikitMoEForCausalLM"],
        "model_type": "phimoe" if is_phimoe else OWN_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rope_parameters": write_rope(config, partial=not is_phimoe),
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "lm_head_bias": config.head_bias,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    if config.longrope is not None:
        values["original_max_position_embeddings"] = config.longrope.original_context
    if is_phimoe:
        assert isinstance(router, SparseMixerConfig)
        values["router_jitter_noise"] = router.jitter_eps
        is_told = router == SparseMixerConfig(jitter_eps=router.jitter_eps)
    else:
        values["partial_rotary_factor"] = config.partial_rotary
        values["phikit_norm"] = config.norm
        values["phikit_shared_size"] = config.d_shared
        is_told = False
    if not is_told:
        values["phikit_router"] = router.model_dump(mode="json")
    return values


def from_hf_config(values: dict[str, Any]) -> MoEConfig:
    """Read the `config.json` of a mixture of experts; ConfigError for what we do not run."""
    check_activation(values, "silu")
    is_own = values["model_type"] == OWN_TYPE
    choices = values.get("num_experts_per_tok", 2)
    if choices != 2 and not is_own:
        raise ConfigError(f"num_experts_per_tok is {choices}; the released routers pick 2")
    rope = read_rope({"rope_theta": ROPE_THETA} | values)
    router = SparseMixerConfig(jitter_eps=values.get("router_jitter_noise", 0.01))
    if "phikit_router" in values:
        router = TypeAdapter(RouterConfig).validate_python(values["phikit_router"])
    config = MoEConfig(
        **read_sizes(values, rope),
        num_experts=values["num_local_experts"],
        top_k=choices,
        router=router,
        d_shared=values.get("phikit_shared_size"),
        norm=values.get("phikit_norm", "layer"),
        partial_rotary=rope.partial,
        sliding_window=values.get("sliding_window"),
        norm_eps=values["rms_norm_eps"],
        attention_bias=values.get("attention_bias", False),
        head_bias=values.get("lm_head_bias", False),
    )
    if not (is_own or config.is_phimoe):
        raise ConfigError(
            f"config.json says model_type {values['model_type']!r}, and what it describes is none: "
            "it rotates all channels, its norms are LayerNorms, its routers SparseMixers, and its "
            "longrope has short_mscale and long_mscale",
        )
    return config


# --- Key map ------------------------------------------------------------------------------------


OWN_NAMES = {"router.gate.weight": "gate.weight", "router.bias": "gate.e_score_correction_bias"}
"""Ours to the checkpoint's, of what is not stacked; the bias goes by DeepSeek's name."""


def checkpoint_parts(config: MoEConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`."""
    block, _, inner = key.partition(".mlp.")
    if inner.startswith(("router.", "shared.")):
        name = OWN_NAMES.get(inner, inner)
        return [(f"{block}.block_sparse_moe.{name}", None)]
    if inner:
        parts = ("w1", "w3") if inner == "experts.gate_up_proj.weight" else ("w2",)
        rows = config.d_model if parts == ("w2",) else config.d_mlp
        experts = f"{block}.block_sparse_moe.experts"
        return [
            (f"{experts}.{expert}.{part}.weight", rows)
            for expert in range(config.num_experts)
            for part in parts
        ]
    if ".qkv_proj." in key:
        return qkv_parts(config, key)
    return [(key, None)]
