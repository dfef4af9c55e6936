"""Phi-1, Phi-1.5 and Phi-2: the parallel decoder of the Phi line.

Attention and feed-forward read the same LayerNorm and are added to the stream together:
x + attention(norm(x)) + mlp(norm(x)). Everything has a bias, the head too; the feed-forward block
is a plain GELU pair; only the first 0.5 (Phi-2: 0.4) of each head's channels is rotated. The
checkpoints keep q, k and v apart; the key map at the end joins and splits them.

Sources: Textbooks Are All You Need (arXiv 2306.11644), Phi-1.5 (2309.05463); transformers,
`models/phi/modeling_phi.py`.
"""

from typing import Any, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.errors import ConfigError
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.hf import (
    check_activation,
    qkv_parts,
    read_rope,
    read_sizes,
    renamed,
    write_rope,
)
from phikit.nn.attention import Attend, SelfAttention
from phikit.nn.mlp import GeluMLP
from phikit.nn.rope import RopeTables


class PhiConfig(DecoderConfig):
    """Architecture of a parallel decoder."""

    d_mlp: PositiveInt
    partial_rotary: float = Field(default=0.5, gt=0, le=1)
    tie_embeddings: bool = False

    @model_validator(mode="after")
    def _is_phi(self) -> Self:
        if self.longrope is not None or self.sliding_window is not None:
            raise ValueError("models of type phi have neither LongRoPE nor a sliding window")
        return self


class Block(nn.Module):
    def __init__(self, config: PhiConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.attention, layer, bias=True)
        self.mlp = GeluMLP(config.d_model, config.d_mlp)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        normed_BTD = self.input_layernorm(x_BTD)
        return x_BTD + self.self_attn(normed_BTD, rope, attend) + self.mlp(normed_BTD)


class PhiModel(Decoder):
    """Parallel decoder with a language-model head: ids [B, T] in, logits [B, T, V] out."""

    config: PhiConfig

    def __init__(self, config: PhiConfig) -> None:
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        super().__init__(config, blocks, norm, head_bias=True)


# --- Hugging Face configuration -----------------------------------------------------------------


# fmt: off
KEYS = frozenset({
    "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "partial_rotary_factor", "qk_layernorm", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "vocab_size",
})
# fmt: on
"""Keys of `config.json`."""


def to_hf_config(config: PhiConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model."""
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_context,
        "partial_rotary_factor": config.partial_rotary,
        "rope_theta": config.rope_theta,
        "rope_parameters": write_rope(config, partial=True),
        "layer_norm_eps": config.norm_eps,
        "qk_layernorm": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "gelu_new",
        "dtype": "bfloat16",
    }


def from_hf_config(values: dict[str, Any]) -> PhiConfig:
    """Read the `config.json` of a Phi-1, 1.5 or 2; ConfigError for a feature we do not run."""
    if values.get("qk_layernorm"):
        raise ConfigError(
            "the checkpoint says qk_layernorm: true; no published Phi normalises queries and keys",
            fix="use a checkpoint with qk_layernorm: false",
        )
    check_activation(values, "gelu_new")
    rope = read_rope(values, partial=0.5)
    return PhiConfig(
        **read_sizes(values, rope),
        partial_rotary=rope.partial,
        norm_eps=values.get("layer_norm_eps", 1e-5),
    )


# --- Key map ------------------------------------------------------------------------------------

_NAMES = {
    "self_attn.o_proj": "self_attn.dense",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "model.norm": "model.final_layernorm",
}
"""Our module names and those of the checkpoint."""


def checkpoint_parts(config: PhiConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`."""
    if ".qkv_proj." in key:
        return qkv_parts(config, key)
    return [(renamed(key, _NAMES), None)]
