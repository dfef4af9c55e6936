"""A text model that was taught to see and hear, behind both APIs, from its folder."""

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from tests.modalities import MODALITIES, taught
from tests.unit.serve.house import running, small_engine

from phikit.chat.render import renderer_for
from phikit.generate.language_model import LanguageModel, load
from phikit.serve.models import ModelShelf, source
from phikit.weights.save import save
from phikit.weights.surgery import detach

QUESTION = "What is 12 + 7?"


@pytest.fixture(scope="module")
def folders(
    tiny_model, tool_tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One that sees and hears, one that sees, and one that reads."""
    root = tmp_path_factory.mktemp("models")
    model = taught(
        tiny_model(vocab_size=310, max_context=1024, tie_embeddings=False), *MODALITIES[:2]
    )
    loaded = LanguageModel(model, tool_tokenizer, renderer_for(tool_tokenizer, "phi4-mini"))
    for name, gone in (("both", None), ("sees", "speech"), ("reads", "vision")):
        if gone is not None:
            detach(model, gone)
        save(root / name, loaded)
    return {name: root / name for name in ("both", "sees", "reads")}


@pytest.fixture(scope="module")
def client(folders) -> Iterator[httpx2.Client]:
    sources = {name: source(folder) for name, folder in folders.items()}
    shelf = ModelShelf(sources, make_engine=small_engine)
    with running(shelf) as url, httpx2.Client(base_url=url, timeout=30) as client:
        yield client


def ask(client: httpx2.Client, model: str, *parts: dict) -> httpx2.Response:
    content = [*parts, {"type": "text", "text": QUESTION}]
    body = {"model": model, "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={**body, "messages": messages})


def image_part(png: bytes) -> dict:
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sound_part(wav: bytes) -> dict:
    data = base64.b64encode(wav).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def test_openai(client, folders, png: bytes, wav: bytes):
    loaded = load(folders["both"])
    for images, sounds in (((), ()), ((png,), ()), ((), (wav,)), ((png,), (wav,))):
        parts = (*map(image_part, images), *map(sound_part, sounds))
        answer = ask(client, "both", *parts)
        assert answer.status_code == 200, answer.text
        alone = loaded.generate(
            [{"role": "user", "content": QUESTION}], images=images, audio=sounds, max_new_tokens=6
        )
        assert answer.json()["choices"][0]["message"]["content"] == alone.text


def test_ollama(client, folders, png: bytes):
    loaded = load(folders["both"])
    image = base64.b64encode(png).decode()
    turn = {"role": "user", "content": QUESTION, "images": [image]}
    body = {"model": "both", "stream": False, "options": {"temperature": 0, "num_predict": 6}}
    answer = client.post("/api/chat", json={**body, "messages": [turn]})
    assert answer.status_code == 200, answer.text
    alone = loaded.generate([{"role": "user", "content": QUESTION}], images=[png], max_new_tokens=6)
    assert answer.json()["message"]["content"] == alone.text
    for name, can in (("both", {"vision", "audio"}), ("sees", {"vision"}), ("reads", set())):
        shown = client.post("/api/show", json={"model": name}).json()
        assert {*shown["capabilities"]} & {"vision", "audio"} == can


def test_a_model_without_a_sense_refuses(client, png: bytes, wav: bytes):
    for name, part in (
        ("reads", image_part(png)), ("reads", sound_part(wav)), ("sees", sound_part(wav))
    ):  # fmt: skip
        answer = ask(client, name, part)
        assert answer.status_code == 400, answer.text
        assert "text only" in answer.text or "which the model has not" in answer.text
    assert ask(client, "sees", image_part(png)).status_code == 200


def test_what_was_attached_counts_as_memory(folders):
    assert source(folders["reads"]).size() < source(folders["sees"]).size()
    assert source(folders["sees"]).size() < source(folders["both"]).size()
