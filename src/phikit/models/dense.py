"""The dense decoder of the Phi line: Phi-3, Phi-3.5, Phi-4, Phi-4-mini; and the Llama shape.

Pre-norm blocks, grouped-query attention with one fused qkv matrix (rows: all queries, then keys,
then values), rotary positions on the first part of each head, SwiGLU with gate and up fused, no
biases. Parameter names are those of Hugging Face's Phi-3 checkpoints. Llama checkpoints keep q, k,
v and gate, up apart: the key map at the end joins and splits them.

Sources: Phi-4-Mini technical report (arXiv 2503.01743), Phi-3 (2404.14219), Llama (2302.13971).
"""

from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from phikit.base.errors import ConfigError
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.hf import check_activation, qkv_parts, read_rope, read_sizes, write_rope
from phikit.nn.attention import Attend, SelfAttention
from phikit.nn.mlp import SwiGLU
from phikit.nn.norm import RMSNorm
from phikit.nn.rope import RopeTables


class DenseConfig(DecoderConfig):
    """Architecture of a dense decoder."""

    layout: Literal["phi3", "llama"] = "phi3"
    """Which Hugging Face family the checkpoint belongs to; it changes names, never mathematics."""
    d_mlp: PositiveInt


class Block(nn.Module):
    def __init__(self, config: DenseConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.attention, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_mlp)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DenseModel(Decoder):
    """Decoder with a language-model head: token ids [B, T] in, logits [B, T, V] out."""

    config: DenseConfig

    def __init__(self, config: DenseConfig) -> None:
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        super().__init__(config, blocks, RMSNorm(config.d_model, eps=config.norm_eps))


# --- Hugging Face configuration -----------------------------------------------------------------


# fmt: off
KEYS = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "lm_head_bias", "max_position_embeddings", "mlp_bias", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "partial_rotary_factor", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size", "full_attn_mod",
    "interpolate_factor", "pretraining_tp",
})
# fmt: on
"""Keys of `config.json`. Those of the last line are in official files and have no effect."""


def to_hf_config(config: DenseConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model."""
    phi3 = config.layout == "phi3"
    values = {
        "architectures": ["Phi3ForCausalLM" if phi3 else "LlamaForCausalLM"],
        "model_type": config.layout,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rope_parameters": write_rope(config, partial=phi3),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "bfloat16",
    }
    if phi3:
        values["partial_rotary_factor"] = config.partial_rotary
        values["sliding_window"] = config.sliding_window
        if config.longrope is not None:
            values["original_max_position_embeddings"] = config.longrope.original_context
    return values


def from_hf_config(values: dict[str, Any]) -> DenseConfig:
    """Read a Phi-3 or Llama `config.json`; ConfigError for a feature we do not run."""
    layout = values["model_type"]
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if values.get(key):
            raise ConfigError(f"the checkpoint says {key}: true; the dense family has no biases")
    check_activation(values, "silu")
    rope = read_rope(values)
    return DenseConfig(
        **read_sizes(values, rope),
        layout=layout,
        partial_rotary=rope.partial,
        sliding_window=values.get("sliding_window") if layout == "phi3" else None,
        norm_eps=values["rms_norm_eps"],
    )


# --- Key map ------------------------------------------------------------------------------------


def checkpoint_parts(config: DenseConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`."""
    if config.layout == "llama" and ".qkv_proj." in key:
        return qkv_parts(config, key)
    if config.layout == "llama" and ".gate_up_proj." in key:
        names = ("gate_proj", "up_proj")
        return [(key.replace("gate_up_proj", name), config.d_mlp) for name in names]
    return [(key, None)]
