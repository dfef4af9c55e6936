"""What `phikit.load` returns: text and messages in, replies out."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

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
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"top_log_probs": -1}, "top_log_probs is -1"),
        ({"top_log_probs": 101}, "top_log_probs is 101"),
        ({"stop": [""]}, "stop is"),
        ({"regex": "(a"}, "unclosed group"),
        ({"schema": {"type": "strin"}}, "strin"),
        ({"schema": dict}, "no JSON object"),
        ({"schema": {}, "regex": "a"}, "a schema and a regex"),
    ],
)
def test_settings_that_make_no_sense_are_named(model: LanguageModel, options, words: str):
    with pytest.raises(ConfigError, match=words):
        model.generate("a", **options)


def test_a_reply_ends_before_a_stop_string(model: LanguageModel):
    free = model.generate("The answer", max_new_tokens=30, temperature=2.0, seed=3)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    reply = model.generate("The answer", max_new_tokens=30, temperature=2.0, seed=3, stop=stop)
    assert reply.text == free.text[: free.text.index(stop)]
    assert reply.finish_reason == "stop"
    assert reply.tokens == free.tokens[: len(reply.tokens)]
    assert stop in model.tokenizer.decode(reply.tokens)
    assert stop not in model.tokenizer.decode(reply.tokens[:-1])
    several = model.generate(
        "The answer", max_new_tokens=30, temperature=2.0, seed=3, stop=["\0 never", stop]
    )
    assert several == reply


@pytest.mark.parametrize("prompt", ["The answer", [{"role": "user", "content": "Hello"}]], ids=str)
def test_a_stream_is_the_reply_in_pieces(model: LanguageModel, prompt):
    for seed in range(4):
        options = {"max_new_tokens": 60, "temperature": 1.5, "seed": seed}
        whole = model.generate(prompt, **options)
        assert "".join(model.stream(prompt, **options)) == whole.text
        stop = whole.text[20:22] or "x"
        shown = ""
        for piece in model.stream(prompt, **options, stop=stop):
            assert piece
            shown += piece
            assert stop not in shown
        assert shown == model.generate(prompt, **options, stop=stop).text


def test_a_stream_refuses_mistakes_at_once_and_may_be_left(model: LanguageModel):
    with pytest.raises(ConfigError, match="top_k is 0"):
        model.stream("a", top_k=0)
    for _ in model.stream("The answer", max_new_tokens=100, temperature=1.0):
        assert model.engine.busy
        break
    assert not model.engine.busy


def test_likeliest_tokens_and_penalties_are_passed_on(model: LanguageModel):
    reply = model.generate("The answer", max_new_tokens=5, top_log_probs=3)
    assert [top[0][0] for top in reply.top_log_probs] == reply.tokens
    assert [top[0][1] for top in reply.top_log_probs] == pytest.approx(reply.log_probs)
    assert all(len(top) == 3 for top in reply.top_log_probs)
    said = model.generate("The answer", max_new_tokens=40, repetition_penalty=1e6).tokens
    assert len(set(said)) == len(said)
    assert model.generate("a", max_new_tokens=6, temperature=3.0, min_p=1.0).tokens == (
        model.generate("a", max_new_tokens=6).tokens
    )


def test_replies_with_a_schema_or_a_regex(model: LanguageModel):
    class Answer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        total: int = Field(ge=0, le=999)
        unit: Literal["apples", "pears"]

    asked = [{"role": "user", "content": "How many apples?"}]
    for seed in range(4):
        options = {"temperature": 1.0, "seed": seed, "max_new_tokens": 200}
        for prompt in ("Result: ", asked):
            # A random model would think for ever.
            reply = model.generate(prompt, schema=Answer, may_think=False, **options)
            assert reply.finish_reason == "stop"
            Answer.model_validate_json(reply.text)
            pieces = model.stream(prompt, schema=Answer, may_think=False, **options)
            assert "".join(pieces) == reply.text
        reply = model.generate("Result: ", regex=r"[0-9]{1,3} (apples|pears)", **options)
        assert re.fullmatch(r"[0-9]{1,3} (apples|pears)", reply.text)
    schema = Answer.model_json_schema()
    assert model.generate("a", schema=schema).text == model.generate("a", schema=Answer).text


def test_a_model_that_thinks_may_do_so_before_its_answer(model: LanguageModel):
    asked = [{"role": "user", "content": "How many apples?"}]
    think = model.tokenizer.special("<think>")

    def allowed(prompt, **options) -> list[int]:
        constraint = model.request(prompt, regex="[0-9]", **options).constraint
        assert constraint is not None
        return constraint().allowed().nonzero()[:, 0].tolist()

    assert think in allowed(asked)
    assert think not in allowed(asked, may_think=False)
    assert think not in allowed("How many apples?")


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
    assert reply.tokens == seeing.generate(placed, max_new_tokens=4, **files).tokens
    request = seeing.request(asked, **files)
    assert request.media is not None
    images, audios, others, _ = request.media.tokens
    assert [len(images), len(audios), len(others)] == [1, 1, 0]
    taken = sum(images) + sum(audios)
    assert reply.prompt_tokens == len(seeing.request(asked).prompt) + taken
    with pytest.raises(ChatError, match="need a conversation"):
        seeing.generate("what is this", **files)
    with pytest.raises(ChatError, match="there is no file"):
        seeing.generate(asked, images=[tmp_path / "none.png"])
