import pytest
from tests.unit.chat.vocabularies import small

from phikit.base.errors import ChatError
from phikit.chat.media import MediaTokens
from phikit.chat.message import Message
from phikit.chat.render import renderer_for

TOKENIZER = small("phi4-mini")
IMAGE, AUDIO = TOKENIZER.special("<|endoftext10|>"), TOKENIZER.special("<|endoftext11|>")


@pytest.fixture(scope="module")
def renderer():
    return renderer_for(TOKENIZER, "phi4-mini")


def text(ids) -> str:
    return TOKENIZER.decode(ids, keep_special=True)


def test_placeholders_become_runs_of_their_tokens(renderer):
    messages = [
        Message("user", "<|image_1|><|audio_1|>What?"),
        Message("assistant", "<|image_1|> is no picture here"),
        Message("user", "And <|image_2|>?"),
    ]
    media = MediaTokens(images=[3, 1], audios=[2])
    prompt = renderer.prompt(messages, media=media)
    assert prompt.count(IMAGE) == 4 and prompt.count(AUDIO) == 2
    assert text(prompt) == (
        "<|user|>" + "<|endoftext10|>" * 3 + "<|endoftext11|>" * 2 + "What?<|end|>"
        "<|assistant|><|image_1|> is no picture here<|end|>"
        "<|user|>And <|endoftext10|>?<|end|><|assistant|>"
    )
    example = renderer.example(messages[:2], media=MediaTokens(images=[3], audios=[2]))
    assert example.tokens.tolist() == prompt[: len(example)]


def test_without_media_a_placeholder_is_text(renderer):
    prompt = renderer.prompt([Message("user", "<|image_1|> <|endoftext10|>")])
    assert IMAGE not in prompt
    assert text(prompt) == "<|user|><|image_1|> <|endoftext10|><|end|><|assistant|>"


@pytest.mark.parametrize(
    ("content", "media"),
    [
        ("<|image_2|><|image_1|>", MediaTokens(images=[1, 1])),
        ("<|image_1|><|image_1|>", MediaTokens(images=[1, 1])),
        ("<|image_1|>", MediaTokens(audios=[1])),
        ("<|image_1|>", MediaTokens(images=[1, 1])),
        ("none", MediaTokens(audios=[1])),
        ("<|audio_0|>", MediaTokens(audios=[1])),
    ],
)
def test_placeholders_that_do_not_fit(renderer, content: str, media: MediaTokens):
    with pytest.raises(ChatError, match="stand"):
        renderer.prompt([Message("user", content)], media=media)


def test_a_model_without_media():
    with pytest.raises(ChatError, match="phi4 has no tokens for images or audio"):
        renderer_for(small("phi4"), "phi4").prompt([Message("user", "a")], media=MediaTokens())
