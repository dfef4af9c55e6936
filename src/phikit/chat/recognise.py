"""Which renderer speaks a checkpoint's template: found by rendering, never by guessing at names.

A published template is run, in a process with limits, over short conversations; the renderer whose
prompts have the same ids is the one. A template that none speaks is used itself.
"""

from collections.abc import Callable, Sequence

from phikit.base.errors import ChatError
from phikit.chat.message import Message
from phikit.chat.render import RENDERERS, renderer_for
from phikit.chat.template import TemplateRenderer
from phikit.chat.template_process import TemplateProcess, variables
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import Renderer

_ASK, _REPLY, _AGAIN = Message("user", "one"), Message("assistant", "two"), Message("user", "three")
_PROBES = (
    [_ASK],
    [_ASK, _REPLY, _AGAIN],
    [Message("system", "zero"), _ASK],
    [Message("system", "zero"), _ASK, _REPLY, _AGAIN],
    [Message("system", ""), _ASK],
)


def renderer_from_template(
    tokenizer: Tokenizer, template: str, *, bos_token: str = "", eos_token: str = ""
) -> Renderer:
    """The renderer whose prompts equal those of a chat template (jinja text).

    Args:
        bos_token: what the template calls `bos_token`, by `tokenizer_config.json`.
        eos_token: likewise.

    Raises:
        ChatError: the template cannot be run, or ends its replies with no special token.
    """
    process = TemplateProcess(template)

    def theirs(messages: Sequence[Message]) -> list[int] | None:
        """The template's ids; None where it refuses the messages."""
        try:
            [text] = process.render(
                [variables(messages, ask=True, bos_token=bos_token, eos_token=eos_token)]
            )
        except ChatError:
            if not process.running:  # it was stopped for taking too much, and would be again
                raise
            return None
        return tokenizer.encode_parts(tokenizer.mark(text))

    try:
        for name in (*RENDERERS, "phi4-reasoning"):
            try:
                renderer = renderer_for(tokenizer, name, template=template)
            except ChatError:  # the tokenizer lacks its special tokens
                continue
            if all(_agrees(renderer, probe, theirs) for probe in _PROBES):
                return renderer
    finally:
        process.close()
    try:
        return TemplateRenderer(tokenizer, template, bos_token=bos_token, eos_token=eos_token)
    except ChatError as error:
        raise ChatError(
            "no renderer speaks this checkpoint's chat template, and it cannot be used itself: "
            + error.what,
            fix=f"name the one to use: {', '.join(RENDERERS)}",
        ) from error


def _agrees(
    renderer: Renderer, probe: list[Message], theirs: Callable[[list[Message]], list[int] | None]
) -> bool:
    """Whether the prompts are equal; a refusal is right where the template drops the message."""
    try:
        ours = renderer.prompt(probe)
    except ChatError:
        spoken = [message for message in probe if message.role != "system"]
        return theirs(probe) in (None, theirs(spoken))
    return ours == theirs(probe)
