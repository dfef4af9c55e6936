"""The mixture-of-experts family against transformers, and where transformers is wrong."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tests.parity.both_sides import backward, random_tokens
from torch import Tensor

from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.moe import MoEModel, checkpoint_parts
from phikit.models.registry import config_from_hf
from phikit.weights.build import build_model
from phikit.weights.load import Loaded
from phikit.weights.safetensors_files import open_folder
from phikit.weights.save import checkpoint_tensors, save

transformers = pytest.importorskip("transformers", reason="the reference of these tests")

ORIGINAL = 96
"""Context before extension, in tokens."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
    "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": ORIGINAL,
}
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "max_position_embeddings": 256,
    "attention_bias": True,
    "lm_head_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
# At the published 0.01 nearly all gates are 1 and the routers learn nothing, so most variants
# widen the threshold.
VARIANTS: dict[str, dict[str, Any]] = {
    "published threshold": {},
    "wide threshold": {"router_jitter_noise": 0.3},
    "all experts are candidates, head width of its own": {
        "router_jitter_noise": 50.0,
        "head_dim": 20,
    },
    "sliding window, tied": {
        "router_jitter_noise": 0.3,
        "sliding_window": 7,
        "tie_word_embeddings": True,
    },
    "no biases, expert rows of uneven bytes": {
        "router_jitter_noise": 0.3,
        "attention_bias": False,
        "lm_head_bias": False,
        "intermediate_size": 30,
    },
    "longrope": {"router_jitter_noise": 0.3, "rope_parameters": LONGROPE},
}


class Pair(NamedTuple):
    ours: MoEModel
    theirs: Any
    folder: Path
    """What transformers saved and we loaded."""


def reference(changes: dict[str, Any]) -> Any:
    """A random model of transformers, biases included, whose next tokens differ clearly."""
    config = transformers.PhimoeConfig(**TINY | changes, attn_implementation="eager")
    config._experts_implementation = "eager"
    model = transformers.PhimoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") or "layernorm.weight" in name else 0.0
        parameter.data.normal_(centre, 0.15, generator=generator)
    return model


def read(folder: Path) -> MoEModel:
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    with open_folder(folder) as source:
        model = build_model(config, source, dtype=None)
    assert isinstance(model, MoEModel)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory) -> Pair:
    theirs = reference(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return Pair(read(folder), theirs, folder)


@torch.no_grad()
def test_logits(pair: Pair):
    tokens = random_tokens(3, 40)
    torch.testing.assert_close(pair.ours(tokens), pair.theirs(tokens).logits, atol=1e-5, rtol=0)


def test_gradients(pair: Pair):
    backward(pair.ours, pair.theirs)
    theirs = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    compared = set()
    for name, gradient in gradients_under_their_names(pair.ours):
        expected = theirs[name]
        assert expected is not None
        if expected.count_nonzero() == 0:  # a router whose tokens all have one candidate
            assert gradient.count_nonzero() == 0
        else:
            distance = (gradient - expected).norm() / expected.norm()
            assert distance <= 1e-4, (name, float(distance))
        compared.add(name)
    assert compared == set(theirs)


def gradients_under_their_names(model: MoEModel) -> list[tuple[str, Tensor]]:
    """In memory transformers stacks the experts as we do, but keeps q, k, v apart."""
    found = []
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".mlp." in key:
            stacked = key.removesuffix(".weight") if ".experts." in key else key
            found.append((stacked.replace("router.gate", "router"), parameter.grad))
            continue
        parts = checkpoint_parts(model.config, key)
        sizes = [rows or len(parameter) for _, rows in parts]
        names = [name for name, _ in parts]
        found += zip(names, parameter.grad.split(sizes), strict=True)
    return found


def test_greedy_tokens_cached_and_not(pair: Pair):
    for length in (17, 31):
        prompt = random_tokens(length).tolist()
        request = Request(prompt, max_new_tokens=64, temperature=0.0)
        [[completion]] = Engine(pair.ours).generate([request])
        with torch.no_grad():
            expected = pair.theirs.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False
            )
            uncached = pair.ours(expected)[0, length - 1 : -1].argmax(-1)
        assert completion.tokens == expected[0, length:].tolist() == uncached.tolist()


def test_key_map_both_ways(pair: Pair):
    """The checkpoint's names are those of the published files, and nothing is lost or changed."""
    stored = load_file(pair.folder / "model.safetensors")
    written = checkpoint_tensors(pair.ours, dtype=torch.float32)
    assert "model.layers.1.block_sparse_moe.experts.4.w3.weight" in stored
    assert set(written) == set(stored)
    assert all(torch.equal(written[name], stored[name]) for name in stored)


@torch.no_grad()
def test_our_folder_loads_in_transformers(pair: Pair, nano_tokenizer, tmp_path: Path):
    loaded = Loaded(pair.ours, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    save(tmp_path, loaded)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    tokens = random_tokens(2, 24)
    expected = pair.theirs(tokens).logits
    torch.testing.assert_close(theirs.eval()(tokens).logits, expected, atol=0, rtol=0)
    assert read(tmp_path).config == pair.ours.config


@torch.no_grad()
def test_generation_across_the_switch(tmp_path: Path):
    """From the 97th token on, all positions turn by the long factors, cached ones too."""
    reference({"router_jitter_noise": 0.3, "rope_parameters": LONGROPE}).save_pretrained(tmp_path)
    ours, prompt = read(tmp_path), random_tokens(ORIGINAL - 4).tolist()
    [[completion]] = Engine(ours).generate([Request(prompt, max_new_tokens=12, temperature=0.0)])
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(ours(torch.tensor([tokens]))[0, -1].argmax()))
    assert completion.tokens == tokens[len(prompt) :]


# --- Where the reference is wrong ---------------------------------------------------------------


@torch.no_grad()
def test_long_factors(tmp_path: Path):
    """Beyond the original context the long factors apply; transformers keeps the short ones.

    The released code asks `rope_init_fn` for the frequencies of the sequence's length. That of
    transformers 5.23 asks without a length, which means the short factors for ever; it switches
    the mscale alone. Three proofs that this and nothing else is the difference: with the length
    handed over, transformers agrees with us; with the long factors replaced by the short ones, we
    agree with transformers; and the angles are those of the definition.
    """
    theirs = reference({"router_jitter_noise": 0.3, "rope_parameters": LONGROPE})
    theirs.save_pretrained(tmp_path)
    ours, tokens = read(tmp_path), random_tokens(1, ORIGINAL + 30)
    within = tokens[:, :ORIGINAL]
    torch.testing.assert_close(ours(within), theirs(within).logits, atol=1e-5, rtol=0)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 0.1

    longrope = ours.config.longrope
    assert longrope is not None
    shortened = longrope.model_copy(update={"long_factor": longrope.short_factor})
    copied = read(tmp_path)
    copied.config = ours.config.model_copy(update={"longrope": shortened})
    torch.testing.assert_close(copied(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

    rotary = theirs.model.rotary_emb
    without_length = rotary.rope_init_fn
    rotary.rope_init_fn = lambda config: without_length(config, seq_len=tokens.shape[1])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)

    position = torch.tensor([[ORIGINAL]])
    cos, _ = rotary(torch.zeros(1), position)
    angles = ORIGINAL / (torch.tensor(longrope.long_factor) * 10_000 ** (torch.arange(6) / 6))
    torch.testing.assert_close(cos[0, 0, :6], 1.3 * angles.cos(), atol=1e-5, rtol=0)
