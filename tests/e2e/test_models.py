"""What a user does with a model that is there: show, generate, export, merge."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tests.unit.serve.house import make_tool_tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import phikit as library
from phikit.chat.phi import AUDIO_TOKEN, IMAGE_TOKEN
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.cli.conversation import disarmed
from phikit.models.dense import DenseModel
from phikit.models.multimodal import MultimodalModel
from phikit.nn.lora import attach_lora, merge_lora
from phikit.weights.adapter import load_adapter, save_adapter
from phikit.weights.load import Loaded, load
from phikit.weights.save import save

Phikit = Callable[..., subprocess.CompletedProcess[str]]
IDS_BT = torch.arange(24).view(2, 12)


@pytest.fixture
def model(random_model: Callable[[int], Path]) -> Path:
    return random_model(160)


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A random adapter in float32 that fits the model."""
    base = load(model).model
    weights = attach_lora(base, name="a", targets=("qkv_proj", "down_proj"), rank=2, alpha=4)
    with torch.no_grad():
        for weight in weights:
            weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(tmp_path / "adapter", base, name="a")
    return tmp_path / "adapter"


def test_show_tells_what_is_there(phikit: Phikit, model: Path, adapter: Path):
    shown = phikit("show", model)
    assert shown.returncode == 0, shown.stderr
    for words in ("dense", "qkv_proj", "160 tokens", "<|user|>", "phi4-mini", "at int4", "theta"):
        assert words in shown.stdout, words
    total = sum(p.numel() for p in load(model).model.parameters())
    assert f"{total:,}" in shown.stdout
    shown = phikit("show", adapter)
    assert "2, alpha 4" in shown.stdout and "down_proj, qkv_proj" in shown.stdout


def test_show_knows_published_models_that_are_not_here(
    phikit: Phikit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    shown = phikit("show", "phi-4-mini-instruct")
    assert shown.returncode == 0, shown.stderr
    for words in ("3,836,021,760", "7.67 GB", "131,072", "phikit pull microsoft/Phi-4-mini"):
        assert words in shown.stdout, words
    shown = phikit("show", "microsoft/Phi-3.5-MoE-instruct")
    assert "6,640,999,744 active" in shown.stdout


def test_generate_continues_text_from_argument_or_pipe(phikit: Phikit, model: Path):
    expected = str(library.load(model).generate("What is 12", max_new_tokens=9)).replace("\r", "")
    said = phikit("generate", model, "What is 12", "--max-new-tokens", 9)
    assert said.returncode == 0, said.stderr
    piped = phikit("generate", model, "--max-new-tokens", 9, given="What is 12\n")
    assert said.stdout == piped.stdout
    assert said.stdout.strip("\n\ufffd") == expected.strip("\n\ufffd")


def test_generate_as_json_and_as_chat(phikit: Phikit, model: Path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    reply = library.load(model).generate(asked, max_new_tokens=9)
    said = phikit(
        *("generate", model, "Hello", "--chat", "--system", "Be brief."),
        *("--max-new-tokens", 9, "--json"),
    )
    assert said.returncode == 0, said.stderr
    record = json.loads(said.stdout)
    assert record["tokens"] == reply.tokens and record["text"] == reply.text
    assert record["prompt_tokens"] == reply.prompt_tokens
    assert record["finish_reason"] in ("stop", "length")
    again = phikit("generate", model, "Hello", "--json")  # as much as the context leaves
    assert again.returncode == 0, again.stderr


def test_generate_streams_a_chat(phikit: Phikit, model: Path):
    asked = [{"role": "user", "content": "Hello"}]
    reply = library.load(model).generate(asked, max_new_tokens=9, temperature=2.0, seed=1)
    assert reply.text and reply.thinking is None
    shown = phikit(
        *("generate", model, "Hello", "--chat", "--max-new-tokens", 9),
        *("--temperature", 2.0, "--seed", 1),
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"{disarmed(reply.text)}\n\n"


@pytest.fixture
def gpt2_model(tiny_model: Callable[..., DenseModel], tmp_path: Path) -> Path:
    """A model whose tokenizer splits text in a way that llama.cpp knows."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(ByteLevel.alphabet()), *specials]
    inner = tokenizers.Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    inner.add_special_tokens(specials)
    tokenizer = Tokenizer(inner)
    network = tiny_model(vocab_size=len(tokens), d_model=64, d_mlp=96)
    save(tmp_path / "gpt2", Loaded(network, tokenizer, renderer_for(tokenizer, "smollm2")))
    return tmp_path / "gpt2"


def test_export_to_gguf_and_back(phikit: Phikit, gpt2_model: Path, tmp_path: Path):
    model = gpt2_model
    file, folder = tmp_path / "model.gguf", tmp_path / "back"
    done = phikit("export", model, file, "--to", "gguf", "--quant", "BF16", "--no-modelfile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file)
    done = phikit("export", file, folder, "--to", "hf", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    a, b = load(model, dtype=torch.bfloat16), load(folder)
    for (name, x), y in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert a.tokenizer.encode("12 apples") == b.tokenizer.encode("12 apples")
    assert "BF16" in phikit("show", file).stdout


def test_export_of_adapters(
    phikit: Phikit, tiny_multimodal: Callable[..., MultimodalModel], tmp_path: Path
):
    """Each adapter inside of a model, as a folder that PEFT reads."""
    tokenizer = make_tool_tokenizer()
    special = tokenizer.special
    marks = {"image_token": special(IMAGE_TOKEN), "audio_token": special(AUDIO_TOKEN)}
    network = tiny_multimodal(**marks)
    save(tmp_path / "omni", Loaded(network, tokenizer, renderer_for(tokenizer, "phi4-mini")))
    done = phikit("export", tmp_path / "omni", tmp_path / "adapters", "--to", "peft")
    assert done.returncode == 0, done.stderr
    folders = sorted(folder.name for folder in (tmp_path / "adapters").iterdir())
    assert folders == ["speech", "vision"]
    shown = phikit("show", tmp_path / "adapters" / "vision").stdout
    assert "rank" in shown and "4, alpha 8" in shown


def test_merge_adds_in_float32(phikit: Phikit, model: Path, adapter: Path, tmp_path: Path):
    done = phikit("merge", model, adapter, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    base = load(model).model
    load_adapter(adapter, base, name="a")
    merge_lora(base, "a")
    assert torch.equal(load(tmp_path / "merged").model(IDS_BT), base(IDS_BT))


def test_merge_rounds_once(phikit: Phikit, model: Path, adapter: Path, tmp_path: Path):
    """A bfloat16 base with a float32 adapter: the nearest bfloat16 numbers to the exact sum."""
    half = tmp_path / "half"
    assert phikit("export", model, half, "--to", "hf", "--dtype", "bfloat16").returncode == 0
    done = phikit("merge", half, adapter, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    exact = load(half, dtype=torch.float32).model
    load_adapter(adapter, exact, name="a")
    merge_lora(exact, "a")
    merged = load(tmp_path / "merged").model
    for (name, x), y in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(x, y.bfloat16()), name


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("phikit: ") and lines[-1].startswith("  Next: "), lines
    return done.stderr


@pytest.mark.parametrize("verb", ["pull", "show", "export", "merge", "generate"])
def test_help_teaches_with_an_example(phikit: Phikit, verb: str):
    shown = phikit(verb, "--help")
    assert shown.returncode == 0
    assert f"Example: phikit {verb} " in shown.stdout


def test_nothing_is_overwritten(phikit: Phikit, model: Path, adapter: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    for line in (("export", model, out, "--to", "hf"), ("merge", model, adapter, out)):
        assert f"{out} is there already" in complaint(phikit(*line))
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_mistakes_end_with_the_next_step(
    phikit: Phikit, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    said = complaint(phikit("export", model, out, "--to", "peft"))
    assert "carries no adapters" in said
    assert "--quant" in complaint(phikit("export", model, out, "--to", "hf", "--quant", "Q8_0"))
    assert "--dtype" in complaint(
        phikit("export", model, out, "--to", "gguf", "--dtype", "float16")
    )
    assert "int3" in complaint(phikit("export", model, out, "--to", "hf", "--dtype", "int3"))
    assert "adapter_config.json" in complaint(phikit("merge", model, model, out))
    assert not out.exists()
    assert "add --chat" in complaint(phikit("generate", model, "a", "--system", "b"))
    assert "the prompt is empty" in complaint(phikit("generate", model, given=""))
    said = complaint(phikit("generate", "someone/some-model", "a"))
    assert "phikit pull someone/some-model" in said
    assert "looked for" in complaint(phikit("show", tmp_path))
