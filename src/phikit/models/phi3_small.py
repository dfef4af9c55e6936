"""Phi-3-small: block-sparse attention, width-independent scales (muP), clamped GEGLU.

Pre-norm blocks with LayerNorm and a bias in every linear but the head. What is unusual:

- q, k and v lie in one matrix group by group: the queries of a key head, that key, that value.
- All layers but every second see keys in blocks (`nn.attention.BlockSparse`).
- muP (arXiv 2203.03466): embeddings times 10, scores over head_dim and not its root, logits over 8.
- Tokens that the tokenizer never makes have logits of -inf.

There is no `transformers` implementation. Sources: Phi-3 (arXiv 2404.14219); Microsoft's
`modeling_phi3_small.py`, `configuration_phi3_small.py` and `tokenization_phi3_small.py` beside the
weights; vLLM, `vllm/model_executor/models/phi3_small.py` at commit 00db011 (which leaves out the
clamp that the original applies).
"""

from typing import Any, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.errors import ConfigError
from phikit.models.decoder import Decoder, DecoderConfig, Walk
from phikit.models.hf import check_activation, read_rope, renamed
from phikit.nn.attention import Attend, BlockSparse, SelfAttention
from phikit.nn.mlp import ClampedGEGLU
from phikit.nn.rope import RopeTables, rotate


class Phi3SmallConfig(DecoderConfig):
    """Architecture of a Phi-3-small."""

    d_mlp: PositiveInt
    gegelu_limit: PositiveFloat = 20.0
    pattern: BlockSparse = BlockSparse(block=64, local_blocks=16, vertical_stride=8)
    dense_every: PositiveInt | None = 2
    """Of so many layers the last one sees all keys; None: no layer does."""
    embedding_multiplier: PositiveFloat = 10.0
    attention_multiplier: PositiveFloat | None = 1.0
    """Scores are q k^T times this over head_dim; None: over the root of head_dim, as elsewhere."""
    width_multiplier: PositiveFloat = 8.0
    """Logits are divided by this."""
    dummy_tokens: tuple[int, ...] = ()
    """Ids that are never predicted."""

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by ahead of the usual 1 / sqrt(head_dim)."""
        multiplier = self.attention_multiplier
        return 1.0 if multiplier is None else multiplier / self.head_dim**0.5

    @model_validator(mode="after")
    def _is_phi3_small(self) -> Self:
        whole_heads = (self.num_heads * self.head_dim, self.partial_rotary)
        if whole_heads != (self.d_model, 1.0) or self.sliding_window is not None:
            raise ValueError(
                "Phi-3-small has heads of d_model / num_heads channels, all of them rotated, and "
                "no sliding window"
            )
        beyond = [id_ for id_ in self.dummy_tokens if not 0 <= id_ < self.vocab_size]
        if beyond:
            raise ValueError(f"dummy_tokens {beyond} lie outside the {self.vocab_size} tokens")
        return self


class GroupedAttention(SelfAttention):
    """Attention whose fused matrix holds, for each key head: its queries, the key, the value."""

    def __init__(self, config: Phi3SmallConfig, layer: int) -> None:
        super().__init__(config.attention, layer, bias=True)
        is_dense = config.dense_every is not None and (layer + 1) % config.dense_every == 0
        self.pattern = None if is_dense else config.pattern
        self.query_scale = config.query_scale

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        num_heads, num_kv_heads, _ = self.heads
        sizes = [num_heads // num_kv_heads, 1, 1]
        groups = self.qkv_proj(x_BTD).unflatten(-1, (num_kv_heads, sum(sizes), self.head_dim))
        q_BTNH, k_BTKH, v_BTKH = (part.flatten(2, 3) for part in groups.split(sizes, dim=3))
        attended_BTNH = attend(
            rotate(q_BTNH, rope) * self.query_scale,
            rotate(k_BTKH, rope),
            v_BTKH,
            layer=self.layer,
            pattern=self.pattern,
        )
        return self.o_proj(attended_BTNH.flatten(2))


class Block(nn.Module):
    def __init__(self, config: Phi3SmallConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = GroupedAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = ClampedGEGLU(config.d_model, config.d_mlp, limit=config.gegelu_limit)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Phi3SmallModel(Decoder):
    """Phi-3-small with its language-model head: ids [B, T] in, logits [B, T, V] out.

    Hidden states come divided by the width multiplier, so that head and losses are the usual ones.
    """

    config: Phi3SmallConfig

    def __init__(self, config: Phi3SmallConfig) -> None:
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        super().__init__(config, blocks, nn.LayerNorm(config.d_model, eps=config.norm_eps))

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        return super().embed_text(tokens_BT) * self.config.embedding_multiplier

    def run_blocks(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor | None = None,
        ends_B: Tensor | None = None,
        attend: Attend | None = None,
        walk: Walk | None = None,
    ) -> Tensor:
        hidden_BTD = super().run_blocks(
            x_BTD, positions_BT=positions_BT, ends_B=ends_B, attend=attend, walk=walk
        )
        return hidden_BTD / self.config.width_multiplier

    @property
    def logit_bias(self) -> Tensor:
        dummies = torch.tensor(self.config.dummy_tokens, dtype=torch.long, device=self.device)
        bias_V = torch.zeros(self.config.vocab_size, dtype=self.dtype, device=self.device)
        return bias_V.index_fill(0, dummies, float("-inf"))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        return super().logits(hidden_BTD) + self.logit_bias


# --- Hugging Face configuration -----------------------------------------------------------------


# fmt: off
KEYS = frozenset({
    "blocksparse_block_size", "blocksparse_homo_head_pattern", "blocksparse_num_local_blocks",
    "blocksparse_vert_stride", "dense_attention_every_n_layers", "dummy_token_indices",
    "ff_dim_multiplier", "ff_intermediate_size", "gegelu_limit", "hidden_act", "hidden_size",
    "intermediate_size", "layer_norm_epsilon", "max_position_embeddings", "mup_attn_multiplier",
    "mup_embedding_multiplier", "mup_use_scaling", "mup_width_multiplier", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "rope_embedding_base", "rope_position_scale", "rope_scaling", "tie_word_embeddings",
    "vocab_size",
    "attention_bias", "attention_dropout_prob", "blocksparse_triton_kernel_block_size",
    "embedding_dropout_prob", "ffn_dropout_prob", "gegelu_pad_to_256",
    "pad_sequence_to_multiple_of_64", "reorder_and_upcast_attn",
})
# fmt: on
"""Keys of `config.json`. Those from `attention_bias` on are in official files without effect."""

_SPECIAL_TOKENS = {100257, 100261, 100262, 100263, 100266}
"""`<|endoftext|>`, `<|system|>`, `<|user|>`, `<|assistant|>`, `<|end|>`."""
DUMMY_TOKENS = tuple(id_ for id_ in range(100256, 100352) if id_ not in _SPECIAL_TOKENS)
"""The dummy tokens of the official tokenizer, which its `config.json` does not list."""


def to_hf_config(config: Phi3SmallConfig) -> dict[str, Any]:
    """The `config.json` that Microsoft's code and vLLM read."""
    pattern, is_mup = config.pattern, config.attention_multiplier is not None
    values = {
        "architectures": ["Phi3SmallForCausalLM"],
        "model_type": "phi3small",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "ff_intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_context,
        "rope_embedding_base": config.rope_theta,
        "rope_position_scale": 1.0,
        "hidden_act": "gegelu",
        "gegelu_limit": config.gegelu_limit,
        "blocksparse_block_size": pattern.block,
        "blocksparse_triton_kernel_block_size": pattern.block,
        "blocksparse_num_local_blocks": pattern.local_blocks,
        "blocksparse_vert_stride": pattern.vertical_stride,
        "blocksparse_homo_head_pattern": pattern.same_for_all_heads,
        "dense_attention_every_n_layers": config.dense_every,
        "mup_use_scaling": is_mup,
        "mup_attn_multiplier": config.attention_multiplier if is_mup else 1.0,
        "mup_embedding_multiplier": config.embedding_multiplier,
        "mup_width_multiplier": config.width_multiplier,
        "dummy_token_indices": list(config.dummy_tokens),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "bfloat16",
    }
    if config.longrope is not None:
        factors = config.longrope.model_dump(exclude={"original_context"}, exclude_none=True)
        values["rope_scaling"] = {"type": "su", **factors}
        values["original_max_position_embeddings"] = config.longrope.original_context
    return values


def from_hf_config(values: dict[str, Any]) -> Phi3SmallConfig:
    """Read the `config.json` of a Phi-3-small; ConfigError for a feature we do not run."""
    check_activation(values, "gegelu")
    if values.get("rope_position_scale", 1.0) != 1.0:
        raise ConfigError(
            f"rope_position_scale is {values['rope_position_scale']}; published models have 1.0"
        )
    if values.get("ff_dim_multiplier") is not None:
        raise ConfigError("ff_dim_multiplier is set", fix="give ff_intermediate_size in its place")
    heads, width, vocab_size = (
        values[name] for name in ("num_attention_heads", "hidden_size", "vocab_size")
    )
    dummies = values.get("dummy_token_indices")
    is_mup = values.get("mup_use_scaling", True)
    return Phi3SmallConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"],
        head_dim=width // heads,
        d_mlp=values.get("ff_intermediate_size") or values["intermediate_size"],
        gegelu_limit=values["gegelu_limit"],
        pattern=BlockSparse(
            block=values["blocksparse_block_size"],
            local_blocks=values["blocksparse_num_local_blocks"],
            vertical_stride=values["blocksparse_vert_stride"],
            same_for_all_heads=values.get("blocksparse_homo_head_pattern", False),
        ),
        dense_every=values.get("dense_attention_every_n_layers", 2) or None,
        embedding_multiplier=values.get("mup_embedding_multiplier", 10.0) or 1.0,
        attention_multiplier=values.get("mup_attn_multiplier", 1.0) if is_mup else None,
        width_multiplier=values.get("mup_width_multiplier", 8.0) or 1.0,
        dummy_tokens=tuple(id_ for id_ in DUMMY_TOKENS if id_ < vocab_size)
        if dummies is None
        else tuple(dummies),
        max_context=values["max_position_embeddings"],
        rope_theta=values["rope_embedding_base"],
        longrope=read_rope(values).longrope,
        norm_eps=values["layer_norm_epsilon"],
        tie_embeddings=values.get("tie_word_embeddings", True),
        init_std=values.get("initializer_range", 0.02),
    )


# --- Key map ------------------------------------------------------------------------------------

_NAMES = {
    "self_attn.qkv_proj": "self_attn.query_key_value",
    "self_attn.o_proj": "self_attn.dense",
    "model.norm": "model.final_layernorm",
}
"""Our module names and those of the checkpoint."""


def checkpoint_parts(config: Phi3SmallConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`."""
    return [(renamed(key, _NAMES), None)]
