"""What the `config.json` files of Hugging Face have in common across families."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from phikit.base.errors import ConfigError
from phikit.models.decoder import DecoderConfig
from phikit.nn.rope import LongRope

# fmt: off
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "attn_implementation", "_attn_implementation", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "initializer_range", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache", "use_return_dict", "attention_dropout", "attn_pdrop",
    "embd_pdrop", "hidden_dropout", "resid_pdrop",
})
# fmt: on
"""Keys that change no number of an evaluated model. Dropout is not part of phikit's training."""


class Rope(NamedTuple):
    """The rotary part of a config."""

    theta: float
    partial: float
    longrope: LongRope | None


def check_keys(values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError, naming the nearest known key, if a key is set that we would not obey."""
    known = {*known, *WITHOUT_EFFECT}
    unknown = [key for key, value in values.items() if key not in known and value is not None]
    if unknown:
        lines = []
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; nearest is {near[0]}" if near else ""
            lines.append(f"\n  {key} = {values[key]!r}{hint}")
        raise ConfigError(
            f"config.json of a {values['model_type']!r} model has keys unknown here:"
            + "".join(lines),
            fix="remove them if they change nothing; otherwise this checkpoint needs more than "
            "phikit knows",
        )


def check_activation(values: Mapping[str, Any], known: str) -> None:
    """Raise ConfigError if the feed-forward block is not of the family's kind."""
    if values.get("hidden_act", known) != known:
        raise ConfigError(f"hidden_act is {values['hidden_act']!r}; only {known!r} is known here")


def read_sizes(values: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    """The fields of a config that stand under the same keys in most families."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return {
        "vocab_size": values["vocab_size"],
        "d_model": width,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or width // heads,
        "d_mlp": values["intermediate_size"],
        "max_context": values["max_position_embeddings"],
        "rope_theta": rope.theta,
        "longrope": rope.longrope,
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "init_std": values.get("initializer_range", 0.02),
    }


def read_rope(values: Mapping[str, Any], *, partial: float = 1.0) -> Rope:
    """RoPE under the names of transformers 4 (`rope_scaling`) and 5 (`rope_parameters`).

    `partial` is what an absent `partial_rotary_factor` means in the family.
    """
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
            short_mscale=rope.get("short_mscale"),
            long_mscale=rope.get("long_mscale"),
        )
    return Rope(
        theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        partial=values.get("partial_rotary_factor", rope.get("partial_rotary_factor", partial)),
        longrope=longrope,
    )


def write_rope(config: DecoderConfig, *, partial: bool) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; `partial` where the family knows partial rotation."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if partial:
        rope["partial_rotary_factor"] = config.partial_rotary
    if config.longrope is not None:
        rope["rope_type"] = "longrope"
        rope["short_factor"] = list(config.longrope.short_factor)
        rope["long_factor"] = list(config.longrope.long_factor)
        rope["original_max_position_embeddings"] = config.longrope.original_context
        mscales = config.longrope.model_dump(include={"short_mscale", "long_mscale"})
        rope |= {name: value for name, value in mscales.items() if value is not None}
    return rope


def renamed(key: str, names: Mapping[str, str]) -> str:
    """A parameter's key with its module under the checkpoint's name; `names`: ours to theirs."""
    module, _, leaf = key.rpartition(".")
    for ours, theirs in names.items():
        if module.endswith(ours):
            return f"{module.removesuffix(ours)}{theirs}.{leaf}"
    return key


def qkv_parts(config: DecoderConfig, key: str) -> list[tuple[str, int | None]]:
    """Our fused queries, keys and values as the three tensors that most checkpoints keep."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    return [
        (key.replace("qkv_proj", f"{name}_proj"), count * config.head_dim)
        for name, count in heads.items()
    ]
