"""ChatML: SmolLM2 writes it with newlines, Phi-4 with a token between role and content.

Phi-4's reasoning models open every conversation with one fixed system text that tells the model to
think first. It belongs to the checkpoint, so it is read from the checkpoint's own template.

Sources: chat templates of HuggingFaceTB/SmolLM2-135M-Instruct, microsoft/phi-4 and
microsoft/Phi-4-reasoning.
"""

from collections.abc import Sequence

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.chat.message import Message
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import THINKING_TEMPLATE, Turn, TurnRenderer

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatMLRenderer(TurnRenderer):
    """ChatML as SmolLM2 speaks it: `<|im_start|>` role newline content `<|im_end|>` newline.

    Args:
        default_system: a system turn for conversations that begin without one; None adds none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str = "smollm2",
        default_system: str | None = SMOLLM2_SYSTEM,
    ) -> None:
        self._start = tokenizer.special("<|im_start|>")
        super().__init__(tokenizer, opens=[self._start, "assistant\n"], end="<|im_end|>")
        self.name = name
        self.template = _chatml_template(default_system)
        self.default_system = default_system

    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        if self.default_system is not None and messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        questions = self._questions(messages, media)
        turns = []
        for message in messages:
            if message.role == "assistant":
                turns.append(self._answer(message, after="\n"))
                continue
            parts = next(questions) if message.role == "user" else [message.content]
            turns.append(self._framed(self._start, f"{message.role}\n", *parts, self._end, "\n"))
        return turns


class Phi4Renderer(TurnRenderer):
    """Phi-4: `<|im_start|>` role `<|im_sep|>` content `<|im_end|>`, with no newline anywhere.

    Args:
        opening: the fixed system text of a reasoning model, in which the names of special tokens
            are such tokens. Then the only system message it has room for is that text itself.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, name: str = "phi4", opening: str | None = None
    ) -> None:
        self._start = tokenizer.special("<|im_start|>")
        self._separator = tokenizer.special("<|im_sep|>")
        opens = [self._start, "assistant", self._separator]
        super().__init__(tokenizer, opens=opens, end="<|im_end|>")
        self.name = name
        self.template = _phi4_template(opening)
        self.opening = opening

    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        turns = []
        if self.opening is not None:
            text = self._tokenizer.mark(self.opening)
            turns.append(self._framed(self._start, "system", self._separator, *text, self._end))
        questions = self._questions(messages, media)
        for message in messages:
            if message.role == "assistant":
                turns.append(self._answer(message))
            elif message.role == "tool":
                raise ChatError(f"{self.name} has no tool turns", fix="let the user say it")
            elif message.role == "user" or self.opening is None:
                parts = next(questions) if message.role == "user" else [message.content]
                turns.append(
                    self._framed(self._start, message.role, self._separator, *parts, self._end)
                )
            elif message.content.strip() != self.opening.strip():
                raise ChatError(
                    f"{self.name} always opens with its own system text and has no other",
                    fix="put the instruction into the first user message",
                )
        return turns


def _quoted(text: str) -> str:
    """The text inside a jinja string, which is read as Python reads it."""
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _chatml_template(default_system: str | None) -> str:
    opening = ""
    if default_system is not None:
        opening = (
            "{% if loop.first and message['role'] != 'system' %}"
            "{{ '<|im_start|>system\\n" + _quoted(default_system) + "<|im_end|>\\n' }}{% endif %}"
        )
    return (
        "{% for message in messages %}"
        + opening
        + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + THINKING_TEMPLATE
        + "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _phi4_template(opening: str | None) -> str:
    fixed, others = "", ""
    if opening is not None:
        fixed = "{{ '<|im_start|>system<|im_sep|>" + _quoted(opening) + "<|im_end|>' }}"
        others = " if message['role'] != 'system'"
    return (
        fixed + "{% for message in messages" + others + " %}"
        "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' }}"
        + THINKING_TEMPLATE
        + "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    )
