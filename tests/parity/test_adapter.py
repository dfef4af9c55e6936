"""Adapters against peft, both ways, on the transformers model of the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phikit.base.errors import WeightsError
from phikit.chat.render import renderer_for
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseModel
from phikit.nn.lora import attach_lora, merge_lora
from phikit.weights.adapter import load_adapter, save_adapter
from phikit.weights.load import Loaded, load
from phikit.weights.save import save

transformers = pytest.importorskip("transformers", reason="peft adapts its models")
peft = pytest.importorskip("peft", reason="the reference of these tests")

LLAMA = {"layout": "llama", "partial_rotary": 1.0}
TOKENS = torch.arange(40).view(2, 20)


def draw(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def base_folder(folder: Path, model: DenseModel, nano_tokenizer) -> Path:
    save(folder, Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")))
    return folder


def hf_model(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def assert_same(ours: Decoder, theirs: nn.Module, base: Path) -> None:
    logits: Tensor = theirs(TOKENS).logits
    torch.testing.assert_close(ours(TOKENS), logits, atol=1e-5, rtol=0)
    assert (load(base).model(TOKENS) - logits).abs().max() > 0.1


@pytest.mark.parametrize("variant", [{}, LLAMA], ids=["phi3", "llama"])
def test_ours_in_peft(tiny_model, nano_tokenizer, tmp_path: Path, variant):
    model = tiny_model(**variant)
    base = base_folder(tmp_path / "base", model, nano_tokenizer)
    targets = ("qkv_proj", "gate_up_proj", "down_proj")
    draw(attach_lora(model, name="skill", targets=targets, rank=4, alpha=6.0))
    save_adapter(tmp_path / "adapter", model, name="skill", base=str(base))

    theirs = peft.PeftModel.from_pretrained(hf_model(base), tmp_path / "adapter").eval()
    assert_same(model, theirs, base)

    again = load(base).model
    trainable = load_adapter(tmp_path / "adapter", again, name="other")
    assert [p for p in again.parameters() if p.requires_grad] == trainable
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))


def peft_adapter(folder: Path, base: Path, targets: list[str], **settings) -> nn.Module:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, **settings
    )
    model = peft.get_peft_model(hf_model(base), config)
    draw([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)
    return model.eval()


CASES = {
    "phi3": ({}, ["qkv_proj", "o_proj"], {}),
    "phi3, other ranks for some": (
        {},
        ["qkv_proj", "down_proj"],
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ),
    "llama, q, k and v apart": (LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj"], {}),
    "llama, q and v alone": (LLAMA, ["q_proj", "v_proj", "up_proj"], {}),
    "llama, q and v of different rank": (
        LLAMA,
        ["q_proj", "v_proj"],
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_peft_in_ours(tiny_model, nano_tokenizer, tmp_path: Path, case):
    variant, targets, settings = CASES[case]
    base = base_folder(tmp_path / "base", tiny_model(**variant), nano_tokenizer)
    theirs = peft_adapter(tmp_path / "adapter", base, targets, **settings)
    model = load(base).model
    trainable = load_adapter(tmp_path / "adapter", model, name="skill")
    assert_same(model, theirs, base)
    assert [p for p in model.parameters() if p.requires_grad] == trainable

    save_adapter(tmp_path / "again", model, name="skill")
    again = peft.PeftModel.from_pretrained(hf_model(base), tmp_path / "again").eval()
    assert_same(model, again, base)

    merge_lora(model, "skill")
    assert_same(model, theirs, base)


def test_names_without_pefts_prefix(tiny_model, nano_tokenizer, tmp_path: Path):
    """As the conversion of Phi-4-multimodal in transformers writes them."""
    base = base_folder(tmp_path / "base", tiny_model(), nano_tokenizer)
    theirs = peft_adapter(tmp_path / "adapter", base, ["qkv_proj", "o_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    model = load(base).model
    load_adapter(tmp_path / "adapter", model, name="skill")
    assert_same(model, theirs, base)


def test_what_does_not_fit_is_refused(tiny_model, nano_tokenizer, tmp_path: Path):
    base = base_folder(tmp_path / "base", tiny_model(**LLAMA), nano_tokenizer)
    model = load(base).model
    peft_adapter(tmp_path / "dora", base, ["o_proj"], use_dora=True)
    with pytest.raises(WeightsError, match="use_dora"):
        load_adapter(tmp_path / "dora", model, name="skill")
    peft_adapter(tmp_path / "pissa", base, ["o_proj"], init_lora_weights="pissa")
    with pytest.raises(WeightsError, match="init_lora_weights"):
        load_adapter(tmp_path / "pissa", model, name="skill")
    peft_adapter(tmp_path / "lost", base, ["q_proj", "down_proj"])
    file = tmp_path / "lost" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"missing .*layers.1.self_attn.q_proj.lora_A"):
        load_adapter(tmp_path / "lost", model, name="skill")
    peft_adapter(tmp_path / "head", base, ["o_proj", "lm_head"])
    with pytest.raises(WeightsError, match=r"unexpected lm_head.lora_A"):
        load_adapter(tmp_path / "head", model, name="skill")
    assert all(parameter.requires_grad for parameter in model.parameters())
