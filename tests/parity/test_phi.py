"""Phi-1, 1.5 and 2 against transformers: logits, gradients, greedy tokens, files both ways."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.parity.both_sides import assert_same_gradients, random_tokens

from phikit.base.errors import ConfigError, WeightsError
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.phi import PhiConfig, PhiModel
from phikit.models.registry import config_from_hf, config_to_hf, parameter_count
from phikit.weights.load import Loaded, load
from phikit.weights.save import save

transformers = pytest.importorskip("transformers", reason="the reference of these tests")

SIZE = {"vocab_size": 300, "d_model": 64, "num_layers": 2, "d_mlp": 96, "max_context": 128}
HEADS = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "init_std": 0.12}
VARIANTS: dict[str, dict[str, Any]] = {
    "phi-1": {},
    "phi-2, other partial rotation": {"head_dim": 20, "d_model": 80, "partial_rotary": 0.4},
    "grouped queries, tied": {"num_kv_heads": 2, "tie_embeddings": True},
}
PHI_1 = {
    "model_type": "phi",
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
PHI_2 = PHI_1 | {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "resid_pdrop": 0.1,
}


class Pair(NamedTuple):
    ours: PhiModel
    theirs: Any
    folder: Path


def tiny(**changes: Any) -> PhiModel:
    """A small random model; norms and biases are random too, so that each of them counts."""
    generator = torch.Generator().manual_seed(0)
    model = PhiModel(PhiConfig.resolve({**SIZE, **HEADS, **changes})).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, nano_tokenizer, tmp_path_factory) -> Pair:
    """Our model, and what transformers makes of the folder we save it in."""
    model = tiny(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("model")
    save(folder, Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs.generation_config.eos_token_id = None
    return Pair(model, theirs.eval(), folder)


@torch.no_grad()
def test_logits(pair: Pair):
    assert isinstance(pair.theirs, transformers.PhiForCausalLM)
    tokens = random_tokens(3, 40)
    torch.testing.assert_close(pair.ours(tokens), pair.theirs(tokens).logits, atol=1e-5, rtol=0)


def test_gradients(pair: Pair):
    assert_same_gradients(pair.ours, pair.theirs)


def test_greedy_tokens(pair: Pair):
    """64 tokens: with our cache, without it, and by transformers."""
    for length in (20, 31):
        prompt = random_tokens(length).tolist()
        request = Request(prompt, max_new_tokens=64, temperature=0.0)
        [[completion]] = Engine(pair.ours).generate([request])
        whole = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            uncached = pair.ours(whole)[0, length - 1 : -1].argmax(-1).tolist()
            theirs = pair.theirs.generate(whole[:, :length], max_new_tokens=64, do_sample=False)
        assert completion.tokens == uncached
        assert completion.tokens == theirs[0, length:].tolist()


@torch.no_grad()
def test_a_folder_of_transformers_loads_here(pair: Pair, tmp_path: Path):
    pair.theirs.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(pair.folder).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == pair.ours.config
    tokens = random_tokens(2, 24)
    torch.testing.assert_close(loaded.model(tokens), pair.ours(tokens), atol=0, rtol=0)


def test_published_sizes():
    assert parameter_count(config_from_hf(PHI_1)) == 1_418_270_720
    phi_2 = config_from_hf(PHI_2)
    assert (phi_2.head_dim, phi_2.rotary_dim) == (80, 32)
    assert parameter_count(phi_2) == 2_779_683_840


def test_an_absent_share_of_rotation_is_half():
    without = {k: v for k, v in PHI_1.items() if k != "partial_rotary_factor"}
    assert config_from_hf(without) == config_from_hf(PHI_1)
    assert transformers.PhiConfig(**without).rope_parameters["partial_rotary_factor"] == 0.5
    written = config_to_hf(config_from_hf(PHI_2))
    del written["partial_rotary_factor"]  # transformers 5 keeps it in `rope_parameters` alone
    assert config_from_hf(written) == config_from_hf(PHI_2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"hidden_act": "silu"}, "'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"sliding_window": 9}, "sliding_window"),
    ],
)
def test_what_we_do_not_run_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(PHI_1 | changes)


def test_a_missing_bias_is_named(pair: Pair, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for file in pair.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        load(tmp_path)
