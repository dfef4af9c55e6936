"""Phi-4-multimodal against transformers: logits, gradients, greedy tokens, files of both layouts.

The reference runs with eager attention, since its vision tower is causal by mistake under SDPA, and
on one clip at a time, since it masks batches of clips wrongly (`test_vision.py`, `test_speech.py`).
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.phi4mm import remote_parts
from torch import Tensor

from phikit.base.errors import ConfigError, WeightsError
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.multimodal import (
    Media,
    MultimodalModel,
    checkpoint_parts,
)
from phikit.models.registry import config_from_hf
from phikit.nn.lora import adapter_parameters, choose_adapter, merge_lora
from phikit.weights.build import named_tensors
from phikit.weights.load import Loaded, load
from phikit.weights.save import save

transformers = pytest.importorskip("transformers", reason="the reference of these tests")
peft = pytest.importorskip("peft", reason="runs the reference's adapters")

IMAGE, AUDIO = 310, 311
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
    "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9],
    "original_context": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, longrope beyond the original context": {"tie_embeddings": False, "longrope": LONGROPE},
}


class Pair(NamedTuple):
    ours: MultimodalModel
    theirs: Any
    loaded: Loaded
    folder: Path


class Prompt(NamedTuple):
    tokens: list[int]
    media: Media | None
    adapter: str | None
    """The one to choose in the reference, which leaves the choice to its caller."""


def their_model(folder: Path) -> Any:
    """transformers' model of a folder, its two adapters attached and off."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "Phi4MultimodalForCausalLM"
    for name in ("vision", "speech"):
        model.load_adapter(str(folder / f"{name}-lora"), adapter_name=name)
    model.disable_adapters()
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tiny_multimodal, nano_tokenizer, tmp_path_factory) -> Pair:
    """Our model, and what transformers makes of the folder we save it in."""
    model = tiny_multimodal(**VARIANTS[request.param])
    loaded = Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    folder = tmp_path_factory.mktemp("model")
    save(folder, loaded)
    return Pair(model, their_model(folder), loaded, folder)


@pytest.fixture(scope="module")
def prompts(tiny_image, tiny_clip) -> dict[str, Prompt]:
    """One of each kind."""
    text = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    wide, tall = tiny_image(1, 2, seed=1), tiny_image(3, 1, hidden=(5, 1), seed=2)
    clip = tiny_clip(61, seed=3)
    seen = [*text[:4], *[IMAGE] * wide.num_tokens, *text[4:9], *[IMAGE] * tall.num_tokens]
    heard = [*text[9:12], *[AUDIO] * clip.num_tokens, *text[12:20]]
    return {
        "text": Prompt(text, None, None),
        "vision": Prompt([*seen, *text[20:30]], Media(images=(wide, tall)), "vision"),
        "speech": Prompt(heard, Media(clips=(clip,)), "speech"),
        "vision-speech": Prompt([*seen, *heard], Media((wide, tall), (clip,)), "vision"),
    }


def their_inputs(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the reference takes it: images padded to the same number of crops."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt.tokens])}
    media = prompt.media or Media()
    if media.images:
        most = max(len(image.pixels_MCHW) for image in media.images)
        pixels = torch.zeros(len(media.images), most, 3, 28, 28)
        masks = torch.ones(len(media.images), most, 4, 4, dtype=torch.bool)
        for image, row, mask in zip(media.images, pixels, masks, strict=True):
            row[: len(image.pixels_MCHW)] = torch.as_tensor(image.pixels_MCHW)
            mask[: len(image.mask_MPP)] = torch.as_tensor(image.mask_MPP)
        sizes = [[28 * image.height_crops, 28 * image.width_crops] for image in media.images]
        inputs |= {
            "image_pixel_values": pixels,
            "image_attention_mask": masks,
            "image_sizes": torch.tensor(sizes),
        }
    for clip in media.clips:
        inputs |= {
            "audio_input_features": torch.as_tensor(clip.features_TF)[None],
            "audio_embed_sizes": torch.tensor([clip.num_tokens]),
        }
    return inputs


def choose(theirs: Any, adapter: str | None) -> None:
    if adapter is None:
        theirs.disable_adapters()
    else:
        theirs.enable_adapters()
        theirs.set_adapter(adapter)


def our_logits(model: MultimodalModel, *prompts: Prompt) -> Tensor:
    width = max(len(prompt.tokens) for prompt in prompts)
    rows = [[*prompt.tokens, *[0] * (width - len(prompt.tokens))] for prompt in prompts]
    return model(torch.tensor(rows), media=[prompt.media for prompt in prompts])


KINDS = ["text", "vision", "speech", "vision-speech"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits(pair: Pair, prompts: dict[str, Prompt], kind: str):
    prompt = prompts[kind]
    ours = our_logits(pair.ours, prompt)
    choose(pair.theirs, prompt.adapter)
    theirs = pair.theirs(**their_inputs(prompt)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if prompt.adapter is not None:
        choose(pair.theirs, None)
        base = pair.theirs(**their_inputs(prompt)).logits
        assert (ours - base).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_without_adapters(pair: Pair, prompts: dict[str, Prompt], kind: str, tmp_path: Path):
    """A folder without the adapters' folders is a model whose media run on the base."""
    shutil.copytree(pair.folder, tmp_path, ignore=lambda *_: ["vision-lora", "speech-lora"],
                    dirs_exist_ok=True)  # fmt: skip
    model = load(tmp_path).model
    assert isinstance(model, MultimodalModel) and not model.config.adapters
    choose(pair.theirs, None)
    theirs = pair.theirs(**their_inputs(prompts[kind])).logits
    torch.testing.assert_close(our_logits(model, prompts[kind]), theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_batch_of_all_kinds(pair: Pair, prompts: dict[str, Prompt]):
    """What the reference computes one by one, adapters switched by hand between."""
    if pair.ours.config.longrope is not None:
        pytest.skip("padding would choose the long factors for a short row")
    together = our_logits(pair.ours, *prompts.values())
    for row, prompt in zip(together, prompts.values(), strict=True):
        choose(pair.theirs, prompt.adapter)
        [theirs] = pair.theirs(**their_inputs(prompt)).logits
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-5, rtol=0)


def their_name(name: str, theirs: dict[str, Any]) -> str:
    """A checkpoint's tensor in the reference with its adapters attached."""
    beside = re.fullmatch(r"(\w+)-lora/(.+)\.lora_([AB])\.weight", name)
    if beside:
        return f"{beside[2]}.lora_{beside[3]}.{beside[1]}.weight"
    return name if name in theirs else f"{name.removesuffix('.weight')}.base_layer.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(pair: Pair, prompts: dict[str, Prompt], kind: str):
    prompt = prompts[kind]
    choose(pair.theirs, prompt.adapter)
    pair.theirs.requires_grad_(True)
    weights = torch.randn(1, len(prompt.tokens), 320, generator=torch.Generator().manual_seed(4))
    for model, run in (
        (pair.ours, lambda: our_logits(pair.ours, prompt)),
        (pair.theirs, lambda: pair.theirs(**their_inputs(prompt)).logits),
    ):
        model.zero_grad()
        (run().log_softmax(-1) * weights).sum().backward()
    theirs = {name: p.grad for name, p in pair.theirs.named_parameters()}
    learnt = set()
    for key, parameter in pair.ours.named_parameters():
        [(name, _)] = checkpoint_parts(pair.ours.config, key)
        expected = theirs[their_name(name, theirs)]
        if parameter.grad is None or expected is None:
            assert not any(g is not None and bool(g.any()) for g in (parameter.grad, expected)), key
            continue
        scale = expected.norm()
        if key.endswith("k_proj.bias"):
            # It shifts all scores of a query alike: the gradient is zero, and both have noise.
            weight = theirs[their_name(name.replace("bias", "weight"), theirs)]
            assert weight is not None
            scale = weight.norm()
        distance = (parameter.grad - expected).norm() / scale
        assert distance <= 1e-4, (key, float(distance))
        learnt.add(key.split(".")[0])
    assert ("image_embed" in learnt) == ("vision" in kind)
    assert ("audio_embed" in learnt) == ("speech" in kind)
    for name in ("vision", "speech"):
        gradients = [p.grad for p in adapter_parameters(pair.ours, name)]
        assert all((g is not None) == (name == prompt.adapter) for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(pair: Pair, prompts: dict[str, Prompt], kind: str):
    prompt = prompts[kind]
    if pair.ours.config.longrope is not None and len(prompt.tokens) <= 32:
        pytest.skip("the reference loses its cache at the switch of LongRoPE's factors")
    request = Request(prompt.tokens, max_new_tokens=64, temperature=0.0, media=prompt.media)
    [[completion]] = Engine(pair.ours).generate([request])
    choose(pair.theirs, prompt.adapter)
    with torch.no_grad():
        expected = pair.theirs.generate(**their_inputs(prompt), max_new_tokens=64, do_sample=False)
    assert completion.tokens == expected[0, len(prompt.tokens) :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("pair", [list(VARIANTS)[1]], indirect=True)
def test_their_cache_is_lost_at_the_switch(pair: Pair, prompts: dict[str, Prompt]):
    """Generating across the original context of 32 tokens, from 28.

    The reference without a cache agrees with ours to the end. With one, it drops the cache when 33
    tokens are there and feeds the last of them alone: its next token is that of a prompt of one.
    """
    choose(pair.theirs, None)
    tokens, new = prompts["text"].tokens[:28], 12
    without = list(tokens)
    for _ in range(new):
        logits = pair.theirs(input_ids=torch.tensor([without]), use_cache=False).logits
        without.append(int(logits[0, -1].argmax()))
    request = Request(tokens, max_new_tokens=new, temperature=0.0)
    [[completion]] = Engine(pair.ours).generate([request])
    assert completion.tokens == without[28:]

    given = torch.tensor([tokens])
    [theirs] = pair.theirs.generate(given, max_new_tokens=new, do_sample=False).tolist()
    assert theirs[:33] == without[:33]
    assert theirs[33:] != without[33:]
    alone = pair.theirs(
        input_ids=torch.tensor([theirs[32:33]]), position_ids=torch.tensor([[32]]), use_cache=False
    )
    assert theirs[33] == int(alone.logits[0, -1].argmax()) != without[33]


# --- Files --------------------------------------------------------------------------------------


def assert_same(model: Any, other: MultimodalModel) -> None:
    """Every number, and the choice of adapters."""
    assert isinstance(model, MultimodalModel)
    expected = dict(named_tensors(other))
    found = dict(named_tensors(model))
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {n: a.scale for n, a in adapters(model)} == {n: a.scale for n, a in adapters(other)}


def adapters(model: MultimodalModel) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "a_RD")]


def test_our_folder_loads_again(pair: Pair):
    loaded = load(pair.folder)
    assert loaded.config == pair.ours.config
    assert_same(loaded.model, pair.ours)


def test_a_folder_of_transformers_loads_here(pair: Pair, tmp_path: Path):
    """Their base in shards; each adapter in a folder of its own, as peft writes it."""
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    for file in (*tmp_path.rglob("*.safetensors"), tmp_path / "config.json"):
        file.unlink()
    plain = transformers.AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    plain.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name in ("vision", "speech"):
        with_adapter = peft.PeftModel.from_pretrained(plain, pair.folder / f"{name}-lora")
        with_adapter.save_pretrained(tmp_path / f"{name}-lora")
        plain = with_adapter.unload()
    loaded = load(tmp_path)
    assert loaded.config == pair.ours.config.model_copy(update={"init_std": loaded.config.init_std})
    assert_same(loaded.model, pair.ours)


REMOTE = (
    (r"(feed_forward_\w+)\.gate_up_proj", r"\1.net.0.linear"),
    (r"(feed_forward_\w+)\.down_proj", r"\1.net.2"),
    (r"(encoders\.\d+\.self_attn)\.([qkv])_proj", r"\1.linear_\2"),
    (r"(encoders\.\d+\.self_attn)\.o_proj", r"\1.linear_out"),
    ("img_projection_up", "img_projection.0"),
    ("img_projection_down", "img_projection.2"),
    ("global_img_feature_extensor", "glb_GN"),
    ("sub_img_feature_extensor", "sub_GN"),
    ("up_proj_for_speech", "audio_projection.speech.0"),
    ("down_proj_for_speech", "audio_projection.speech.2"),
    ("up_proj_for_vision_speech", "audio_projection.vision.0"),
    ("down_proj_for_vision_speech", "audio_projection.vision.2"),
    (r"^(model\.layers\.\d+\..*_proj)\.weight$", r"\1.base_layer.weight"),
)


def write_remote(folder: Path, native: Path) -> dict[str, Any]:
    """A folder of Microsoft's layout with the numbers of a native one; returns its config."""
    for file in native.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    tensors = load_file(native / "model.safetensors")
    for pattern, theirs in REMOTE:
        tensors = {re.sub(pattern, theirs, name): t for name, t in tensors.items()}
    values = json.loads((native / "config.json").read_text())
    tower, speech = values.pop("vision_config"), values.pop("audio_config")
    for name in ("vision", "speech"):
        for key, tensor in load_file(native / f"{name}-lora/adapter_model.safetensors").items():
            key = key.removeprefix("base_model.model.").replace(".weight", f".{name}.weight")
            tensors[key] = tensor
        about = json.loads((native / f"{name}-lora/adapter_config.json").read_text())
        values[f"{name}_lora"] = {
            "dp": 0.0, "layer": "...", "r": about["r"], "lora_alpha": about["lora_alpha"],
        }  # fmt: skip
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: t for k, t in tensors.items() if files[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    values |= {"model_type": "phi4mm", **remote_parts(speech), "vision_config": tower}
    (folder / "config.json").write_text(json.dumps(values))
    return values


def test_microsofts_layout(pair: Pair, tmp_path: Path):
    write_remote(tmp_path, pair.folder)
    loaded = load(tmp_path)
    assert loaded.config == pair.ours.config
    assert_same(loaded.model, pair.ours)


def test_faults_of_microsofts_layout(pair: Pair, tmp_path: Path):
    values = write_remote(tmp_path, pair.folder)
    values["embd_layer"]["image_embd_layer"]["hd_transform_order"] = "glb_sub"
    with pytest.raises(ConfigError, match=r"hd_transform_order is 'glb_sub'; only 'sub_glb'"):
        config_from_hf(values)
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".base_layer.weight"))
    save_file({**tensors, name.replace(".base_layer", ""): tensors[name].clone()}, file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][name.replace(".base_layer", "")] = file.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="twice: as .*base_layer"):
        load(tmp_path)


def test_a_lost_adapter_tensor(pair: Pair, tmp_path: Path):
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "speech-lora/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"missing speech-lora/model.layers.1.mlp.down_proj"):
        load(tmp_path)


def test_merged_into_its_base_it_is_no_adapter_any_more(pair: Pair, prompts, tmp_path: Path):
    model = load(pair.folder).model
    assert isinstance(model, MultimodalModel)
    choose_adapter(model, None)
    merge_lora(model, "vision", others="drop")
    with torch.no_grad():
        merged, expected = (our_logits(m, prompts["vision"]) for m in (model, pair.ours))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    save(tmp_path, Loaded(model, pair.loaded.tokenizer, pair.loaded.renderer))
    assert not list(tmp_path.glob("*-lora"))
