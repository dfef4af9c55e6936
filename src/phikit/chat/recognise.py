"""Which renderer speaks a checkpoint's template: found by rendering, never by guessing at names.

A published template is run in jinja's sandbox over short conversations; the renderer whose prompts
read the same is the one.
"""

from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from phikit.base.errors import ChatError
from phikit.chat.message import Message
from phikit.chat.render import RENDERERS, Renderer, renderer_for
from phikit.chat.tokenizer import Tokenizer

_PROBES = (
    [Message("user", "one")],
    [
        Message("system", "zero"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
    ],
)


def renderer_from_template(tokenizer: Tokenizer, template: str) -> Renderer:
    """The renderer whose prompts equal those of a chat template (jinja text).

    Raises:
        ChatError: no renderer speaks it.
    """
    for name in RENDERERS:
        try:
            renderer = renderer_for(tokenizer, name)
        except ChatError:  # the tokenizer lacks its special tokens
            continue
        prompts = [tokenizer.decode(renderer.prompt(p), keep_special=True) for p in _PROBES]
        if prompts == _rendered(template):
            return renderer
    raise ChatError(
        "no renderer speaks this checkpoint's chat template",
        fix=f"name the one to use: {', '.join(RENDERERS)}",
    )


def _rendered(template: str) -> list[str] | None:
    """The probes under the template; None where it fails."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    given: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        compiled = environment.from_string(template)
        return [
            compiled.render(
                messages=[{"role": m.role, "content": m.content} for m in probe], **given
            )
            for probe in _PROBES
        ]
    except Exception:  # a template is a stranger's program and may raise anything
        return None
