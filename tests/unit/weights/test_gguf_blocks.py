"""Our blocks of Q8_0 and Q4_0: byte for byte those of the `gguf` package, read back the same."""

from pathlib import Path

import pytest
import torch
from tests.unit.chat.vocabularies import small
from tests.unit.weights.test_gguf_out import CONFIGS, SIZE, with_split

from phikit.base.errors import WeightsError
from phikit.chat.render import renderer_for
from phikit.nn.quantised import QuantConfig
from phikit.weights.gguf_blocks import quantised
from phikit.weights.gguf_out import save_gguf
from phikit.weights.load import Loaded, load
from phikit.weights.quantise import quantise

gguf = pytest.importorskip("gguf", reason="needs the gguf package")


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 512, generator=draw)
    return {
        "normal": normal,
        "few values": (normal * 4).round() / 4,  # halves everywhere, and ties for the largest
        "tiny": normal * 1e-7,  # scales below float16's normal range
        "large": normal * 1e4,
        "zeros": torch.cat([torch.zeros(2, 512), normal[:2]]),
        "bfloat16": normal.bfloat16().float(),
    }


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", weights())
def test_bytes_are_those_of_the_reference(name: str, kind):
    weight = weights()[name]
    expected = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert torch.equal(quantised(weight, kind), torch.from_numpy(expected))


def test_a_block_by_hand():
    """The layout as ggml's header defines it, from the values up."""
    weight = torch.arange(-16, 16).float()[None] / 2
    block = quantised(weight, "q4_0")[0]
    assert block[:2].view(torch.float16).item() == 1  # -8 / -8
    nibbles = torch.cat((block[2:] & 15, block[2:] >> 4)).float()
    # Halves are lifted to the next integer, and 7 is the most.
    assert torch.equal(nibbles - 8, (weight[0] + 0.5).floor().clamp(max=7))
    block = quantised(weight, "q8_0")[0]
    assert block[:2].view(torch.float16).item() == pytest.approx(8 / 127, rel=1e-3)
    assert block[2:].view(torch.int8).tolist()[::16] == [-127, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi4-mini"])
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(bits=4),
        QuantConfig(bits=8),
        QuantConfig(bits=4, group=64, embedding_bits=4),
        QuantConfig(bits=4, embedding_bits=16),
    ],
    ids=["4 bits", "8 bits", "groups of 64", "embeddings left alone"],
)
def test_a_quantised_model_keeps_its_numbers(name, config, tiny_model, tmp_path: Path):
    model = tiny_model(**{**SIZE, **CONFIGS[name], "d_mlp": 128})
    tokenizer = with_split(small("phi4-mini"), "gpt-4o")
    loaded = Loaded(model, tokenizer, renderer_for(tokenizer, "phi4-mini"))
    for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
        matrix.copy_(matrix.half())  # as they are kept in the file if they are left alone
    quantise(loaded, config)
    own = "q4_0" if config.bits == 4 else "q8_0"
    tokens = torch.arange(40)[None]
    expected = model(tokens)
    save_gguf(tmp_path / "m.gguf", loaded, quant=own)
    again = load(tmp_path / "m.gguf", dtype=torch.float32)
    assert torch.allclose(again.model(tokens), expected, atol=2e-5, rtol=0)
    for path, module in model.named_modules():
        if path.endswith("proj.weight"):
            dense = again.model.get_parameter(path)
            assert torch.equal(module.dequantise(torch.float32), dense), path
    other = "q8_0" if own == "q4_0" else "q4_0"
    with pytest.raises(WeightsError, match="round it again"):
        save_gguf(tmp_path / "other.gguf", loaded, quant=other)
    save_gguf(tmp_path / "bf16.gguf", loaded, quant="bf16")
    rounded = load(tmp_path / "bf16.gguf", dtype=torch.float32)
    assert torch.allclose(rounded.model(tokens), expected, atol=0.05)
