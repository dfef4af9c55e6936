"""Quantising, saving, loading and describing a model; and every way a file of one can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phikit.base.errors import ConfigError, PhikitError, WeightsError
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.models.moe import MoEConfig, MoEModel
from phikit.models.multimodal import Media
from phikit.models.phi import PhiConfig, PhiModel
from phikit.nn.lora import add_adapters, attach_lora, merge_lora, route_of
from phikit.nn.quantised import PackedWeight, QuantConfig
from phikit.train.loop import train
from phikit.weights.adapter import load_adapter, save_adapter
from phikit.weights.describe import describe, weight_bytes
from phikit.weights.load import Loaded, load
from phikit.weights.quantise import quantise
from phikit.weights.save import save

TOKENS_BT = torch.randint(0, 290, (2, 24), generator=torch.Generator().manual_seed(1))
ROWS = torch.randint(0, 290, (12, 64), generator=torch.Generator().manual_seed(2)).tolist()
SIZE = {
    "vocab_size": 300, "d_model": 64, "d_mlp": 96, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 16, "max_context": 128, "init_std": 0.12,
}  # fmt: skip


@pytest.fixture
def loaded(nano_tokenizer) -> Callable[[Decoder], Loaded]:
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    return lambda model: Loaded(model, nano_tokenizer, renderer)


@pytest.fixture
def folder(tiny_model, loaded, tmp_path: Path) -> Path:
    """A tiny model of 4 bits."""
    made = loaded(tiny_model(d_model=64, d_mlp=96))
    quantise(made, QuantConfig())
    save(tmp_path / "model", made)
    return tmp_path / "model"


def logits(model: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS_BT)


def families() -> dict[str, Callable[[], Decoder]]:
    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    moe = {**SIZE, "num_experts": 4}
    return {
        "phi": lambda: PhiModel(PhiConfig.resolve(SIZE)).initialise(seed()),
        "moe": lambda: MoEModel(MoEConfig.resolve(moe)).initialise(seed()),
        "untied": lambda: MoEModel(MoEConfig.resolve({**moe, "tie_embeddings": False})).initialise(
            seed()
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["dense", "phi", "moe", "untied", "multimodal"])
def test_a_saved_model_comes_back_bit_for_bit(
    family: str, dtype: torch.dtype, tiny_model, tiny_multimodal, loaded, tmp_path: Path
):
    makers = {
        **families(),
        "dense": lambda: tiny_model(d_model=64, d_mlp=96),
        "multimodal": tiny_multimodal,
    }
    made = loaded(makers[family]().to(dtype))
    outcome = quantise(made, QuantConfig(bits=4, method="gptq"), calibration=ROWS)
    assert outcome.packed
    save(tmp_path / "model", made, max_shard_bytes=40_000)
    again = load(tmp_path / "model")
    assert again.model.quantisation == made.model.quantisation
    assert again.model.dtype == dtype
    assert torch.equal(logits(again.model), logits(made.model))
    ours = again.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in made.model.state_dict().items())

    save(tmp_path / "twice", again)
    assert torch.equal(logits(load(tmp_path / "twice").model), logits(made.model))
    [[completion]] = Engine(again.model).generate([Request([1, 2, 3], max_new_tokens=4, seed=0)])
    assert len(completion.tokens) == 4


def test_a_multimodal_model_still_sees_and_hears(
    tiny_multimodal, tiny_image, tiny_clip, loaded, tmp_path: Path
):
    """The blocks are quantised, adapters and encoders are not."""
    original, made = tiny_multimodal(), loaded(tiny_multimodal())
    outcome = quantise(made, QuantConfig(bits=8))
    assert all(path.endswith("down_proj") for path in outcome.kept)  # 48 wide: no whole groups
    packed = {n for n, m in made.model.named_modules() if isinstance(m, PackedWeight)}
    assert not any(name.startswith(("image_embed", "audio_embed")) for name in packed)
    image, clip = tiny_image(1, 2), tiny_clip(24)
    media = Media((image,), (clip,))
    row = [5, *[310] * image.num_tokens, 7, *[311] * clip.num_tokens, 9]
    tokens_BT = torch.tensor([row])
    save(tmp_path / "model", made)
    with torch.inference_mode():
        wanted, ours, again = (
            each(tokens_BT, media=[media]).log_softmax(-1)
            for each in (original, made.model, load(tmp_path / "model").model)
        )
    assert torch.equal(ours, again)
    assert (wanted.exp() * (wanted - ours)).sum(-1).mean() < 0.02


def test_rows_that_are_no_whole_groups_are_kept_and_told(tiny_model, loaded, tmp_path: Path):
    made = loaded(tiny_model(d_model=64, d_mlp=80))
    outcome = quantise(made, QuantConfig(group=64))
    assert outcome.kept == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    save(tmp_path / "model", made)
    assert torch.equal(logits(load(tmp_path / "model").model), logits(made.model))


def test_a_seldom_chosen_expert_is_rounded_and_told(loaded):
    made = loaded(families()["moe"]())
    outcome = quantise(made, QuantConfig(method="gptq"), calibration=ROWS[:1])
    assert outcome.rounded and all(".experts." in name for name in outcome.rounded)
    assert outcome.rounded[0].rpartition(".")[2].isdecimal()


def test_progress_counts_every_weight_once(tiny_model, loaded):
    seen: list[tuple[int, int]] = []
    made = loaded(tiny_model(d_model=64, d_mlp=96))
    weights = sum(p.numel() for p in made.model.parameters() if p.ndim == 2)
    quantise(made, QuantConfig(), on_progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (weights, weights)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_description(folder: Path, tiny_model):
    found = describe(folder)
    assert found.packed is not None
    assert found.packed.config == QuantConfig()
    assert found.stored.layout == "phikit" and found.stored.dtype == "float32"
    assert "norm" in found.packed.kept and "qkv_proj" not in found.packed.kept
    plain = tiny_model(d_model=64, d_mlp=96)
    assert found.packed.weights == sum(p.numel() for p in plain.parameters() if p.ndim == 2)
    model = load(folder).model
    norms = sum(found.packed.kept.values())
    assert weight_bytes(model) == found.packed.size + 4 * norms
    assert found.stored.size >= weight_bytes(model)


def test_adapters_go_on_and_off_a_quantised_base(tiny_model, loaded, folder: Path, tmp_path: Path):
    model = load(folder).model
    before = logits(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in attach_lora(
        model, name="mine", targets=["qkv_proj", "o_proj"], rank=4, alpha=8, generator=generator
    ):
        parameter.data.normal_(0, 0.2, generator=generator)
    save_adapter(tmp_path / "adapter", model, name="mine")
    again = load(folder).model
    assert torch.equal(logits(again), before)
    load_adapter(tmp_path / "adapter", again, name="mine")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), before)
    with pytest.raises(WeightsError, match="cannot be merged"):
        merge_lora(again, "mine")
    with pytest.raises(WeightsError, match="adapters attached"):
        save(tmp_path / "out", loaded(again))


def test_quantising_keeps_the_adapters_that_are_there(tiny_model, loaded):
    made = loaded(tiny_model(d_model=64, d_mlp=96))
    add_adapters(made.model, name="mine", targets=["qkv_proj"], rank=4, alpha=8)
    quantise(made, QuantConfig(bits=8))
    assert route_of(made.model).names == ["mine"]


# --- Mistakes -----------------------------------------------------------------------------------


def test_settings_that_make_no_sense_name_the_value():
    for settings, words in (
        ({"bits": 3}, "bits"),
        ({"group": 48}, "group"),
        ({"method": "awq"}, "method"),
        ({"grup": 32}, "did you mean group"),
    ):
        with pytest.raises(ConfigError, match=words):
            QuantConfig.resolve(settings)


def test_what_cannot_be_quantised(tiny_model, loaded, folder: Path):
    with pytest.raises(ConfigError, match="no text to calibrate on"):
        quantise(loaded(tiny_model()), QuantConfig(method="gptq"), calibration=[[1]])
    with pytest.raises(WeightsError, match="quantised to 4 bits"):
        quantise(load(folder), QuantConfig())
    broken = tiny_model(d_model=64, d_mlp=96)
    broken.model.layers[0].mlp.gate_up_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(WeightsError, match="not finite"):
        quantise(loaded(broken), QuantConfig())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, "method 'awq'"),
        ({"quant_method": None}, "method None"),
        ({"bits": 5}, "bits"),
        ({"bits": 8}, "has shape"),
        ({"group_size": 64}, "has shape"),
        ({"group_size": -32}, "group"),
        ({"group_size": 96}, "missing model.embed_tokens"),
        ({"embedding_bits": 16}, "missing model.embed_tokens.weight"),
        ({"zero_point": True}, "zero_point: unknown setting"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, change: dict[str, Any], words: str):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=words):
        load(folder)


@pytest.mark.parametrize("found", ["int4", [], 4, True, {}])
def test_a_config_of_an_odd_kind(folder: Path, found: Any):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": found}
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="is quantised by the method"):
        load(folder)


def test_a_config_that_forgets_the_quantisation(folder: Path):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"unexpected .*\.packed"):
        load(folder)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (f"{EMBEDDING}.packed", None, "missing model.embed_tokens.weight.packed"),
        (f"{EMBEDDING}.packed", lambda t: t.float(), "floating point, expected U8"),
        (f"{EMBEDDING}.packed", lambda t: t.view(torch.int8), "kept as I8, expected U8"),
        (f"{EMBEDDING}.packed", lambda t: t[:-1].clone(), "has shape"),
        (f"{EMBEDDING}.scales", lambda t: t.to(torch.int32), "I32, which cannot be read"),
        (f"{EMBEDDING}.scales", lambda t: t.transpose(1, 2).contiguous(), "has shape"),
        ("model.norm.weight", lambda t: t.to(torch.uint8), "kept as U8"),
        ("model.more.packed", lambda _: torch.zeros(3, dtype=torch.uint8), "unexpected"),
    ],
)
def test_a_file_that_does_not_fit(folder: Path, name: str, change: Any, words: str):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=words):
        load(folder)


def test_a_damaged_file_is_a_typed_error_or_a_model(folder: Path):
    """Bytes of the header changed at random; nothing but typed errors comes out."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for at in torch.randint(0, header, (2,), generator=generator).tolist():
            damaged[at] = int(torch.randint(32, 127, (), generator=generator))
        file.write_bytes(bytes(damaged))
        try:
            logits(load(folder).model)
        except PhikitError:
            continue


def test_training_a_quantised_model_is_refused(folder: Path):
    unused: Any = None
    with pytest.raises(WeightsError, match="training it"):
        train(load(folder).model, unused, unused, steps=1, run=unused, progress=unused, name="sft")
