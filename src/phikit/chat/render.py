"""Renderers by name: messages to token ids and a loss mask, and ids back to a message.

What is unusual: the renderer is the truth and the jinja template is derived from it, so that other
programs see the same text. Four laws hold, and tests state them: the generation prompt is a prefix
of the training example; `parse` inverts rendering; each turn extends the last (earlier turns keep
their thinking); the template equals the renderer, and the published one wherever that has words.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

from phikit.base.errors import ChatError
from phikit.chat.chatml import ChatMLRenderer, Phi4Renderer
from phikit.chat.message import Message
from phikit.chat.phi import (
    PHI4_MINI_REASONING_IDENTITY,
    Phi3Renderer,
    PhiRenderer,
    phi3_small,
)
from phikit.chat.template import TemplateRenderer
from phikit.chat.template_process import TemplateProcess, variables
from phikit.chat.text import TextRenderer
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import Renderer

NANO_SPECIALS = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
)

# Phi-3's special tokens swallow newlines, so to its tokenizer Phi-4-mini's format is the same ids:
# recognition takes the first that fits, and Phi-3 stands first.
RENDERERS: Mapping[str, Callable[[Tokenizer], Renderer]] = {
    "phi3": Phi3Renderer,
    "phi3.5": partial(Phi3Renderer, name="phi3.5", system="unless empty"),
    "phi3-medium": partial(Phi3Renderer, name="phi3-medium", system="never"),
    "phi3-small": phi3_small,
    "phi4-mini": PhiRenderer,
    "phi4-mini-reasoning": partial(
        PhiRenderer, name="phi4-mini-reasoning", identity=PHI4_MINI_REASONING_IDENTITY
    ),
    "phi4": Phi4Renderer,
    "smollm2": ChatMLRenderer,
}
"""Renderers that need nothing but a tokenizer."""


def renderer_for(tokenizer: Tokenizer, name: str, *, template: str | None = None) -> Renderer:
    """The renderer of this name: one of `RENDERERS`, "text", "phi4-reasoning" or "template".

    Args:
        template: the checkpoint's chat template (jinja), which the latter two are made from.

    Raises:
        ChatError: the name is unknown, or the tokenizer lacks a token that the template needs, or
            the chat template is needed and missing or not of the kind the name says.
    """
    if name in RENDERERS:
        return RENDERERS[name](tokenizer)
    if name == TextRenderer.name:
        return TextRenderer(tokenizer)
    if name not in FROM_TEMPLATE:
        known = ", ".join([*RENDERERS, TextRenderer.name, *FROM_TEMPLATE])
        raise ChatError(f"unknown renderer {name!r}", fix=f"choose from: {known}")
    if template is None:
        raise ChatError(
            f"the renderer {name!r} is made from the checkpoint's chat template, and there is none",
            fix="put chat_template.jinja of the published checkpoint into the folder",
        )
    return FROM_TEMPLATE[name](tokenizer, template)


def _phi4_reasoning(tokenizer: Tokenizer, template: str) -> Renderer:
    """Phi-4 with the system text that the template writes by itself."""
    process = TemplateProcess(template)
    [text] = process.render([variables([Message("user", "one")], ask=True)])
    process.close()
    turn = r"<\|im_start\|>system<\|im_sep\|>(.*)<\|im_end\|><\|im_start\|>user<\|im_sep\|>one"
    found = re.match(turn, text, re.DOTALL)
    if found is None:
        raise ChatError(
            "this chat template opens with no system text, so it is not Phi-4-reasoning"
        )
    return Phi4Renderer(tokenizer, name="phi4-reasoning", opening=found[1])


FROM_TEMPLATE: Mapping[str, Callable[[Tokenizer, str], Renderer]] = {
    "phi4-reasoning": _phi4_reasoning,
    "template": TemplateRenderer,
}
"""Renderers that are made from the checkpoint's own chat template."""
