"""GGUF in: small files made with the `gguf` package as llama.cpp's converter makes them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from phikit.base.errors import PhikitError, WeightsError
from phikit.chat.render import ChatMLRenderer
from phikit.chat.tokenizer import Tokenizer
from phikit.models.dense import DenseModel
from phikit.weights.gguf import GGUFFile
from phikit.weights.gguf_layout import hf_name
from phikit.weights.load import load
from phikit.weights.save import checkpoint_tensors

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

SIZES = {"d_model": 64, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "partial_rotary": 1.0}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, model: DenseModel, tokenizer: Any, **changes: Any) -> None:
    """A GGUF file as llama.cpp's converter writes it: norms in float32, matrices in one `kind`."""
    kind = gguf.GGMLQuantizationType[changes.get("kind", "Q8_0")]
    config = model.config
    tables = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(tables["vocab"], key=tables["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in tables["merges"]])
    writer.add_token_types([3 if token in tokenizer.specials else 1 for token in tokens])
    writer.add_chat_template(ChatMLRenderer(tokenizer, default_system="Be brief.").template)
    for name, tensor in checkpoint_tensors(model, dtype=torch.float32).items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        values = tensor.numpy()
        if "attn_q" in name or "attn_k" in name:
            pairs = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, packed(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(values: np.ndarray, kind: Any) -> np.ndarray:
    """The values quantised; random bytes for the kinds that `gguf` cannot write."""
    try:
        return gguf.quantize(np.ascontiguousarray(values), kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        return np.random.default_rng(0).integers(0, 60, shape, np.uint8)


def plainly(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary with GPT-2's split of text, which GGUF has a name for."""
    about = json.loads(tokenizer.to_json())
    about["pre_tokenizer"] = json.loads(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).__getstate__()
    )
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(about)))


@pytest.fixture(scope="module")
def plain_tokenizer(chatml_tokenizer) -> Tokenizer:
    return plainly(chatml_tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model) -> DenseModel:
    return tiny_model(layout="llama", **SIZES)


@pytest.fixture(scope="module")
def file(model, plain_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, model, plain_tokenizer)
    return path


@torch.no_grad()
def test_weights_and_config(file: Path, model: DenseModel, plain_tokenizer):
    loaded = load(file, renderer="smollm2")
    same = {"init_std": model.config.init_std}  # which no file carries
    assert loaded.config.model_copy(update=same) == model.config
    for (name, read), written in zip(
        loaded.model.named_parameters(), model.parameters(), strict=True
    ):
        # Q8_0 rounds to 1/127 of the greatest value in a block of 32.
        assert (read - written).abs().max() <= written.abs().max() / 250, name
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model(tokens), model(tokens), atol=0.1, rtol=0)
    assert loaded.tokenizer.to_json() == plain_tokenizer.to_json()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_every_kind_reads_as_gguf_reads_it(kind, tiny_model, plain_tokenizer, tmp_path: Path):
    path = tmp_path / "kind.gguf"
    wide = tiny_model(layout="llama", **{**SIZES, "d_model": 256, "d_mlp": 256, "head_dim": 64})
    write(path, wide, plain_tokenizer, kind=kind)
    ours = GGUFFile(path)
    assert ours.unreadable == {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            pairs = values.reshape(-1, 32, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        read = ours.read(hf_name(tensor.name, "llama"))
        assert np.array_equal(read.float().numpy(), values, equal_nan=True), tensor.name
    assert ours.stored_dtype() == {"F16": torch.float16, "BF16": torch.bfloat16}.get(
        kind, torch.float32
    )


def test_long_tensors_are_read_in_blocks(file: Path, monkeypatch: pytest.MonkeyPatch):
    ours = GGUFFile(file)
    whole = {name: ours.read(name) for name in ours.shapes}
    monkeypatch.setattr("phikit.weights.gguf._BLOCK_NUMBERS", 100)
    for name, tensor in whole.items():
        assert tensor.ndim == 1 or len(list(ours.blocks(name))) > 1
        assert torch.equal(ours.read(name), tensor), name


def test_dtype(file: Path):
    assert load(file, renderer="smollm2").model.lm_head.weight.dtype == torch.float32
    halved = load(file, renderer="smollm2", dtype=torch.bfloat16)
    assert {p.dtype for p in halved.model.parameters()} == {torch.bfloat16}


def test_agrees_with_the_reader_of_gguf(file: Path):
    reference = gguf.GGUFReader(file)
    ours = GGUFFile(file)
    assert len(reference.tensors) == len(ours.shapes)
    for name, value in ours.metadata.items():
        expected = reference.fields[name].contents()
        assert list(value) == expected if isinstance(expected, list) else value == expected


def test_other_files_are_refused(model, plain_tokenizer, tmp_path: Path):
    path = tmp_path / "a.gguf"
    for content, message in (
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 99, "not a GGUF"),
        (b"GGUF\x09\0\0\0" + b"\0" * 99, "version 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            load(path)
    write(path, model, plain_tokenizer, architecture="qwen3")
    with pytest.raises(WeightsError, match="'qwen3'; known are 'llama' and 'phi3'"):
        load(path)
    write(path, model, plain_tokenizer, pre="deepseek-llm")
    with pytest.raises(PhikitError, match="unknown pre-tokenizer 'deepseek-llm'"):
        load(path)


def test_a_quantisation_that_gguf_cannot_undo(file: Path, tmp_path: Path):
    whole = file.read_bytes()
    name = b"token_embd.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # behind the name: dimensions, then the kind
    assert whole[at : at + 4] == (8).to_bytes(4, "little")
    path = tmp_path / "odd.gguf"
    path.write_bytes(whole[:at] + (24).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(WeightsError, match="embed_tokens.weight is kept as I8, which cannot"):
        load(path, renderer="smollm2")


def test_damage_is_reported_and_nothing_else(file: Path, tmp_path: Path):
    """Cut anywhere, or with any bytes overwritten: a typed error, or a model."""
    whole = file.read_bytes()
    draw = random.Random(1)
    header_end = whole.index(b"blk.1.ffn_down") + 200
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        if trial < 50:
            del damaged[draw.randrange(len(whole)) :]
        else:
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(header_end)] = draw.choice((0, 1, 127, 255, 64))
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            load(path, renderer="smollm2")
        except PhikitError:
            refused += 1
    assert refused >= 50
