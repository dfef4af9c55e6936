"""Where GGUF and Hugging Face differ on a dense model: names, order of rows, configuration.

Two architectures of llama.cpp are known. "llama" keeps q, k, v and gate, up apart and rotates
channel pairs (2i, 2i + 1), Hugging Face (i, i + H/2): its converter permutes the rows of q and k.
"phi3" is our fused layout unchanged; its `ffn_up` is gate and up, gate first. There LongRoPE's
factors are two tensors of the file, and its factor on cos and sin is stored, not derived.

Source: llama.cpp, `conversion/llama.py`, `conversion/phi.py`, `src/models/phi3.cpp`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.models.dense import DenseConfig
from phikit.nn.rope import LongRope, attention_factor
from phikit.weights.build import EMBEDDING, HEAD
from phikit.weights.gguf_header import damaged

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_SHARED = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAMES = {
    "llama": _SHARED
    | {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
    },
    "phi3": _SHARED | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}


class Factors(NamedTuple):
    """LongRoPE's factors as they lie in a file."""

    short: Sequence[float]
    long: Sequence[float]


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name for a GGUF tensor; names unknown here stay, to be reported as such."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    blocks = _BLOCK_NAMES.get(architecture, {})
    if found and found[2] in blocks:
        return f"model.layers.{found[1]}.{blocks[found[2]]}.weight"
    return _NAMES.get(name, name)


def gguf_name(name: str, architecture: str) -> str:
    """The inverse of `hf_name`, for the tensors of a model."""
    for theirs, ours in _NAMES.items():
        if name == ours:
            return theirs
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    assert found is not None, name
    [theirs] = [key for key, ours in _BLOCK_NAMES[architecture].items() if ours == found[2]]
    return f"blk.{found[1]}.{theirs}.weight"


def is_permuted(name: str, architecture: str) -> bool:
    """Whether GGUF orders the rows of this tensor (under Hugging Face's name) otherwise."""
    return architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight"))


def halves_to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (0, H/2, 1, H/2 + 1, ...) of every head: Hugging Face's order to GGUF's."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `halves_to_pairs`, on whole heads."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


# --- Configuration: read ------------------------------------------------------------------------


def read_config(
    metadata: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    factors: Factors | None,
    where: str,
) -> DenseConfig:
    """The architecture that the metadata of a file describe.

    Args:
        metadata: of the file.
        shapes: of its tensors, under Hugging Face's names.
        factors: LongRoPE's, if the file has them.
        where: the file, for messages.

    Raises:
        WeightsError: it is of another architecture, needs what we do not run, or is damaged.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _BLOCK_NAMES:
        raise WeightsError(
            f"{where} is of the architecture {architecture!r}; known are 'llama' and 'phi3'",
            fix="use the safetensors files of this model",
        )
    keys = _Keys(metadata, architecture, where)
    scaling = str(metadata.get(f"{architecture}.rope.scaling.type", "none"))
    if scaling != "none" and not (scaling == "longrope" and architecture == "phi3"):
        raise WeightsError(f"{where} scales its rotary positions ({scaling}), unknown here")
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", width // heads)
    rotary_dim = keys.whole("rope.dimension_count", head_dim)
    if head_dim % 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise damaged(where, f"it rotates {rotary_dim} of {head_dim} channels")
    if architecture == "llama" and rotary_dim != head_dim:
        raise WeightsError(f"{where} rotates a part of each head, unknown in 'llama'")
    context = keys.whole("context_length")
    try:
        config = DenseConfig(
            layout="phi3" if architecture == "phi3" else "llama",
            vocab_size=shapes.get(EMBEDDING, (0,))[0],
            d_model=width,
            num_layers=keys.whole("block_count"),
            num_heads=heads,
            num_kv_heads=keys.whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            d_mlp=keys.whole("feed_forward_length"),
            max_context=context,
            rope_theta=keys.real("rope.freq_base", 10_000.0),
            partial_rotary=rotary_dim / head_dim,
            longrope=factors
            and LongRope(
                short_factor=tuple(map(_shortest, factors.short)),
                long_factor=tuple(map(_shortest, factors.long)),
                original_context=keys.whole("rope.scaling.original_context_length", least=2),
            ),
            # llama.cpp's converter writes 0 for Phi-4, which has no window.
            sliding_window=keys.whole("attention.sliding_window", 0, least=0) or None,
            norm_eps=keys.real("attention.layer_norm_rms_epsilon", 1e-5),
            tie_embeddings=HEAD not in shapes,
        )
    except ValidationError as error:
        raise damaged(where, f"its metadata describe no model: {error}") from error
    _check_attention_factor(config, keys)
    return config


def _check_attention_factor(config: DenseConfig, keys: "_Keys") -> None:
    ours = attention_factor(config.longrope, config.max_context)
    theirs = keys.real("rope.scaling.attn_factor", ours)
    if abs(theirs - ours) > 1e-4:
        raise WeightsError(
            f"{keys.where} scales its rotary tables by {theirs:.6g}, LongRoPE says {ours:.6g}",
            fix="use the safetensors files of this model",
        )


class _Keys(NamedTuple):
    """Numbers in the metadata of one architecture."""

    metadata: Mapping[str, Any]
    architecture: str
    where: str

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or value < least:
            raise damaged(self.where, f"{self.architecture}.{key} is {value!r}")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not float:
            raise damaged(self.where, f"{self.architecture}.{key} is {value!r}")
        return _shortest(value)


def _shortest(value: float) -> float:
    """The shortest decimal of a number kept in float32: 1e-5 for 9.9999997e-06, as before."""
    return float(str(np.float32(value)))


# --- Configuration: write -----------------------------------------------------------------------


def check_writable(config: DenseConfig) -> None:
    """Raise WeightsError for a model that llama.cpp would not run as it is."""
    faults = []
    if config.layout == "llama":
        if config.partial_rotary != 1:
            faults.append(f"partial_rotary {config.partial_rotary}")
        if config.longrope is not None:
            faults.append("LongRoPE")
        if config.sliding_window is not None:
            faults.append(f"sliding_window {config.sliding_window}")
    else:
        if config.num_heads * config.head_dim != config.d_model:
            faults.append(f"{config.num_heads} heads of {config.head_dim} for {config.d_model}")
        if config.longrope is not None and config.longrope.short_mscale is not None:
            faults.append("LongRoPE with mscale")
    if faults:
        raise WeightsError(
            f"llama.cpp does not run a {config.layout!r} model with {' and '.join(faults)}",
            fix="save it in Hugging Face's layout",
        )


def write_config(config: DenseConfig, writer: Any) -> None:
    """Describe the architecture to a `gguf.GGUFWriter`."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.layout == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        original = config.longrope.original_context if config.longrope else config.max_context
        writer.add_rope_scaling_orig_ctx_len(original)
        if config.longrope is not None:
            factor = attention_factor(config.longrope, config.max_context)
            writer.add_rope_scaling_attn_factors(factor)
