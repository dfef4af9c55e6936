"""Our GGUF files in llama.cpp itself: the same tokens for text, the same logits for tokens.

llama.cpp rounds what it multiplies an F16 matrix with to float16, so logits of about 4 differ by up
to 0.005; a wrong order of rows, rotation or factor gives differences of the size of the logits.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from tests.unit.chat.vocabularies import small
from tests.unit.weights.test_gguf_out import SPLITS, sentencepiece, with_split

from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.weights.gguf_blocks import quantised
from phikit.weights.gguf_out import save_gguf
from phikit.weights.load import Loaded, load

gguf = pytest.importorskip("gguf", reason="needs the gguf package")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs the llama-cpp-python package")

SIZE = {"d_model": 64, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 340}
# llama.cpp chooses LongRoPE's factors by the size of its cache, which is a multiple of 256.
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.1, 3.2, 4.3, 5.4, 6.5],
    "original_context": 256,
}
PHI4_MINI = {"partial_rotary": 0.75, "longrope": LONGROPE, "tie_embeddings": False}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No repacked weights: with AMX that crashes in some virtual machines."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra_buffers() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_extra_buffers)


def opened(path: Path, **options: Any) -> Any:
    return closing(llama_cpp.Llama(str(path), verbose=False, n_threads=1, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "tokens", "context"),
    [
        ({"layout": "llama", "partial_rotary": 1.0}, 60, 256),
        (PHI4_MINI, 60, 256),
        (PHI4_MINI, 300, 512),
    ],
    ids=["llama", "phi3-short", "phi3-long"],
)
def test_logits(config, tokens, context, tiny_model, tmp_path: Path):
    model = tiny_model(**{**SIZE, **config, "max_context": 512})
    tokenizer = with_split(small("chatml"), "gpt-4o")
    path = tmp_path / "m.gguf"
    save_gguf(path, Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2")), quant="f16")
    ids = torch.randint(0, 340, (tokens,), generator=torch.Generator().manual_seed(1))
    with opened(path, n_ctx=context, logits_all=True, type_k=0, type_v=0) as theirs:
        theirs.eval(ids.tolist())
        expected = torch.from_numpy(np.array(theirs.scores[:tokens]))
    ours = load(path, dtype=torch.float32).model(ids[None])[0]
    assert ours.abs().max() > 2
    torch.testing.assert_close(ours, expected, atol=0.01, rtol=0)


CHILD = """
import sys, numpy as np, llama_cpp
make = llama_cpp.llama_cpp.llama_model_default_params
def plain():
    parameters = make()
    parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_cpp.llama_model_default_params = plain
model = llama_cpp.Llama(sys.argv[1], verbose=False, n_threads=1, n_threads_batch=1,
                        n_ctx=256, n_batch=1, n_ubatch=1, logits_all=True, type_k=0, type_v=0)
for id_ in sys.argv[3:]:
    model.eval([int(id_)])
np.save(sys.argv[2], np.array(model.scores[:len(sys.argv) - 3]))
"""
"""One token after the other: products of quantised matrices crash in some virtual machines, which
is also why they run in a process of their own."""


def with_8_bit_inputs(model: torch.nn.Module) -> None:
    """llama.cpp rounds what it multiplies a quantised matrix with to Q8_0."""

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        [x] = inputs
        blocks = quantised(x.reshape(-1, x.shape[-1]), "q8_0").numpy()
        exact = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(exact).view(x.shape)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


@torch.no_grad()
@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_logits_of_quantised_files(quant, tiny_model, tmp_path: Path):
    model = tiny_model(**{**SIZE, "layout": "llama", "partial_rotary": 1.0})
    tokenizer = with_split(small("chatml"), "gpt-4o")
    path, logits = tmp_path / "m.gguf", tmp_path / "logits.npy"
    save_gguf(path, Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2")), quant=quant)
    ids = torch.randint(0, 340, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path, logits, *map(str, ids)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if child.returncode < 0:
        pytest.skip(f"llama.cpp was killed by signal {-child.returncode} on this machine")
    assert child.returncode == 0, child.stderr
    expected = torch.from_numpy(np.load(logits))
    ours = load(path, dtype=torch.float32).model
    with_8_bit_inputs(ours)
    found = ours(torch.tensor([ids]))[0]
    assert found.abs().max() > 2
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def texts(count: int) -> Iterator[str]:
    yield from ("  lead", " \n a\r\nb", "don't DON'T 1234567 <|im_end|>", "naïve 日本 ３３ \t x'll")
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(
            chr(draw.choice([draw.randint(32, 126), draw.randint(160, 0x250), 32, 10, 0x4E2D]))
            for _ in range(30)
        )


@pytest.mark.parametrize("split", SPLITS)
def test_tokens(split: str, tiny_model, tmp_path: Path):
    tokenizer = with_split(small("chatml"), split)
    model = tiny_model(**{**SIZE, "layout": "llama", "partial_rotary": 1.0})
    renderer = renderer_for(tokenizer, "smollm2")
    save_gguf(tmp_path / "m.gguf", Loaded(model, tokenizer, renderer), quant="f16")
    with opened(tmp_path / "m.gguf", vocab_only=True) as theirs:
        for text in texts(100):
            found = theirs.tokenize(text.encode(), add_bos=False, special=False)
            assert found == tokenizer.encode(text), text
        vocabulary = theirs._model.vocab
        assert all(llama_cpp.llama_vocab_is_eog(vocabulary, stop) for stop in renderer.stop_ids)


def test_a_prompt_of_phi3(tiny_model, tmp_path: Path):
    """Its special tokens swallow the newlines of its template, which llama.cpp must know."""
    tokenizer = sentencepiece()
    renderer = renderer_for(tokenizer, "phi3")
    model = tiny_model(**{**SIZE, "partial_rotary": 1.0})
    save_gguf(tmp_path / "m.gguf", Loaded(model, tokenizer, renderer), quant="f16")
    messages = [Message("user", "tell all"), Message("assistant", "a"), Message("user", "test")]
    text = jinja2.Template(renderer.template).render(
        messages=[{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
    )
    with opened(tmp_path / "m.gguf", vocab_only=True) as theirs:
        found = theirs.tokenize(text.encode(), add_bos=False, special=True)
    assert found == renderer.prompt(messages)
