"""The mixture-of-experts family: published configs, what is refused, names of the key map."""

from typing import Any

import pytest
import torch

from phikit.base.errors import ConfigError
from phikit.models.moe import MoEConfig, MoEModel, checkpoint_parts, from_hf_config, to_hf_config
from phikit.models.registry import active_parameter_count, config_from_hf, parameter_count
from phikit.nn.moe.router import SparseMixerConfig

GRIN: dict[str, Any] = {
    "architectures": ["GRIN-MoE"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 4096,
    "model_type": "grinmoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
MSCALE = 1.243163121016122
PHI_35_MOE = GRIN | {
    "model_type": "phimoe",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 131072,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "short_mscale": MSCALE,
        "long_mscale": MSCALE,
        "original_max_position_embeddings": 4096,
    },
}
SLIM = GRIN | {"model_type": "phimoe", "rope_scaling": None, "expert_dropout": 0.0, "head_dim": 128}
PHI_MINI_MOE = SLIM | {"intermediate_size": 960}
PHI_TINY_MOE = SLIM | {
    "intermediate_size": 448,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
SCALING = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
SCALING |= {"original_max_position_embeddings": 4096}
TINY = {"vocab_size": 300, "d_model": 48, "num_layers": 2, "d_mlp": 32, "max_context": 128}
TINY |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "num_experts": 3}
NEAR = {"kind": "sparsemixer", "jitter_eps": 0.2}
LONGROPE_HALF = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "original_context": 8}
LONGROPE = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_context": 8}


@pytest.mark.parametrize(
    ("values", "total", "active"),
    [
        (GRIN, 41_873_153_344, 6_640_999_744),
        (PHI_35_MOE, 41_873_153_344, 6_640_999_744),
        (PHI_MINI_MOE, 7_647_632_704, 2_362_809_664),
        (PHI_TINY_MOE, 3_755_220_288, 1_288_969_536),
    ],
)
def test_published_sizes(values: dict[str, Any], total: int, active: int):
    config = config_from_hf(values)
    assert isinstance(config, MoEConfig)
    assert (config.head_dim, config.num_experts, config.rope_theta) == (128, 16, 10_000)
    assert config.attention_bias and config.head_bias and not config.tie_embeddings
    assert parameter_count(config) == total
    assert active_parameter_count(config) == active


def test_longrope_constants():
    config = config_from_hf(PHI_35_MOE)
    assert config.longrope is not None
    assert (config.longrope.short_mscale, config.longrope.long_mscale) == (MSCALE, MSCALE)
    assert config.longrope.original_context == 4096


def test_absent_keys_mean_what_the_released_code_means():
    optional = {"rope_theta", "attention_bias", "lm_head_bias", "router_jitter_noise"}
    config = from_hf_config({k: v for k, v in GRIN.items() if k not in optional})
    assert (config.rope_theta, config.router) == (1e6, SparseMixerConfig(jitter_eps=0.01))
    assert not config.attention_bias and not config.head_bias


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "sliding_window": 9, "head_dim": 20, "router": NEAR},
        {"attention_bias": False, "head_bias": False},
        {"longrope": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}},
        {"router": NEAR | {"estimator": "heun3", "expert_grad": "paper"}},
        {"router": {"kind": "sigmoid", "scale": 2.5}, "top_k": 3, "d_shared": 24},
        {"router": {"kind": "topk", "normalise": False, "input_jitter": 0.1}, "top_k": 1},
        {"router": NEAR | {"jitter_eps": None}},
        {"router": {"kind": "sparsemixer", "estimator": "v2star"}},
        {"norm": "rms", "partial_rotary": 0.5, "longrope": LONGROPE_HALF},
    ],
)
def test_hf_config_round_trip(changes: dict[str, Any]):
    config = MoEConfig.resolve(TINY | changes)
    assert config_from_hf(to_hf_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"router_jitter_niose": 0.1}, "nearest is router_jitter_noise"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "rotates all"),
        ({"rope_scaling": SCALING}, "short_mscale"),
    ],
)
def test_what_we_do_not_run_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(GRIN | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1}, "num_experts"),
        ({"top_k": 4}, "top_k is 4, of 3 experts"),
        ({"top_k": 1, "router": {"kind": "topk"}}, "teaches the router nothing"),
        ({"router": {"kind": "sparsmixer"}}, "kind"),
        ({"router": NEAR | {"estimator": "heun"}}, "estimator"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        MoEConfig.resolve(TINY | changes)


@pytest.mark.parametrize(
    ("changes", "is_phimoe"),
    [
        ({}, True),
        ({"router": NEAR | {"estimator": "euler"}}, True),
        ({"router": {"kind": "sampled_gate"}}, False),
        ({"router": {"kind": "sparsemixer", "estimator": "v2star"}}, False),
        ({"top_k": 3}, False),
        ({"d_shared": 8}, False),
        ({"norm": "rms"}, False),
        ({"longrope": LONGROPE}, False),
    ],
)
def test_only_what_transformers_computes_bears_its_name(changes: dict[str, Any], is_phimoe: bool):
    values = to_hf_config(MoEConfig.resolve(TINY | changes))
    assert (values["model_type"] == "phimoe") == is_phimoe
    assert (values["architectures"] == ["PhimoeForCausalLM"]) == is_phimoe


def test_key_map():
    config = MoEConfig.resolve(TINY)
    layer, moe = "model.layers.1", "model.layers.1.block_sparse_moe"
    assert checkpoint_parts(config, f"{layer}.self_attn.qkv_proj.bias") == [
        (f"{layer}.self_attn.q_proj.bias", 48),
        (f"{layer}.self_attn.k_proj.bias", 24),
        (f"{layer}.self_attn.v_proj.bias", 24),
    ]
    assert checkpoint_parts(config, f"{layer}.mlp.experts.gate_up_proj.weight") == [
        (f"{moe}.experts.{expert}.{part}.weight", 32)
        for expert in range(3)
        for part in ["w1", "w3"]
    ]
    assert checkpoint_parts(config, f"{layer}.mlp.experts.down_proj.weight") == [
        (f"{moe}.experts.{expert}.w2.weight", 48) for expert in range(3)
    ]
    assert checkpoint_parts(config, f"{layer}.mlp.router.gate.weight") == [
        (f"{moe}.gate.weight", None)
    ]
    for same in (f"{layer}.self_attn.o_proj.bias", f"{layer}.input_layernorm.bias", "lm_head.bias"):
        assert checkpoint_parts(config, same) == [(same, None)]


def test_initialisation():
    model = MoEModel(MoEConfig.resolve(TINY)).initialise(torch.Generator().manual_seed(0))
    layer: Any = model.model.layers[0]
    experts = layer.mlp.experts
    up, down = experts.gate_up_proj.weight.detach(), experts.down_proj.weight.detach()
    assert float(up.std()) == pytest.approx(0.02, rel=0.05)
    assert float(down.std()) == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert not layer.self_attn.qkv_proj.bias.any() and (layer.input_layernorm.weight == 1).all()
    assert model(torch.arange(6)[None]).isfinite().all()
