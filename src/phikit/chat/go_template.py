"""Chat formats as Go templates, the language that Ollama wants them in.

A law holds, and a test runs Go to state it: for a conversation that asks, Ollama's prompt is the
text of our renderer's. Two things are Ollama's own: it puts neighbouring messages of one role
together before the template sees them, and it lets the model go on with a last message of the
assistant, so that turn stays open. Tools are not offered.

Source: Ollama, `docs/template.md` and `template/template.go`.
"""

from typing import NamedTuple

from phikit.base.errors import ChatError
from phikit.chat.chatml import ChatMLRenderer, Phi4Renderer
from phikit.chat.phi import Phi3Renderer, PhiRenderer
from phikit.chat.turns import Renderer

_THINKING = (
    '{{ if and (eq .Role "assistant") .Thinking }}<think>\n{{ .Thinking }}\n</think>\n{{ end }}'
)
_IS_NO_SYSTEM = '{{ if ne .Role "system" }}'


class _Frame(NamedTuple):
    """What stands around the role and the content of a turn."""

    before: str
    between: str
    after: str


def go_template(renderer: Renderer, *, thinks: bool) -> str:
    """The Go template of a renderer.

    Args:
        renderer: whose format.
        thinks: whether replies begin with thinking that Ollama is to show apart. It finds the tags
            in the template; without them thinking is a part of the text, and the same tokens.

    Raises:
        ChatError: no such template is known here for this renderer.
    """
    match renderer:
        case PhiRenderer(name="phi4-mini"):
            return _template(_Frame("<|", "|>", "<|end|>"), thinks=thinks)
        case PhiRenderer(identity=str(identity)):
            frame = _Frame("<|", "|>", "<|end|>")
            systems = '{{ range .Messages }}{{ if eq .Role "system" }} {{ .Content }}{{ end }}'
            opening = f"<|system|>{_literal(identity)}{systems}{{{{ end }}}}<|end|>"
            return opening + _template(frame, thinks=thinks, only=_IS_NO_SYSTEM)
        case Phi3Renderer(begins=begins, system_turns=system_turns):
            frame = _Frame("<|", "|>\n", "<|end|>\n")
            kept = '{{ if or (ne .Role "system") .Content }}'
            only = {"always": "", "unless empty": kept, "never": _IS_NO_SYSTEM}[system_turns]
            return (begins or "") + _template(frame, thinks=thinks, only=only)
        case Phi4Renderer(opening=opening):
            frame = _Frame("<|im_start|>", "<|im_sep|>", "<|im_end|>")
            if opening is None:
                return _template(frame, thinks=thinks)
            fixed = f"<|im_start|>system<|im_sep|>{_literal(opening)}<|im_end|>"
            return fixed + _template(frame, thinks=thinks, only=_IS_NO_SYSTEM)
        case ChatMLRenderer(default_system=default):
            frame = _Frame("<|im_start|>", "\n", "<|im_end|>\n")
            return _template(frame, thinks=thinks, default_system=default)
    raise ChatError(
        f"no Go template is known here for the chat format {renderer.name!r}",
        fix="write the GGUF file alone, with --no-modelfile",
    )


def _template(
    frame: _Frame, *, thinks: bool, only: str = "", default_system: str | None = None
) -> str:
    """One turn after the other.

    Args:
        only: the condition under which a message has a turn.
        default_system: of conversations that begin without a system message.
    """
    before, between, after = frame
    opening = ""
    if default_system is not None:
        turn = f"{before}system{between}{_literal(default_system)}{after}"
        opening = '{{ if and (eq $i 0) (ne .Role "system") }}' + turn + "{{ end }}"
    turn = before + "{{ .Role }}" + between + (_THINKING if thinks else "") + "{{ .Content }}"
    return (
        "{{ range $i, $_ := .Messages }}"
        "{{ $is_last := eq (len (slice $.Messages $i)) 1 }}"
        f"{opening}{only}{turn}"
        '{{ if not (and $is_last (eq .Role "assistant")) }}'
        + after
        + "{{ end }}"
        + ("{{ end }}" if only else "")
        + '{{ if and $is_last (ne .Role "assistant") }}'
        + f"{before}assistant{between}"
        + "{{ end }}{{ end }}"
    )


def _literal(text: str) -> str:
    """Text that Go leaves as it is."""
    return text.replace("{{", '{{ "{{" }}')
