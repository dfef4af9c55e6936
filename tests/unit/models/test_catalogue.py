"""The catalogue: counts of parameters against published numbers, and against arithmetic."""

import pytest

from phikit.models.catalogue import (
    CHECKPOINTS,
    PHI_3_5_MOE,
    PHI_4_MINI,
    PHI_4_MULTIMODAL,
    Checkpoint,
    find,
)
from phikit.models.decoder import DecoderConfig
from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.models.phi import PhiConfig
from phikit.models.phi3_small import Phi3SmallConfig
from phikit.models.registry import active_parameter_count, parameter_count, parameters_by_part


def checkpoints() -> list:
    return [pytest.param(c, id=c.hub_id.partition("/")[2]) for c in CHECKPOINTS]


def rounded(count: int, published: str) -> str:
    """A count in 10^9 with as many digits as the published number has."""
    return f"{count / 1e9:.{len(published.partition('.')[2])}f}"


@pytest.mark.parametrize("checkpoint", checkpoints())
def test_parameters_are_as_published(checkpoint: Checkpoint):
    total = parameter_count(checkpoint.config)
    if checkpoint.billions is not None:
        assert rounded(total, checkpoint.billions) == checkpoint.billions
    if checkpoint.active_billions is not None:
        active = active_parameter_count(checkpoint.config)
        assert rounded(active, checkpoint.active_billions) == checkpoint.active_billions


@pytest.mark.parametrize("checkpoint", checkpoints())
def test_parameters_add_up(checkpoint: Checkpoint):
    config = checkpoint.config
    total = parameter_count(config)
    assert sum(parameters_by_part(config).values()) == total
    if type(config) in ARITHMETIC:
        assert total == ARITHMETIC[type(config)](config)


@pytest.mark.parametrize("checkpoint", checkpoints())
def test_variants_are_valid_configs(checkpoint: Checkpoint):
    config = checkpoint.config
    assert type(config).resolve(config.model_dump()) == config
    longrope = config.longrope
    if longrope is not None:
        assert checkpoint.original_context in (None, longrope.original_context)


def attention(c: DecoderConfig, *, bias: bool) -> int:
    """q, k, v and the output projection of one layer."""
    fused = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    biases = fused + c.d_model if bias else 0
    return c.d_model * fused + c.num_heads * c.head_dim * c.d_model + biases


def vocabulary(c: DecoderConfig) -> int:
    return c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)


def dense(c: DenseConfig) -> int:
    layer = attention(c, bias=False) + 3 * c.d_model * c.d_mlp + 2 * c.d_model
    return vocabulary(c) + c.num_layers * layer + c.d_model


def phi(c: PhiConfig) -> int:
    mlp = 2 * c.d_model * c.d_mlp + c.d_mlp + c.d_model
    layer = attention(c, bias=True) + mlp + 2 * c.d_model
    return vocabulary(c) + c.vocab_size + c.num_layers * layer + 2 * c.d_model


def moe(c: MoEConfig) -> int:
    experts = c.num_experts * (3 * c.d_model * c.d_mlp + c.d_model)
    layer = attention(c, bias=True) + experts + 4 * c.d_model
    return vocabulary(c) + c.vocab_size + c.num_layers * layer + 2 * c.d_model


def phi3_small(c: Phi3SmallConfig) -> int:
    mlp = 3 * c.d_model * c.d_mlp + 2 * c.d_mlp + c.d_model
    layer = attention(c, bias=True) + mlp + 4 * c.d_model
    return vocabulary(c) + c.num_layers * layer + 2 * c.d_model


ARITHMETIC = {DenseConfig: dense, PhiConfig: phi, MoEConfig: moe, Phi3SmallConfig: phi3_small}


def test_numbers_known_to_the_last_digit():
    assert parameter_count(PHI_4_MINI) == 3_836_021_760
    assert parameter_count(PHI_3_5_MOE) == 41_873_153_344


def test_parts_of_phi_4_multimodal():
    """Vision, speech and the two adapters, in millions, as the report gives them or rounds them."""
    parts = parameters_by_part(PHI_4_MULTIMODAL)
    millions = {name: round(count / 1e6, 1) for name, count in parts.items()}
    assert millions["image_embed"] == 441.6
    assert millions["vision adapter"] == 369.1
    assert millions["speech adapter"] == 461.4
    assert millions["audio_embed"] == pytest.approx(441.2 + 25.2, abs=0.11)


def test_names_are_found_with_and_without_their_owner():
    for name in ("microsoft/Phi-4-mini-instruct", "phi-4-mini-instruct", "PHI-4-MINI-INSTRUCT"):
        found = find(name)
        assert found is not None and found.config is PHI_4_MINI
    assert find("phi-5") is None
    ids = [checkpoint.hub_id for checkpoint in CHECKPOINTS]
    assert len(set(ids)) == len(ids)
