"""GGUF out: what is written is read back the same, and says what llama.cpp's converter would."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tests.unit.chat.vocabularies import PHI4, ROLES, llama_bpe, small

from phikit.base.errors import ChatError, WeightsError
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.models.dense import DenseModel
from phikit.nn.lora import attach_lora
from phikit.weights.gguf_out import save_gguf
from phikit.weights.gguf_tokenizer import Tables, build_tokenizer, tables_of
from phikit.weights.load import Loaded, load

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

SPLITS = ("gpt-2", "smollm", "dbrx", "gpt-4o", "llama-bpe", "qwen2")
SIZE = {"d_model": 64, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 340}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.1, 3.2, 4.3, 5.4, 6.5],
    "original_context": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"layout": "llama", "partial_rotary": 1.0},
    "untied": {"layout": "llama", "partial_rotary": 1.0, "tie_embeddings": False},
    "phi3": {"sliding_window": 21, "partial_rotary": 1.0, "tie_embeddings": False},
    "phi4-mini": {"partial_rotary": 0.75, "longrope": LONGROPE},
}


def with_split(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The same vocabulary, its text split as `tokenizer.ggml.pre` names it."""
    about = json.loads(tokenizer.to_json())
    empty = Tables("gpt2", name, ["a"], [1], [], [], [], [])
    other = json.loads(build_tokenizer(empty).to_json())
    about["pre_tokenizer"] = other["pre_tokenizer"]
    about["model"]["ignore_merges"] = other["model"]["ignore_merges"]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(about)))


def sentencepiece(*, rstrip: bool = True) -> Tokenizer:
    """Llama's BPE with every merge that its tokens allow, as SentencePiece has it."""
    about = json.loads(llama_bpe(["tell all", "a test"], specials=ROLES, rstrip=rstrip).to_str())
    tokens = about["model"]["vocab"]
    order = list(dict.fromkeys("".join(pair) for pair in about["model"]["merges"]))
    pieces = [token for token, id_ in tokens.items() if id_ >= 259]
    about["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in order
        for at in range(1, len(token))
        if token[:at] in pieces and token[at:] in pieces
    ]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(about)))


@pytest.fixture
def loaded(tiny_model) -> Loaded:
    tokenizer = with_split(small("chatml"), "gpt-4o")
    model = tiny_model(layout="llama", partial_rotary=1.0, **SIZE)
    return Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2"))


@torch.no_grad()
@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, quant, tiny_model, tmp_path: Path):
    model: DenseModel = tiny_model(**{**SIZE, **CONFIGS[name]})
    tokenizer = with_split(small("phi4-mini"), "gpt-4o")
    path = tmp_path / "model.gguf"
    save_gguf(path, Loaded(model, tokenizer, renderer_for(tokenizer, "phi4-mini")), quant=quant)
    again = load(path)
    assert again.renderer.name == "phi4-mini"
    assert again.tokenizer.to_json() == tokenizer.to_json()
    assert again.config.model_copy(update={"init_std": model.config.init_std}) == model.config
    stored = {"f16": torch.float16, "bf16": torch.bfloat16}.get(quant, torch.float32)
    # Half a step, or a whole one where Q4_0 ends at 7 of 8 steps on the lesser side.
    steps = {"q8_0": 254, "q4_0": 8}  # in the greatest magnitude
    for (key, read), kept in zip(again.model.named_parameters(), model.parameters(), strict=True):
        assert read.dtype == stored
        if quant in ("f16", "bf16"):
            assert torch.equal(read, kept.to(stored)), key
        else:
            assert (read - kept).abs().max() <= kept.abs().max() / steps[quant], key
    # Written again, the same numbers come out: dequantised weights are what the file says.
    exact = load(path, dtype=torch.float32)
    save_gguf(path, exact, quant=quant)
    tokens = torch.arange(40)[None]
    assert torch.equal(load(path, dtype=torch.float32).model(tokens), exact.model(tokens))
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_metadata_are_those_of_llama_cpp(tiny_model, tmp_path: Path):
    model = tiny_model(**{**SIZE, **CONFIGS["phi4-mini"]})
    tokenizer = with_split(small("phi4-mini"), "gpt-4o")
    renderer = renderer_for(tokenizer, "phi4-mini")
    save_gguf(tmp_path / "m.gguf", Loaded(model, tokenizer, renderer), quant="q4_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    stop = renderer.stop_ids[0]
    expected = {
        "general.architecture": "phi3",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "phi3.context_length": 128,
        "phi3.rope.scaling.original_context_length": 32,
        "phi3.rope.scaling.attn_factor": pytest.approx((1 + 2 / 5) ** 0.5),  # log 4 / log 32
        "phi3.rope.dimension_count": 12,
        "phi3.attention.sliding_window": 0,
        "phi3.attention.head_count_kv": 2,
        "phi3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.eos_token_id": stop,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": renderer.template,
    }
    assert {key: found[key] for key in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == model.config.vocab_size
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD339]"
    assert found["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert found["tokenizer.ggml.token_type"][stop] == gguf.TokenType.CONTROL
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["rope_factors_long.weight"] == "F32"
    assert shapes["blk.0.ffn_up.weight"] == [64, 128] and shapes["rope_factors_short.weight"] == [6]
    assert "output.weight" not in kinds


def test_a_matrix_of_odd_width_is_kept_in_f16(tiny_model, tmp_path: Path):
    model = tiny_model(**{**SIZE, **CONFIGS["llama"], "d_mlp": 40})
    tokenizer = with_split(small("chatml"), "smollm")
    kept = Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2"))
    save_gguf(tmp_path / "m.gguf", kept, quant="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("split", SPLITS)
def test_a_tokenizer_by_the_name_of_its_split(split: str, loaded: Loaded):
    tokenizer = with_split(small("chatml"), split)
    tables = tables_of(tokenizer, rows=tokenizer.size + 7)
    assert tables.split == split
    assert build_tokenizer(tables).to_json() == tokenizer.to_json()


def test_phi4_keeps_what_its_special_tokens_swallow():
    tokenizer = with_split(small("phi4"), "dbrx")
    tables = tables_of(tokenizer, rows=tokenizer.size)
    assert tables.left == tables.right == [tokenizer.special(name) for name in PHI4]
    assert build_tokenizer(tables).to_json() == tokenizer.to_json()


@pytest.mark.parametrize("rstrip", [True, False])
def test_phi3_sentencepiece(rstrip: bool, tiny_model, tmp_path: Path):
    tokenizer = sentencepiece(rstrip=rstrip)
    model = tiny_model(**{**SIZE, **CONFIGS["phi3"]})
    renderer = renderer_for(tokenizer, "phi3")
    save_gguf(tmp_path / "m.gguf", Loaded(model, tokenizer, renderer), quant="f16")
    again = load(tmp_path / "m.gguf")
    assert again.tokenizer.specials == tokenizer.specials
    assert again.tokenizer.size == tokenizer.size
    for text in ("tell all a test", "  a\ttest\n", "naïve 😀", "<|end|> tell </s>", ""):
        assert again.tokenizer.encode(text) == tokenizer.encode(text)
    messages = [Message("user", "tell\n all "), Message("assistant", "a"), Message("user", "test")]
    assert again.renderer.prompt(messages) == renderer.prompt(messages)
    name = gguf.GGUFReader(tmp_path / "m.gguf").fields.get("general.name")
    assert (name is not None) == rstrip  # llama.cpp takes the habit from the name


def test_tokenizers_that_gguf_cannot_keep(loaded: Loaded, tmp_path: Path):
    tokenizer = small("nano")
    other = Loaded(loaded.model, tokenizer, renderer_for(tokenizer, "phi4-mini"))
    with pytest.raises(ChatError, match="no name for how this tokenizer splits text"):
        save_gguf(tmp_path / "m.gguf", other, quant="f16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ChatError, match="it would give other tokens"):
        tables_of(small("phi3"), rows=1000)  # its merges do not follow from scores
    with pytest.raises(ChatError, match="the model embeds 10"):
        tables_of(with_split(small("chatml"), "gpt-2"), rows=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "llama", "partial_rotary": 0.5}, "partial_rotary 0.5"),
        ({"layout": "llama", "partial_rotary": 0.75, "longrope": LONGROPE}, "LongRoPE"),
        ({"layout": "phi3", "head_dim": 32}, "4 heads of 32 for 64"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise(change, message, tiny_model, loaded, tmp_path):
    other = Loaded(tiny_model(**{**SIZE, **change}), loaded.tokenizer, loaded.renderer)
    with pytest.raises(WeightsError, match=message):
        save_gguf(tmp_path / "m.gguf", other, quant="f16")


def test_numbers_beyond_a_kind(loaded: Loaded, tmp_path: Path):
    weight = loaded.model.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    weight[0, 0] = 1e5
    with pytest.raises(WeightsError, match=r"down_proj.weight holds 1e\+05, beyond the .* of F16"):
        save_gguf(tmp_path / "m.gguf", loaded, quant="f16")
    save_gguf(tmp_path / "m.gguf", loaded, quant="bf16")
    weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="holds nan"):
        save_gguf(tmp_path / "m.gguf", loaded, quant="q8_0")


def test_what_is_refused(loaded: Loaded, tmp_path: Path):
    with pytest.raises(WeightsError, match="unknown quantisation 'q2'"):
        save_gguf(tmp_path / "m.gguf", loaded, quant="q2")  # type: ignore[arg-type]
    attach_lora(loaded.model, name="skill", targets=["o_proj"], rank=2, alpha=2.0)
    with pytest.raises(WeightsError, match="adapters attached"):
        save_gguf(tmp_path / "m.gguf", loaded, quant="f16")


def test_a_failed_write_leaves_the_old_file(loaded: Loaded, tmp_path: Path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("phikit.weights.gguf_out._bytes", fail)
    with pytest.raises(RuntimeError):
        save_gguf(path, loaded, quant="f16")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
