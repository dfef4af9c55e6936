"""The dense decoder of the Phi line: Phi-3, Phi-3.5, Phi-4, Phi-4-mini; and the Llama shape.

Pre-norm blocks, grouped-query attention with one fused qkv matrix (rows: all queries, then keys,
then values), rotary positions on the first part of each head, SwiGLU with gate and up fused, no
biases. Parameter names are those of Hugging Face's Phi-3 checkpoints. Llama checkpoints keep q, k,
v and gate, up apart: the key map at the end joins and splits them.

Sources: Phi-4-Mini technical report (arXiv 2503.01743), Phi-3 (2404.14219), Llama (2302.13971).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.base.errors import ConfigError
from phikit.nn.attention import Attend, CausalAttention
from phikit.nn.mlp import SwiGLU
from phikit.nn.norm import RMSNorm
from phikit.nn.rope import LongRope, RopeTables, rope_tables, rotate


class DenseConfig(Config):
    """Architecture of a dense decoder."""

    layout: Literal["phi3", "llama"] = "phi3"
    """Which Hugging Face family the checkpoint belongs to; it changes names, never mathematics."""
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    max_context: int
    """Longest sequence in tokens."""
    rope_theta: float = 10_000.0
    partial_rotary: float = 1.0
    """Share of each head's channels that is rotated; 0.75 in Phi-4-mini."""
    longrope: LongRope | None = None
    sliding_window: int | None = None
    """Keys a query sees, itself included; None sees all."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary)


class Attention(nn.Module):
    def __init__(self, config: DenseConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(config.d_model, sum(self.heads) * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (sum(self.heads), self.head_dim))
        qk, v_BTKH = qkv.split([self.heads[0] + self.heads[1], self.heads[2]], dim=2)
        q_BTNH, k_BTKH = rotate(qk, rope).split(self.heads[:2], dim=2)
        return self.o_proj(attend(q_BTNH, k_BTKH, v_BTKH, layer=self.layer).flatten(2))


class Block(nn.Module):
    def __init__(self, config: DenseConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_mlp)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Trunk(nn.Module):
    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        # Zeros until `initialise` or a checkpoint fills them: torch's own draw, on the meta device,
        # first imports torch's compiler (2 s of every load).
        zeros_VD = torch.zeros(config.vocab_size, config.d_model)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)


class DenseModel(nn.Module):
    """Decoder with a language-model head: token ids [B, T] in, logits [B, T, V] out."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Final normalised hidden states [B, T, D]; by default causal over whole rows."""
        config = self.config
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if attend is None:
            attend = CausalAttention(window=config.sliding_window)
        x_BTD = self.model.embed_tokens(tokens_BT)
        rope = rope_tables(
            positions_BT,
            rotary_dim=config.rotary_dim,
            theta=config.rope_theta,
            longrope=config.longrope,
            max_context=config.max_context,
            dtype=x_BTD.dtype,
        )
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, rope, attend)
        return self.model.norm(x_BTD)

    def forward(self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None) -> Tensor:
        return self.lm_head(self.hidden(tokens_BT, positions_BT=positions_BT))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "DenseModel":
        """Draw all weights: normal(0, init_std), residual outputs scaled by 1/sqrt(2 layers)."""
        config = self.config
        residual_std = config.init_std / (2 * config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if is_residual else config.init_std
                drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)
        return self


def parameter_count(config: DenseConfig) -> int:
    """Number of parameters, counted on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in DenseModel(config).parameters())


# --- Hugging Face configuration -----------------------------------------------------------------


def to_hf_config(config: DenseConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model."""
    phi3 = config.layout == "phi3"
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if phi3:
        rope["partial_rotary_factor"] = config.partial_rotary
    if config.longrope is not None:
        rope["rope_type"] = "longrope"
        rope["short_factor"] = list(config.longrope.short_factor)
        rope["long_factor"] = list(config.longrope.long_factor)
        rope["original_max_position_embeddings"] = config.longrope.original_context
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
        "rope_parameters": rope,
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
    """Read a Phi-3 or Llama `config.json`; ConfigError for a family or a feature we do not run."""
    layout = values.get("model_type")
    if layout not in ("phi3", "llama"):
        raise ConfigError(
            f"model_type is {layout!r}, and the dense family covers 'phi3' and 'llama'",
            fix="point at a Phi-3, Phi-4, Phi-4-mini or Llama-shaped checkpoint",
        )
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ConfigError("the checkpoint has biases, which the dense family does not use")
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {values['hidden_act']!r}; only 'silu' is known here")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "longrope", "su"):
        raise ConfigError(f"rope_type is {kind!r}; known are 'default' and 'longrope'")
    longrope = None
    if kind != "default":
        longrope = LongRope(
            short_factor=tuple(rope["short_factor"]),
            long_factor=tuple(rope["long_factor"]),
            original_context=values.get("original_max_position_embeddings")
            or rope["original_max_position_embeddings"],
        )
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return DenseConfig(
        layout=layout,
        vocab_size=values["vocab_size"],
        d_model=width,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        d_mlp=values["intermediate_size"],
        max_context=values["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        partial_rotary=values.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)),
        longrope=longrope,
        sliding_window=values.get("sliding_window") if layout == "phi3" else None,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        init_std=values.get("initializer_range", 0.02),
    )


# --- Key map ------------------------------------------------------------------------------------

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def checkpoint_parts(config: DenseConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`, in row order: (name, rows).

    Rows is None where one tensor is the whole parameter.
    """
    stem = key.removesuffix(".weight")
    for ours, theirs in _FUSED.items():
        if config.layout == "llama" and stem.endswith(ours):
            if ours == "mlp.gate_up_proj":
                rows = [config.d_mlp] * 2
            else:
                heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
                rows = [n * config.head_dim for n in heads]
            prefix = stem.removesuffix(ours)
            return [(f"{prefix}{name}.weight", n) for name, n in zip(theirs, rows, strict=True)]
    return [(key, None)]
