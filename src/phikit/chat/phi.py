"""The chat formats of Phi-3 and of Phi-4-mini: a special token for each role, `<|end|>` after it.

Phi-3 writes a newline after each special token. The special tokens of its Llama tokenizer swallow
that newline again, in Phi-3-small it stays. Phi-4-mini writes none, and has words for tools and, in
Phi-4-multimodal, for images and audio.

Published templates append the end of text where no reply is asked for. That token is left to
whoever packs documents, because no later turn could extend it.

Sources: chat templates of microsoft/Phi-3-mini-4k-instruct, Phi-3-medium-4k-instruct,
Phi-3-small-8k-instruct, Phi-3.5-mini-instruct, Phi-4-mini-instruct and Phi-4-mini-reasoning.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.chat.message import Message
from phikit.chat.tokenizer import Part, Tokenizer
from phikit.chat.tools import tools_json
from phikit.chat.turns import END_OF_TEXT, THINKING_TEMPLATE, Turn, TurnRenderer

IMAGE_TOKEN, AUDIO_TOKEN = "<|endoftext10|>", "<|endoftext11|>"

TOOL_RESULT = "<|tool|>"
"""What opens the answer of a tool. The published template makes it of the role's name, like every
other turn, and that is what we follow; but the vocabulary also has `<|tool_response|>` (200027),
which llama.cpp's template for this model uses. Which of the two the model was trained on is not
documented."""

PHI4_MINI_REASONING_IDENTITY = "Your name is Phi, an AI math expert developed by Microsoft."

_TOOLS_TEMPLATE = (
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}"
)
_CALLS_TEMPLATE = (
    "{% if message['tool_calls'] is defined and message['tool_calls'] %}{{ '<|tool_call|>[' }}"
    "{% for call in message['tool_calls'] %}"
    "{{ '{\"name\": ' + call['function']['name'] | tojson + ', \"arguments\": '"
    " + call['function']['arguments'] | tojson + '}' }}{{ '' if loop.last else ', ' }}"
    "{% endfor %}{{ ']<|/tool_call|>' }}{% endif %}"
)

SystemTurns = Literal["always", "unless empty", "never"]


class PhiRenderer(TurnRenderer):
    """Phi-4-mini: `<|role|>` content `<|end|>`, with no newline anywhere.

    A system turn may end with `<|tool|>` and the JSON of the tools, a reply with `<|tool_call|>`
    and the JSON of its calls.

    Args:
        identity: what the system turn, then always there, begins with: Phi-4-mini-reasoning. Every
            system message is put behind it, wherever in the conversation it stands.
    """

    speaks_tools = True
    media_names = MappingProxyType({"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN})

    def __init__(
        self, tokenizer: Tokenizer, *, name: str = "phi4-mini", identity: str | None = None
    ) -> None:
        opens = [tokenizer.special("<|assistant|>")]
        super().__init__(tokenizer, opens=opens, end="<|end|>")
        self.name = name
        self.template = _phi4_mini_template(identity)
        self.identity = identity
        # Phi-4-mini-reasoning writes the tags of its thoughts as text.
        self.thinks = self.thinks or identity is not None

    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        special = self._tokenizer.special
        turns = []
        if self.identity is not None:
            system: list[Part] = [special("<|system|>"), self.identity]
            for message in messages:
                if message.role == "system":
                    system += [" ", *self._system(message)]
            turns.append(self._framed(*system, self._end))
            messages = [message for message in messages if message.role != "system"]
        questions = self._questions(messages, media)
        for message in messages:
            if message.role == "assistant":
                turns.append(self._answer(message))
            elif message.role == "user":
                turns.append(self._framed(special("<|user|>"), *next(questions), self._end))
            elif message.role == "system":
                parts = self._system(message)
                turns.append(self._framed(special("<|system|>"), *parts, self._end))
            else:
                turns.append(self._framed(special(TOOL_RESULT), message.content, self._end))
        return turns

    def _system(self, message: Message) -> list[Part]:
        if not message.tools:
            return [message.content]
        special = self._tokenizer.special
        tools = tools_json(message.tools)
        return [message.content, special("<|tool|>"), tools, special("<|/tool|>")]


class Phi3Renderer(TurnRenderer):
    r"""Phi-3 and Phi-3.5: `<|role|>` newline content `<|end|>` newline.

    Args:
        system: which system messages the published template renders. Those it would drop without
            a word are refused here, except empty ones.
        begins: a special token before everything else; None for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str = "phi3",
        system: SystemTurns = "always",
        begins: str | None = None,
    ) -> None:
        opens = [tokenizer.special("<|assistant|>"), "\n"]
        super().__init__(tokenizer, opens=opens, end="<|end|>", stops=["<|assistant|>"])
        self.name = name
        self.template = _phi3_template(system, begins)
        self.system_turns = system
        self.begins = begins

    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        turns = [] if self.begins is None else [Turn([self._tokenizer.special(self.begins)])]
        questions = self._questions(messages, media)
        for message in messages:
            if message.role == "assistant":
                turns.append(self._answer(message, after="\n"))
            elif message.role == "tool":
                raise ChatError(f"{self.name} has no tool turns", fix="let the user say it")
            elif message.role == "user" or self._has_turn(message):
                role = self._tokenizer.special(f"<|{message.role}|>")
                parts = next(questions) if message.role == "user" else [message.content]
                turns.append(self._framed(role, "\n", *parts, self._end, "\n"))
        return turns

    def _has_turn(self, message: Message) -> bool:
        """Whether there is a turn for a system message."""
        if self.system_turns == "never" and message.content:
            raise ChatError(
                f"{self.name} has no system turns",
                fix="put the instruction into the first user message",
            )
        return self.system_turns == "always" or message.content != ""


def phi3_small(tokenizer: Tokenizer) -> Phi3Renderer:
    """Phi-3-small, whose conversations begin with the end of text."""
    return Phi3Renderer(tokenizer, name="phi3-small", begins=END_OF_TEXT)


def _phi4_mini_template(identity: str | None) -> str:
    begins, others = "", ""
    if identity is not None:
        begins = (
            "{{ '<|system|>" + identity + "' }}{% for message in messages %}"
            "{% if message['role'] == 'system' %}{{ ' ' + message['content'] }}"
            + _TOOLS_TEMPLATE
            + "{% endif %}{% endfor %}{{ '<|end|>' }}"
        )
        others = " if message['role'] != 'system'"
    return (
        begins
        + "{% for message in messages"
        + others
        + " %}{{ '<|' + message['role'] + '|>' }}"
        + THINKING_TEMPLATE
        + "{{ message['content'] }}"
        + _TOOLS_TEMPLATE
        + _CALLS_TEMPLATE
        + "{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


def _phi3_template(system: SystemTurns, begins: str | None) -> str:
    kept = {
        "always": "",
        "unless empty": " if message['role'] != 'system' or message['content']",
        "never": " if message['role'] != 'system'",
    }[system]
    return (
        ("" if begins is None else "{{ '" + begins + "' }}")
        + "{% for message in messages"
        + kept
        + " %}{{ '<|' + message['role'] + '|>\\n' }}"
        + THINKING_TEMPLATE
        + "{{ message['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
