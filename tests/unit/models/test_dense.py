"""The dense family: shapes, initialisation, configs in and out, the key map."""

import pytest
import torch

from phikit.base.errors import ConfigError
from phikit.models.dense import (
    DenseConfig,
    DenseModel,
    checkpoint_parts,
    from_hf_config,
    to_hf_config,
)
from phikit.models.registry import config_from_hf, parameter_count

PHI4_MINI = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "rms_norm_eps": 1e-05,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": 0.02,
}


def test_phi4_mini():
    config = from_hf_config(PHI4_MINI)
    assert (config.head_dim, config.rotary_dim) == (128, 96)
    assert config.longrope is not None and config.longrope.original_context == 4096
    assert parameter_count(config) == 3_836_021_760


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "sliding_window": 9},
        {"layout": "llama", "partial_rotary": 1.0},
        {"longrope": {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_context": 8}},
    ],
)
def test_hf_config_round_trip(tiny_model, changes):
    config: DenseConfig = tiny_model(**changes).config
    assert from_hf_config(to_hf_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; known are .*llama"),
        ({"attention_bais": True}, "attention_bais = True; nearest is attention_bias"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
    ],
)
def test_what_we_do_not_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(PHI4_MINI | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "num_heads 24 is no multiple of num_kv_heads 5"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"partial_rotary_factor": 0.01}, "odd"),
        ({"partial_rotary_factor": 0.5}, r"factors have \[48\] entries"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(PHI4_MINI | changes)


def test_older_configs():
    renamed = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    assert from_hf_config(PHI4_MINI | {"rope_scaling": renamed}) == from_hf_config(PHI4_MINI)
    without = {k: v for k, v in PHI4_MINI.items() if k != "num_key_value_heads"}
    assert from_hf_config(without).num_kv_heads == 24


def test_key_map(tiny_model):
    phi3: DenseModel = tiny_model()
    for key in phi3.state_dict():
        assert checkpoint_parts(phi3.config, key) == [(key, None)]
    llama: DenseModel = tiny_model(layout="llama")
    attention = "model.layers.1.self_attn"
    assert checkpoint_parts(llama.config, f"{attention}.qkv_proj.weight") == [
        (f"{attention}.q_proj.weight", 64),
        (f"{attention}.k_proj.weight", 32),
        (f"{attention}.v_proj.weight", 32),
    ]
    assert checkpoint_parts(llama.config, "model.layers.0.mlp.gate_up_proj.weight") == [
        ("model.layers.0.mlp.gate_proj.weight", 64),
        ("model.layers.0.mlp.up_proj.weight", 64),
    ]
    assert checkpoint_parts(llama.config, f"{attention}.o_proj.weight")[0][1] is None


def test_initialisation(tiny_model):
    a, b, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    for x, y, z in zip(a.parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x.ndim == 1 or not torch.equal(x, z)
    assert spread(a, "model.embed_tokens.weight") == pytest.approx(0.12, rel=0.05)
    residual = spread(a, "model.layers.0.mlp.down_proj.weight")
    assert residual == pytest.approx(0.12 / 4**0.5, rel=0.05)


def spread(model: DenseModel, name: str) -> float:
    return float(model.get_parameter(name).detach().std())


def test_forward_is_the_head_on_hidden(tiny_model):
    model: DenseModel = tiny_model(tie_embeddings=False)
    tokens = torch.arange(12).view(2, 6)
    logits = model(tokens)
    assert logits.shape == (2, 6, 300)
    positions = torch.arange(6).expand(2, 6)
    assert torch.equal(logits, model.lm_head(model.hidden(tokens, positions_BT=positions)))
    shifted = model(tokens, positions_BT=positions + 50)
    torch.testing.assert_close(shifted, logits, atol=1e-4, rtol=0)  # distances alone matter
