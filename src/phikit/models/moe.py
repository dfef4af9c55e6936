"""The mixture-of-experts decoder: GRIN-MoE, Phi-3.5-MoE, and the SlimMoE models cut from it.

The dense block with three changes: experts under a SparseMixer router in place of the SwiGLU
block, LayerNorm in place of RMSNorm, and biases in attention and head. LongRoPE scales cos and sin
by two constants of the checkpoint (`short_mscale`, `long_mscale`) in place of the usual factor.

The checkpoints were made under three sets of names (`GRINMoE`, `PhiMoE`, SlimMoE's `PhiMoE`) that
all hold q, k, v apart and each expert's w1 (gate), w3 (up), w2 (down) apart. transformers' own
`phimoe` reads them too, but never uses the long factors of LongRoPE: beyond the original context it
departs from the released code, which this module follows (`tests/parity/test_moe.py`).

Sources: GRIN (arXiv 2409.12136), Phi-3 (2404.14219), SlimMoE (2506.18349).
"""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.errors import ConfigError
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.hf import check_activation, qkv_parts, read_rope, read_sizes, write_rope
from phikit.nn.attention import Attend, SelfAttention
from phikit.nn.moe import Experts, MoE, SparseMixerRouter
from phikit.nn.rope import RopeTables


class MoEConfig(DecoderConfig):
    """Architecture of a mixture-of-experts decoder."""

    d_mlp: PositiveInt
    """Hidden width of one expert."""
    num_experts: int = Field(ge=2)
    top_k: Literal[2] = 2
    """Experts per token; the released code and transformers know no other number."""
    jitter_eps: float = Field(default=0.01, ge=0)
    """How near to the best an expert's score must be for a share of its gate; see `nn.moe`."""
    attention_bias: bool = True
    head_bias: bool = True

    @property
    def idle_parameters(self) -> int:
        """Parameters a token does not meet: those of the experts it is not sent to."""
        idle_experts = self.num_layers * (self.num_experts - self.top_k)
        return idle_experts * 3 * self.d_model * self.d_mlp

    @model_validator(mode="after")
    def _as_released(self) -> Self:
        if self.partial_rotary != 1:
            raise ValueError(f"partial_rotary is {self.partial_rotary}; this family rotates all")
        rope = self.longrope
        if rope is not None and (rope.short_mscale is None or rope.long_mscale is None):
            raise ValueError("longrope of this family needs short_mscale and long_mscale")
        return self


class Block(nn.Module):
    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        width, num_experts = config.d_model, config.num_experts
        self.input_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.attention, layer, bias=config.attention_bias)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MoE(
            SparseMixerRouter(
                width, num_experts, num_choices=config.top_k, jitter_eps=config.jitter_eps
            ),
            Experts(num_experts, width, config.d_mlp),
        )

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class MoEModel(Decoder):
    """Decoder with a language-model head: token ids [B, T] in, logits [B, T, V] out."""

    config: MoEConfig

    def __init__(self, config: MoEConfig) -> None:
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        super().__init__(config, blocks, norm, head_bias=config.head_bias)


# --- Hugging Face configuration -----------------------------------------------------------------


# fmt: off
KEYS = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "lm_head_bias", "max_position_embeddings", "num_attention_heads", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "original_max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "router_jitter_noise", "sliding_window", "tie_word_embeddings", "vocab_size",
    "expert_dropout", "input_jitter_noise", "output_router_logits", "router_aux_loss_coef",
})
# fmt: on
"""Keys of `config.json`. Those of the last line matter in the training of their authors alone."""

ROPE_THETA = 1_000_000.0
"""What an absent `rope_theta` means to the released code; all published models say 10000."""


def to_hf_config(config: MoEConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model."""
    values = {
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "router_jitter_noise": config.jitter_eps,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rope_parameters": write_rope(config, partial=False),
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
    return values


def from_hf_config(values: dict[str, Any]) -> MoEConfig:
    """Read the `config.json` of a mixture of experts; ConfigError for what we do not run."""
    check_activation(values, "silu")
    choices = values.get("num_experts_per_tok", 2)
    if choices != 2:
        raise ConfigError(f"num_experts_per_tok is {choices}; SparseMixer routers pick 2")
    rope = read_rope({"rope_theta": ROPE_THETA} | values)
    return MoEConfig(
        **read_sizes(values, rope),
        num_experts=values["num_local_experts"],
        jitter_eps=values.get("router_jitter_noise", 0.01),
        sliding_window=values.get("sliding_window"),
        norm_eps=values["rms_norm_eps"],
        attention_bias=values.get("attention_bias", False),
        head_bias=values.get("lm_head_bias", False),
    )


# --- Key map ------------------------------------------------------------------------------------


def checkpoint_parts(config: MoEConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`."""
    block, _, inner = key.partition(".mlp.")
    if inner == "router.gate.weight":
        return [(f"{block}.block_sparse_moe.gate.weight", None)]
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
