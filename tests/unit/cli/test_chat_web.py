"""What the page offers: the model asked for with its adapters, and what else is here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.modalities import MODALITIES, taught

from phikit.cli.chat_web import _offered
from phikit.generate import language_model
from phikit.nn.lora import attach_lora, merge_lora
from phikit.serve.models import ModelShelf
from phikit.weights.adapter import save_adapter
from phikit.weights.load import Loaded
from phikit.weights.save import save

ASK = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(loaded: Loaded, here: Path) -> Path:
    save(here / "base", loaded)
    return here / "base"


@pytest.fixture
def adapter(base: Path, loaded: Loaded, here: Path) -> Path:
    """A folder in PEFT's layout that changes what the model says; merged it is in "merged"."""
    network = loaded.model
    weights = attach_lora(network, name="mine", targets=("qkv_proj", "down_proj"), rank=4, alpha=8)
    with torch.no_grad():
        for weight in weights:
            weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(here / "mine", network, name="mine")
    merge_lora(network, "mine")
    save(here / "merged", loaded)
    return here / "mine"


def said(folder: Path) -> list[int]:
    return language_model.load(folder).generate(ASK, max_new_tokens=12, temperature=0).tokens


def test_a_model_that_was_taught_takes_images_and_sounds(loaded: Loaded, here: Path):
    save(here / "text", loaded)
    taught(loaded.model, *MODALITIES[:2])
    save(here / "taught", loaded)
    for name, can in (("text", False), ("taught", True)):
        _, [choice, *_] = _offered(str(here / name), None, {})
        assert (choice.sees, choice.hears) == (can, can)
        assert choice.adapters == (("vision", "speech") if can else ())


def test_an_adapter_is_a_choice_beside_the_bare_model(base: Path, adapter: Path):
    name = str(base)
    sources, [choice, *_] = _offered(name, None, {"mine": adapter})
    assert choice.name == name and choice.adapters == ("mine",)
    assert not (choice.sees or choice.hears)
    plain, merged = said(base), said(base.with_name("merged"))
    assert plain != merged
    shelf = ModelShelf(sources)
    with shelf.acquire(name) as served:
        asked = served.loaded.request(ASK, max_new_tokens=12, temperature=0)
        for adapter_name, expected in ((None, plain), ("mine", merged), (None, plain)):
            with served.worker.submit(replace(asked, adapter=adapter_name)) as stream:
                assert [event.token for event in stream] == expected, adapter_name
    shelf.close()
