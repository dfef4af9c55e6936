"""Describing a checkpoint from its configuration and headers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.modalities import MODALITIES, taught

from phikit.base.errors import WeightsError
from phikit.chat.render import renderer_for
from phikit.models.catalogue import PHI_4_MINI
from phikit.nn.lora import attach_lora
from phikit.weights.adapter import save_adapter
from phikit.weights.describe import (
    cache_bytes_per_token,
    describe,
    describe_adapter,
    weight_memory,
)
from phikit.weights.load import Loaded
from phikit.weights.save import save


@pytest.fixture
def folder(tiny_model, nano_tokenizer, tmp_path: Path) -> Path:
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    save(tmp_path / "model", Loaded(tiny_model(), nano_tokenizer, renderer))
    return tmp_path / "model"


def test_a_folder(tiny_model, folder: Path):
    found = describe(folder)
    assert found.config == tiny_model().config
    assert (found.stored.layout, found.stored.dtype, found.stored.files) == (
        "Hugging Face",
        "float32",
        1,
    )
    assert found.stored.tensors == len(load_file(folder / "model.safetensors"))
    assert found.renderer is not None and found.renderer.name == "phi4-mini"
    assert found.adapters == () and found.renderer_fault is None


def test_weights_are_not_read(folder: Path):
    """Damaged numbers do not matter: they are not looked at."""
    before = describe(folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert describe(folder).stored == before.stored


def test_a_model_without_a_template_or_a_tokenizer_says_so(folder: Path):
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    found = describe(folder)
    assert found.renderer is not None and found.renderer.name == "text"
    assert found.tokenizer is not None
    (folder / "tokenizer.json").unlink()
    found = describe(folder)
    assert found.tokenizer is None and "tokenizer.json" in (found.renderer_fault or "")


def test_adapters_beside_and_inside(tiny_model, folder: Path):
    model = tiny_model()
    weights = attach_lora(model, name="x", targets=("qkv_proj", "o_proj"), rank=4, alpha=8)
    save_adapter(folder / "x-lora", model, name="x")
    [beside] = describe(folder).adapters
    assert beside == describe_adapter(folder / "x-lora")
    assert (beside.name, beside.rank, beside.alpha) == ("x-lora", 4, 8)
    assert beside.targets == ("o_proj", "qkv_proj")
    assert beside.parameters == sum(weight.numel() for weight in weights)
    with pytest.raises(WeightsError, match="does not exist"):
        describe_adapter(folder)

    tensors = load_file(folder / "model.safetensors")
    inside = {
        "model.layers.0.self_attn.qkv_proj.lora_A.vision.weight": torch.zeros(3, 48),
        "model.layers.0.self_attn.qkv_proj.lora_B.vision.weight": torch.zeros(128, 3),
    }
    save_file(tensors | inside, folder / "model.safetensors")
    first, _ = describe(folder).adapters
    assert (first.name, first.rank, first.targets) == ("vision", 3, ("qkv_proj",))
    assert first.parameters == 3 * (48 + 128)


def test_what_is_no_model(tmp_path: Path):
    with pytest.raises(WeightsError, match="config.json does not exist"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    with pytest.raises(WeightsError, match="does not describe a model"):
        describe(tmp_path)


def test_memory_of_phi_4_mini():
    memory = weight_memory(PHI_4_MINI)
    assert memory.bf16 == 2 * 3_836_021_760
    vectors = 65 * 3072
    matrices = 3_836_021_760 - vectors
    assert memory.int8 == matrices * 34 // 32 + 2 * vectors
    assert memory.int4 == matrices * 18 // 32 + 2 * vectors
    assert cache_bytes_per_token(PHI_4_MINI) == 2 * 2 * 32 * 8 * 128


def test_what_was_attached(tiny_model, tiny_multimodal, nano_tokenizer, tmp_path: Path):
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    model = taught(tiny_model(), *MODALITIES[:2])
    save(tmp_path / "taught", Loaded(model, nano_tokenizer, renderer))
    found = describe(tmp_path / "taught")
    assert [(sense.name, sense.has_adapter) for sense in found.senses] == [
        ("vision", True), ("speech", True)
    ]  # fmt: skip
    assert {each.name for each in found.adapters} == {"vision-lora", "speech-lora"}
    for sense in found.senses:
        state = model.senses[sense.name].state_dict()
        assert sense.parameters == sum(tensor.numel() for tensor in state.values())
    save(tmp_path / "born", Loaded(tiny_multimodal(), nano_tokenizer, renderer))
    assert [sense.parameters for sense in describe(tmp_path / "born").senses] == [None, None]
    assert {*tiny_multimodal().senses} == {*tiny_multimodal().config.senses}


def test_a_text_model_perceives_nothing_else(folder: Path):
    assert describe(folder).senses == ()
