"""Small models behind a server, clients for it, and media to send."""

import io
import wave
from collections.abc import Callable, Iterator

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from tests.unit.serve.house import House, at_hand, make_tool_tokenizer, running, small_engine

from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.language_model import LanguageModel
from phikit.serve.models import ModelShelf


@pytest.fixture(scope="session")
def tool_tokenizer() -> Tokenizer:
    """A small tokenizer with the special tokens of Phi-4-multimodal."""
    return make_tool_tokenizer()


@pytest.fixture(scope="session")
def tiny(tiny_model, tool_tokenizer) -> LanguageModel:
    """A random model that reads text."""
    model = tiny_model(vocab_size=310, max_context=1024, tie_embeddings=False)
    return LanguageModel(model, tool_tokenizer, renderer_for(tool_tokenizer, "phi4-mini"))


@pytest.fixture(scope="session")
def seeing(tiny_multimodal, tool_tokenizer) -> LanguageModel:
    """A random model that sees and hears."""
    special = tool_tokenizer.special
    model = tiny_multimodal(
        image_token=special("<|endoftext10|>"), audio_token=special("<|endoftext11|>")
    )
    return LanguageModel(model, tool_tokenizer, renderer_for(tool_tokenizer, "phi4-mini"))


@pytest.fixture(scope="module")
def house(tiny, seeing) -> Iterator[House]:
    """A server with both models and short limits."""
    sources = {"tiny": at_hand(tiny), "org/seeing": at_hand(seeing)}
    shelf = ModelShelf(sources, make_engine=small_engine, max_queue=100)
    with running(shelf) as url:
        yield House(url, shelf, tiny)


@pytest.fixture
def http(house: House) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=house.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def png() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def wav() -> bytes:
    samples = (8000 * np.sin(np.arange(8000) / 5)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


@pytest.fixture(scope="session")
def alone() -> Callable[..., str]:
    """What the engine alone says to a user's text, greedily."""

    def say(loaded: LanguageModel, text: str, length: int) -> str:
        messages = [{"role": "user", "content": text}]
        with torch.inference_mode():
            return str(loaded.generate(messages, max_new_tokens=length))

    return say
