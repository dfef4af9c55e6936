"""What `phikit.load` returns: text and messages in, replies out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import phikit
from phikit.base.errors import ChatError, ConfigError, ContextOverflowError, WeightsError
from phikit.chat.message import Message
from phikit.chat.render import NANO_SPECIALS, renderer_for
from phikit.chat.tokenizer import train_tokenizer
from phikit.generate.language_model import LanguageModel, of
from phikit.weights.load import Loaded, load
from phikit.weights.save import save


@pytest.fixture(scope="module")
def folder(tiny_model, nano_tokenizer, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    save(place, Loaded(tiny_model(max_context=256), nano_tokenizer, renderer))
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return phikit.load(folder)


def test_it_is_what_weights_load_gives_and_more(folder: Path, model: LanguageModel, tmp_path: Path):
    plain = load(folder)
    assert (model.config, model.path) == (plain.config, plain.path)
    ids_BT = torch.arange(10).view(2, 5)
    assert torch.equal(model.model(ids_BT), plain.model(ids_BT))
    assert model.model(ids_BT).shape == (2, 5, 300)
    save(tmp_path, model)
    assert torch.equal(phikit.load(str(tmp_path)).model(ids_BT), plain.model(ids_BT))


def test_importing_phikit_loads_no_torch():
    script = (
        "import sys, os, phikit; assert 'torch' not in sys.modules; os.environ['GOMP_SPINCOUNT']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError):
        _ = phikit.lode  # pyright: ignore[reportAttributeAccessIssue]


def test_a_text_is_continued_and_messages_are_answered(model: LanguageModel):
    text = model.generate("The answer is", max_new_tokens=12)
    assert text.prompt_tokens == len(model.tokenizer.encode("The answer is"))
    assert text.text == str(text) == model.tokenizer.decode(text.tokens)
    assert len(text.tokens) == len(text.log_probs) <= 12
    assert text.thinking is None

    asked = [{"role": "user", "content": "Hello"}]
    answer = model.generate(asked, max_new_tokens=12)
    assert answer == model.generate([Message("user", "Hello")], max_new_tokens=12)
    assert answer.prompt_tokens == len(model.renderer.prompt([Message("user", "Hello")]))
    parsed = model.renderer.parse(answer.tokens)
    assert (answer.text, answer.thinking) == (parsed.content, parsed.thinking)


def test_sampling_follows_seed_and_temperature(model: LanguageModel):
    def said(**options) -> list[int]:
        return model.generate("The answer", max_new_tokens=8, **options).tokens

    assert said() == said(temperature=0.0, seed=5)
    assert said(temperature=2.0, seed=1) == said(temperature=2.0, seed=1)
    assert said(temperature=2.0, seed=1) != said(temperature=2.0, seed=2)
    assert said(temperature=2.0, top_k=1) == said()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_named(model: LanguageModel, options, words: str):
    with pytest.raises(ConfigError, match=words):
        model.generate("a", **options)


def test_mistakes_in_prompts_are_typed(model: LanguageModel):
    with pytest.raises(ContextOverflowError, match="context is 256"):
        model.generate("a b c d " * 100)
    with pytest.raises(ContextOverflowError, match="empty"):
        model.generate("")
    with pytest.raises(ChatError, match="keys.*rol"):
        model.generate([{"rol": "user", "content": "a"}])
    with pytest.raises(ChatError, match="role 'human'"):
        model.generate([{"role": "human", "content": "a"}])


def test_dtype_by_name_or_not_at_all(folder: Path):
    assert phikit.load(folder, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16
    assert phikit.load(folder, dtype=torch.float16).model.lm_head.weight.dtype == torch.float16
    with pytest.raises(ConfigError, match="unknown dtype 'int3'"):
        phikit.load(folder, dtype="int3")
    with pytest.raises(WeightsError, match="does not exist"):
        phikit.load(folder / "absent")


def test_a_model_made_here_can_answer_too(tiny_model, nano_tokenizer):
    made = Loaded(tiny_model(), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    assert of(made).model is made.model
    assert of(made).generate("a", max_new_tokens=2).tokens


def test_images_and_audio_need_a_model_for_them(model: LanguageModel):
    asked = [{"role": "user", "content": "What is this?"}]
    with pytest.raises(ChatError, match="the model reads text only"):
        model.generate(asked, images=[b"x"])
    with pytest.raises(ChatError, match="the model reads text only"):
        model.generate(asked, audio=[b"x"])


@pytest.fixture(scope="module")
def seeing(tiny_multimodal) -> LanguageModel:
    """A random Phi-4-multimodal with a vocabulary of its own."""
    specials = [*NANO_SPECIALS, "<|endoftext10|>", "<|endoftext11|>"]
    tokenizer = train_tokenizer(
        ["what is this and what do you hear"] * 9, size=280, specials=specials
    )
    image, audio = (tokenizer.special(f"<|endoftext{number}|>") for number in (10, 11))
    model = tiny_multimodal(image_token=image, audio_token=audio)
    return LanguageModel(model, tokenizer, renderer_for(tokenizer, "phi4-mini"))


def test_a_question_about_an_image_and_a_clip(seeing: LanguageModel, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", noise[:, :, 0].ravel() / 255.0 - 0.5, 16_000)
    files = {"images": [tmp_path / "a.png"], "audio": [(tmp_path / "a.wav").read_bytes()]}
    asked = [{"role": "user", "content": "what is this"}]
    placed = [{"role": "user", "content": "<|image_1|><|audio_1|>what is this"}]
    reply = seeing.generate(asked, max_new_tokens=4, **files)
    assert reply == seeing.generate(placed, max_new_tokens=4, **files)
    request = seeing.request(asked, **files)
    assert request.media is not None
    assert [len(part) for part in request.media.tokens] == [1, 1]
    assert reply.prompt_tokens == len(seeing.request(asked).prompt) + sum(
        map(sum, request.media.tokens)
    )
    with pytest.raises(ChatError, match="need a conversation"):
        seeing.generate("what is this", **files)
    with pytest.raises(ChatError, match="there is no file"):
        seeing.generate(asked, images=[tmp_path / "none.png"])
