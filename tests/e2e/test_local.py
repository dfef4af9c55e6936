"""A practitioner's evening: list, check, talk, look back, export, tidy up."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.chat.vocabularies import small
from tests.unit.serve.house import at_hand, running
from tests.unit.weights.test_gguf_out import SIZE, with_split

from phikit.base.in_use import in_use
from phikit.base.servers import announced
from phikit.chat.render import renderer_for
from phikit.cli.locate import complete_model, complete_served
from phikit.generate.language_model import LanguageModel
from phikit.models.dense import DenseModel
from phikit.nn.quantised import QuantConfig
from phikit.serve.guard import Policy
from phikit.serve.keys import Keys
from phikit.serve.models import ModelShelf
from phikit.weights.inventory import pulled_names
from phikit.weights.load import Loaded, load
from phikit.weights.quantise import quantise
from phikit.weights.save import save

Phikit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folders, and a working folder with nothing in it."""
    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.delenv("PHIKIT_HISTORY")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def loaded(tiny_model: Callable[..., DenseModel]) -> Loaded:
    tokenizer = with_split(small("phi4-mini"), "gpt-4o")
    network = tiny_model(**SIZE, partial_rotary=1.0)
    return Loaded(network, tokenizer, renderer_for(tokenizer, "phi4-mini"))


@pytest.fixture
def model(loaded: Loaded, home: Path) -> Path:
    """A model folder among the runs."""
    save(Path("runs/tiny"), loaded)
    return Path("runs/tiny")


@pytest.fixture
def pulled(model: Path, home: Path) -> str:
    """The same in the hub's cache, and a data set beside it."""
    repo = home / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(model, repo / "snapshots" / "c0ffee")
    (home / "hub" / "datasets--someone--data" / "snapshots" / "1").mkdir(parents=True)
    return "someone/tiny"


def test_ls_shows_and_rm_removes_only_that(phikit: Phikit, pulled: str, model: Path, home: Path):
    listed = json.loads(phikit("ls", "--json").stdout)
    found = {entry["name"]: entry for entry in listed if entry["origin"] != "package"}
    assert list(found) == [pulled, "runs/tiny"]
    for entry in found.values():
        assert entry["family"] == "dense" and entry["dtype"] == "float32"
        assert entry["parameters"] == load(model).model.model.embed_tokens.weight.numel() + sum(
            p.numel() for n, p in load(model).model.named_parameters() if "embed" not in n
        )
    for outside in (home / "work", "../work/runs/tiny"):
        refused = phikit("rm", outside, "--yes")
        assert refused.returncode == 1 and "not a model" in refused.stderr
    kept = phikit("rm", pulled, given="n\n")
    assert kept.returncode == 1 and "remove for good?" in kept.stderr
    assert phikit("rm", pulled, "runs/tiny", given="y\n").returncode == 0
    assert not model.exists() and not (home / "hub" / "models--someone--tiny").exists()
    assert (home / "hub" / "datasets--someone--data").exists()


def test_ls_lists_what_is_not_whole(phikit: Phikit, pulled: str, home: Path):
    [weights] = (home / "hub" / "models--someone--tiny").rglob("model.safetensors")
    weights.unlink()
    config = Path("runs/broken/config.json")
    config.parent.mkdir()
    config.write_text("{")
    listed = {entry["name"]: entry for entry in json.loads(phikit("ls", "--json").stdout)}
    assert listed[pulled]["note"] == "its weights are not here"
    assert listed["runs/broken"]["family"] is None
    if "smollm2" in listed:
        assert "pip uninstall" in phikit("rm", "smollm2", "--yes").stderr
    shown = phikit("ls").stdout
    assert pulled in shown and "its weights are not here" in shown
    outside = home / "precious"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    Path("runs/link").symlink_to(outside)
    refused = phikit("rm", "runs/link", "--yes")
    assert refused.returncode == 1 and "is a link" in refused.stderr and outside.exists()


def test_a_repository_of_gguf_files(phikit: Phikit, model: Path, home: Path):
    """One file goes by the repository's id, each of several by its own name."""
    folder = home / "hub" / "models--someone--packed" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("c0ffee")

    def names() -> list[str]:
        rows = json.loads(phikit("ls", "--json").stdout)
        return [row["name"] for row in rows if row["origin"] == "hub" and row["note"] is None]

    to = ("--to", "gguf", "--no-modelfile", "--quant")
    assert phikit("export", model, folder / "tiny-Q8_0.gguf", *to, "q8_0").returncode == 0
    assert names() == pulled_names() == complete_model("some") == ["someone/packed"]
    asked = ("Hello", "--max-new-tokens", 2, "--no-history")
    assert phikit("generate", "someone/packed", *asked).returncode == 0
    assert phikit("export", model, folder / "tiny-F16.gguf", *to, "f16").returncode == 0
    both = ["someone/packed/tiny-F16.gguf", "someone/packed/tiny-Q8_0.gguf"]
    assert names() == pulled_names() == both
    refused = phikit("generate", "someone/packed", *asked)
    assert refused.returncode == 1 and both[0] in refused.stderr
    assert phikit("generate", both[1], *asked).returncode == 0
    absent = phikit("generate", "someone/packed/other.gguf", *asked)
    assert "phikit pull someone/packed --file other.gguf" in absent.stderr
    assert phikit("rm", both[0], "--yes").returncode == 0
    assert names() == ["someone/packed"]
    assert phikit("rm", "someone/packed", "--yes").returncode == 0
    assert not folder.exists()


def test_a_run_in_progress_stays(phikit: Phikit, model: Path):
    # Of another process, so far as the lock can tell: it belongs to the open folder.
    with in_use(model):
        refused = phikit("rm", model, "--yes")
        assert refused.returncode == 1 and "another process works in runs/tiny" in refused.stderr
        assert "stop it first" in refused.stderr
    assert (model / "config.json").exists()
    assert phikit("rm", model, "--yes").returncode == 0


def test_ps_tells_who_serves_what(phikit: Phikit, loaded: Loaded, monkeypatch: pytest.MonkeyPatch):
    assert "No server runs here" in phikit("ps").stdout
    with announced("http://127.0.0.1:9", ["tiny"]):
        [row] = json.loads(phikit("ps", "--json").stdout)
        assert row["state"] == "silent" and row["models"] == ["tiny"] and row["loaded"] is None
        assert "http://127.0.0.1:9" in phikit("ps").stdout
    speaker = LanguageModel(loaded.model, loaded.tokenizer, loaded.renderer)
    shelf = ModelShelf({"tiny": at_hand(speaker), "other": at_hand(speaker)})
    key = "k" * 20
    with running(shelf, policy=Policy(Keys([key]))) as url, announced(url, shelf.names):
        [row] = json.loads(phikit("ps", "--json").stdout)
        assert row["state"] == "wants a key" and row["loaded"] is None
        monkeypatch.setenv("PHIKIT_API_KEYS", key)
        assert json.loads(phikit("ps", "--json").stdout)[0]["loaded"] == []
        with shelf.acquire("tiny") as served:
            request = speaker.request("Hello", max_new_tokens=20)
            held = threading.Event()
            busy = served.worker.call(held.wait)
            with served.worker.submit(request):
                [row] = json.loads(phikit("ps", "--json").stdout)
                held.set()
            busy.result()
        [model] = row["loaded"]
        assert row["state"] == "ok" and model["name"] == "tiny" and model["waiting"] == 1
        assert model["size"] == served.size > 0
        shown = phikit("ps").stdout
        assert "not loaded" in shown and "0 running" in shown and "other" in shown


def test_doctor_says_what_to_do(phikit: Phikit, model: Path, monkeypatch: pytest.MonkeyPatch):
    done = phikit("doctor", model, "--json")
    found = {row["subject"]: row for row in json.loads(done.stdout)}
    assert {"versions", "threads", "kernels", "templates", "chat", "speed"} <= found.keys()
    assert found["chat"]["level"] == found["tokenizer"]["level"] == "ok"
    assert done.returncode == int(any(row["level"] == "fail" for row in found.values()))
    monkeypatch.setattr("phikit.cli.doctor.available_memory", lambda: 1000)
    small = phikit("doctor", model)
    assert small.returncode == 1
    assert "phikit quantize" in small.stdout
    absent = phikit("doctor", "nowhere")
    assert absent.returncode == 1 and "neither a run nor a model" in absent.stdout


def test_what_was_said_is_kept_and_can_be_found(phikit: Phikit, model: Path, home: Path):
    assert "Nothing is kept" in phikit("history").stdout
    said = phikit("chat", model, "--max-new-tokens", 3, given="What is 3 + 4?\n/undo\nAnd 5 + 2?\n")
    assert said.returncode == 0, said.stderr
    asked = ("generate", model, "A rare word", "--max-new-tokens", 3)
    assert phikit(*asked, "--json").returncode == 0
    assert phikit(*asked, "--no-history").returncode == 0
    assert phikit("generate", model, "-", "--chat", given="From a pipe").returncode == 0
    listed = phikit("history").stdout
    assert listed.count("runs/tiny") == 3
    [line] = phikit("history", "--search", "rare WORD").stdout.splitlines()
    id_ = line.split()[0]
    records = phikit("history", id_[:6], "--as", "jsonl").stdout.splitlines()
    assert [json.loads(record)["role"] for record in records] == ["user", "assistant"]
    assert json.loads(records[1])["tokens"] == 3
    page = phikit("history", "--as", "markdown").stdout
    assert "## user\n\nAnd 5 + 2?" in page and "3 + 4" not in page
    assert phikit("history", id_, "--delete", given="n\n").returncode == 1
    assert "deleted 1 conversation\n" in phikit("history", id_, "--delete", "--yes").stdout
    assert "no conversation" in phikit("history", id_).stderr
    assert "deleted 2" in phikit("history", "--delete", "--yes").stdout


def test_log_probs_are_there_on_demand(phikit: Phikit, model: Path):
    asked = ("generate", model, "Hello", "--max-new-tokens", 4, "--json")
    plain = json.loads(phikit(*asked).stdout)
    assert "log_probs" not in plain and plain["reply_tokens"] == len(plain["tokens"])
    more = json.loads(phikit(*asked, "--log-probs", 2).stdout)
    assert len(more["log_probs"]) == len(more["tokens"])
    assert all(len(place) == 2 for place in more["top_log_probs"])
    assert "add --json" in phikit("generate", model, "Hello", "--log-probs", 2).stderr


def test_guessing_ahead_changes_no_text(phikit: Phikit, model: Path):
    asked = ("generate", model, "What is 12 + 7? What is", "--max-new-tokens", 12)
    plain = phikit(*asked).stdout
    assert phikit(*asked, "--lookup").stdout == plain
    assert phikit(*asked, "--draft", model).stdout == plain
    assert phikit(*asked, "--cache", "int8").returncode == 0
    assert "give one of them" in phikit(*asked, "--lookup", "--draft", model).stderr


def test_export_writes_both_files_or_none(phikit: Phikit, model: Path, loaded: Loaded):
    done = phikit("export", model, "tiny.gguf", "--to", "gguf", "--quant", "q8_0", "--context", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tiny.gguf\ntiny.Modelfile\n"
    page = Path("tiny.Modelfile").read_text()
    assert "FROM ./tiny.gguf\n" in page and "PARAMETER num_ctx 64\n" in page
    assert 'PARAMETER stop "<|end|>"\n' in page and "<|{{ .Role }}|>{{ .Content }}" in page
    assert load("tiny.gguf").renderer.name == "phi4-mini"
    again = phikit("export", model, "other.gguf", "--to", "gguf", "--quant", "int3")
    assert again.returncode == 1 and "q8_0" in again.stderr
    assert "is there already" in phikit("export", model, "tiny.gguf", "--to", "gguf").stderr
    jinja = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    shutil.copytree(model, "odd")
    Path("odd/chat_template.jinja").write_text(jinja)
    about = json.loads(Path("odd/tokenizer_config.json").read_text())
    about["phikit_renderer"] = "template"
    Path("odd/tokenizer_config.json").write_text(json.dumps(about))
    refused = phikit("export", "odd", "odd.gguf", "--to", "gguf")
    assert refused.returncode == 1 and "--no-modelfile" in refused.stderr
    assert not list(Path().glob("odd.*")) and not list(Path().glob(".*"))
    assert phikit("export", "odd", "odd.gguf", "--to", "gguf", "--no-modelfile").returncode == 0


@torch.no_grad()
def test_export_of_a_quantised_model(phikit: Phikit, loaded: Loaded):
    quantise(loaded, QuantConfig(bits=4))
    tokens = torch.arange(30)[None]
    expected = loaded.model(tokens)
    save(Path("int4"), loaded)
    refused = phikit("export", "int4", "plain", "--to", "hf")
    assert refused.returncode == 1 and "--dequantize" in refused.stderr
    done = phikit("export", "int4", "plain", "--to", "hf", "--dequantize")
    assert done.returncode == 0, done.stderr
    plain = load("plain").model
    assert plain.quantisation is None
    torch.testing.assert_close(plain(tokens), expected, atol=1e-4, rtol=0)
    assert phikit("export", "int4", "int4.gguf", "--to", "gguf").returncode == 0
    assert "Q4_0" in phikit("show", "int4.gguf").stdout


def test_a_shell_completes_verbs_models_and_recipes(
    shell: Phikit, pulled: str, home: Path, monkeypatch: pytest.MonkeyPatch
):
    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        cache = {"HF_HUB_CACHE": str(home / "hub")}
        return shell(**words, **cache, _PHIKIT_COMPLETE="complete_bash").stdout.split()

    assert "generate" in completed("phikit gen")
    for verb in ("show", "bench", "quantize", "serve", "eval", "export"):
        assert completed(f"phikit {verb} so") == [pulled], verb
    assert completed("phikit report ru") == ["runs/tiny"]
    assert completed("phikit run nano") == ["nano_reasoner"]
    assert completed("phikit train nano_reasoner.p") == ["nano_reasoner.pretrain"]
    assert complete_served("mine=so") == [f"mine={pulled}"]
