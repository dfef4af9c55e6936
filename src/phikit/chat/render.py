"""Renderers: messages to token ids and a loss mask, and ids back to a message.

What is unusual: the renderer is the truth and the jinja template is derived from it, so that other
programs see the same text. Four laws hold, and tests state them: the generation prompt is a prefix
of the training example; `parse` inverts rendering; each turn extends the last (earlier turns keep
their thinking); the template equals the renderer.

To keep the first law for every reply, a reply is always encoded by itself. Only a reply that begins
with white space, under ChatML, then differs from encoding the template's text in one piece.

Sources: chat templates of microsoft/Phi-4-mini-instruct and HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from phikit.base.errors import ChatError
from phikit.base.types import Example
from phikit.chat.message import Message
from phikit.chat.tokenizer import Tokenizer

NANO_SPECIALS = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Renderer(Protocol):
    """Turns conversations into tokens for one model line.

    Attributes:
        name: what `renderer_for` knows it by.
        template: the same rendering as jinja, for `chat_template.jinja`.
        stop_ids: tokens that end a reply; the first is the one replies are trained to end with.
    """

    name: str
    template: str
    stop_ids: tuple[int, ...]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation, ending where the assistant's reply begins.

        Raises:
            ChatError: there is no message, or the last one is the assistant's.
        """
        ...

    def example(self, messages: Sequence[Message]) -> Example:
        """Tokens of the whole conversation; the mask is True on replies and their end tokens.

        Raises:
            ChatError: there is no assistant message to learn from.
        """
        ...

    def parse(self, tokens: Sequence[int]) -> Message:
        """The assistant message that a reply holds; what follows a stop token is ignored.

        A thought that was never closed is all thinking, with empty content.
        """
        ...


class _Turn(NamedTuple):
    """Token ids of one turn: before the reply, the reply with its end token, and after it."""

    before: list[int]
    reply: list[int]
    after: list[int]


class _TurnRenderer(ABC):
    """What the renderers share: everything but the framing of one turn."""

    _opens_reply: list[int]
    """The generation prompt."""
    stop_ids: tuple[int, ...]

    def __init__(self, tokenizer: Tokenizer, *, end: str) -> None:
        self._tokenizer = tokenizer
        end_of_text = tokenizer.specials.get("<|endoftext|>")
        stops = (tokenizer.special(end), end_of_text)
        self.stop_ids = tuple(stop for stop in stops if stop is not None)
        # One special token each if the tokenizer has both; otherwise they are ordinary text.
        self._think = tokenizer.specials.get("<think>")
        self._end_think = tokenizer.specials.get("</think>")

    @abstractmethod
    def _turns(self, messages: Sequence[Message]) -> list[_Turn]: ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        turns = self._turns(_checked(messages))
        if messages[-1].role == "assistant":
            raise ChatError(
                "the last message is the assistant's: nothing is left to answer",
                fix="end the prompt with a user or tool message",
            )
        return [id_ for turn in turns for part in turn for id_ in part] + self._opens_reply

    def example(self, messages: Sequence[Message]) -> Example:
        turns = self._turns(_checked(messages))
        if not any(turn.reply for turn in turns):
            raise ChatError(
                "the conversation has no assistant message: nothing to learn",
                fix="add the reply that the model should give",
            )
        tokens, mask = [], []
        for turn in turns:
            for part, learnt in ((turn.before, False), (turn.reply, True), (turn.after, False)):
                tokens += part
                mask += [learnt] * len(part)
        return Example(tokens=np.array(tokens, np.int32), loss_mask=np.array(mask, np.bool_))

    def parse(self, tokens: Sequence[int]) -> Message:
        ids = list(tokens)
        ends = [index for index, id_ in enumerate(ids) if id_ in self.stop_ids]
        ids = ids[: ends[0]] if ends else ids
        if self._think is None or self._end_think is None:
            return _split_thinking(self._tokenizer.decode(ids))
        if not ids or ids[0] != self._think:
            return Message("assistant", self._tokenizer.decode(ids))
        closed = self._end_think in ids
        middle = ids.index(self._end_think) if closed else len(ids)
        thinking = self._tokenizer.decode(ids[1:middle]).removeprefix("\n")
        content = self._tokenizer.decode(ids[middle + 1 :]).removeprefix("\n")
        return Message("assistant", content, thinking.removesuffix("\n") if closed else thinking)

    def _reply(self, message: Message) -> list[int]:
        """Tokens of an assistant message, its end token included."""
        encode = self._tokenizer.encode
        if message.thinking is None:
            ids = encode(message.content)
        elif self._think is None or self._end_think is None:
            if "</think>" in message.thinking:
                raise ChatError(
                    "the thinking holds the text '</think>', which this tokenizer cannot tell "
                    "from the end of thinking",
                    fix="remove it, or add <think> and </think> as special tokens",
                )
            ids = encode(f"<think>\n{message.thinking}\n</think>\n{message.content}")
        else:
            thinking = encode(f"\n{message.thinking}\n")
            ids = [self._think, *thinking, self._end_think, *encode(f"\n{message.content}")]
        return [*ids, self.stop_ids[0]]


class PhiRenderer(_TurnRenderer):
    """Phi-4-mini: `<|role|>` content `<|end|>`, with no newline anywhere.

    The published template also appends `<|endoftext|>` when no reply is asked for; that token is
    left to whoever packs documents, because no later turn could extend it.
    """

    name = "phi4-mini"
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if message['role'] == 'assistant' and message['thinking'] is defined"
        " and message['thinking'] is not none %}"
        "{{ '<think>\\n' + message['thinking'] + '\\n</think>\\n' }}{% endif %}"
        "{{ message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, end="<|end|>")
        self._opens_reply = [tokenizer.special("<|assistant|>")]

    def _turns(self, messages: Sequence[Message]) -> list[_Turn]:
        turns = []
        for message in messages:
            if message.role == "assistant":
                turns.append(_Turn(self._opens_reply, self._reply(message), []))
            else:
                role = self._tokenizer.special(f"<|{message.role}|>")
                content = self._tokenizer.encode(message.content)
                turns.append(_Turn([role, *content, self.stop_ids[0]], [], []))
        return turns


class ChatMLRenderer(_TurnRenderer):
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
        super().__init__(tokenizer, end="<|im_end|>")
        self.name = name
        self.template = _chatml_template(default_system)
        self._default_system = default_system
        self._start = tokenizer.special("<|im_start|>")
        self._newline = tokenizer.encode("\n")
        self._opens_reply = [self._start, *tokenizer.encode("assistant\n")]

    def _turns(self, messages: Sequence[Message]) -> list[_Turn]:
        if self._default_system is not None and messages[0].role != "system":
            messages = [Message("system", self._default_system), *messages]
        turns = []
        for message in messages:
            if message.role == "assistant":
                turns.append(_Turn(self._opens_reply, self._reply(message), self._newline))
            else:
                text = self._tokenizer.encode(f"{message.role}\n{message.content}")
                before = [self._start, *text, self.stop_ids[0], *self._newline]
                turns.append(_Turn(before, [], []))
        return turns


RENDERERS: dict[str, Callable[[Tokenizer], Renderer]] = {
    "phi4-mini": PhiRenderer,
    "smollm2": ChatMLRenderer,
}


def renderer_for(tokenizer: Tokenizer, name: str) -> Renderer:
    """The renderer called `name`: "phi4-mini" or "smollm2".

    Raises:
        ChatError: the name is unknown, or the tokenizer lacks a token that the template needs.
    """
    if name not in RENDERERS:
        raise ChatError(f"unknown renderer {name!r}", fix=f"choose from: {', '.join(RENDERERS)}")
    return RENDERERS[name](tokenizer)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise ChatError("the conversation is empty", fix="give at least one message")
    for message in messages:
        if message.thinking is not None and message.role != "assistant":
            raise ChatError(f"a {message.role} message has thinking; only the assistant thinks")
    return messages


def _split_thinking(text: str) -> Message:
    """Split a reply whose thinking is marked by ordinary text."""
    if not text.startswith("<think>"):
        return Message("assistant", text)
    thinking, closing, content = text.removeprefix("<think>").partition("</think>")
    thinking = thinking.removeprefix("\n")
    if closing:
        thinking = thinking.removesuffix("\n")
    return Message("assistant", content.removeprefix("\n"), thinking)


def _chatml_template(default_system: str | None) -> str:
    opening = ""
    if default_system is not None:
        # Jinja reads a string as Python does, so these two escapes are enough.
        quoted = default_system.replace("\\", "\\\\").replace("'", "\\'")
        opening = (
            "{% if loop.first and message['role'] != 'system' %}"
            "{{ '<|im_start|>system\\n" + quoted + "<|im_end|>\\n' }}{% endif %}"
        )
    return (
        "{% for message in messages %}" + opening + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' and message['thinking'] is defined"
        " and message['thinking'] is not none %}"
        "{{ '<think>\\n' + message['thinking'] + '\\n</think>\\n' }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
