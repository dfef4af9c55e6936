"""The dense family against transformers: logits, gradients, greedy tokens, files both ways."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.parity.both_sides import assert_same_gradients, random_tokens

from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.dense import DenseModel
from phikit.weights.load import Loaded, load
from phikit.weights.save import save

transformers = pytest.importorskip("transformers", reason="the reference of these tests")

FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
    "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9],
}
# transformers checks the number of factors against d_model / num_heads, not against head_dim, so
# the two agree in the variants with LongRoPE and differ in the others.
VARIANTS: dict[str, dict[str, Any]] = {
    "phi3, grouped queries, partial rotary, tied": {},
    "phi3, untied": {"tie_embeddings": False},
    "phi3, one key head per query head": {"num_kv_heads": 4, "partial_rotary": 1.0},
    "phi3, sliding window": {"sliding_window": 7},
    "phi3, longrope, within the original context": {
        "longrope": {**FACTORS, "original_context": 96},
        "d_model": 64,
    },
    "phi3, longrope, beyond it": {
        "longrope": {**FACTORS, "original_context": 16},
        "d_model": 64,
    },
    "llama": {"layout": "llama", "partial_rotary": 1.0, "rope_theta": 100_000.0},
    "llama, untied": {"layout": "llama", "partial_rotary": 1.0, "tie_embeddings": False},
}


class Pair(NamedTuple):
    ours: DenseModel
    theirs: Any
    loaded: Loaded
    folder: Path


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tiny_model, nano_tokenizer, tmp_path_factory) -> Pair:
    """Our model, and what transformers makes of the folder we save it in."""
    model = tiny_model(**VARIANTS[request.param])
    loaded = Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    folder = tmp_path_factory.mktemp("model")
    save(folder, loaded)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs.generation_config.eos_token_id = None
    return Pair(model, theirs.eval(), loaded, folder)


@torch.no_grad()
def test_logits(pair: Pair):
    tokens = random_tokens(3, 40)
    torch.testing.assert_close(pair.ours(tokens), pair.theirs(tokens).logits, atol=1e-5, rtol=0)


def test_gradients(pair: Pair):
    assert_same_gradients(pair.ours, pair.theirs)


def test_greedy_tokens(pair: Pair):
    for length in (20, 31):
        prompt = random_tokens(length).tolist()
        request = Request(prompt, max_new_tokens=64, temperature=0.0)
        [[completion]] = Engine(pair.ours).generate([request])
        with torch.no_grad():
            expected = pair.theirs.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False
            )
        assert completion.tokens == expected[0, length:].tolist()


def test_saved_tokenizer_gives_the_same_ids(pair: Pair):
    theirs = transformers.AutoTokenizer.from_pretrained(pair.folder)
    text = "Anna has 12 apples — naïve?\n\n  And 7 more."
    ours = pair.loaded.tokenizer
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    conversation = [{"role": "user", "content": text}]
    ids = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ours.decode(ids, keep_special=True) == f"<|user|>{text}<|end|><|assistant|>"
    assert theirs.eos_token_id == pair.loaded.renderer.stop_ids[0]


@torch.no_grad()
def test_a_folder_of_transformers_loads_here(pair: Pair, tmp_path: Path):
    pair.theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    transformers.AutoTokenizer.from_pretrained(pair.folder).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path)
    assert loaded.config.model_copy(update={"init_std": 0.12}) == pair.ours.config
    assert loaded.renderer.name == "phi4-mini"
    tokens = random_tokens(2, 24)
    torch.testing.assert_close(loaded.model(tokens), pair.ours(tokens), atol=0, rtol=0)
