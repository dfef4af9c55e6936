"""What every renderer does the same: replies to ids and back, and the turns put together.

A reply is encoded so that the generation prompt stays a prefix of the training example whatever the
reply says: its ids follow from the text that opens it, and never change that text's ids. Two kinds
of reply therefore differ from the template's text encoded in one piece: one that begins with white
space which would merge with the opening's newline (ChatML), and one with white space at its edges
where special tokens swallow it (Phi-3, Phi-4): here the reply keeps it.

Thinking stands between `<think>` and `</think>`: special tokens where the tokenizer has both
(Phi-4-reasoning, our nano models), ordinary text elsewhere (Phi-4-mini-reasoning, SmolLM2).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.base.types import Example
from phikit.chat.media import expand_placeholders
from phikit.chat.message import Message
from phikit.chat.tokenizer import Part, Tokenizer
from phikit.chat.tools import MAX_CALLS, ToolCall, calls_json, read_calls

END_OF_TEXT = "<|endoftext|>"

THINKING_TEMPLATE = (
    "{% if message['role'] == 'assistant' and message['thinking'] is defined"
    " and message['thinking'] is not none %}"
    "{{ '<think>\\n' + message['thinking'] + '\\n</think>\\n' }}{% endif %}"
)
"""The jinja of an assistant's thinking, which the published templates do not have."""


class Renderer(Protocol):
    """Turns conversations into tokens for one model line.

    Attributes:
        name: what `renderer_for` knows it by.
        template: the same rendering as jinja, for `chat_template.jinja`.
        stop_ids: tokens that end a reply; the first is the one replies are trained to end with,
            the last is the end of text where the tokenizer has one.
        thinks: whether its models may open a reply with a thought.
    """

    name: str
    template: str
    stop_ids: tuple[int, ...]
    thinks: bool

    def prompt(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> list[int]:
        """Tokens of the conversation, ending where the assistant's reply begins.

        Args:
            media: sizes of the images and audio clips whose placeholders stand in the user's
                texts; None leaves such placeholders as text.

        Raises:
            ChatError: there is no message, or the last one is the assistant's, or a message holds
                what this model line has no words for.
        """
        ...

    def example(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> Example:
        """Tokens of the whole conversation; the mask is True on replies and their end tokens.

        Raises:
            ChatError: there is no assistant message to learn from; or as for `prompt`.
        """
        ...

    def parse(self, tokens: Sequence[int]) -> Message:
        """The assistant message that a reply holds; what follows a stop token is ignored.

        A thought that was never closed is all thinking, with empty content. A tool call that
        cannot be read stays text, and the message's note says why.
        """
        ...


class Turn(NamedTuple):
    """Token ids of one turn: before the reply, the reply with its end token, and after it."""

    before: Sequence[int] = ()
    reply: Sequence[int] = ()
    after: Sequence[int] = ()


class TurnRenderer(ABC):
    """Everything but the framing of one turn.

    Args:
        opens: the generation prompt.
        end: the special token that ends a turn.
        stops: further special tokens that end a reply.
    """

    name: str
    template: str
    speaks_tools = False
    takes_media = True
    media_names: Mapping[str, str] = MappingProxyType({})
    """The special token of each kind of media that the chat format itself has one for."""

    def __init__(
        self, tokenizer: Tokenizer, *, opens: Sequence[Part], end: str, stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._opens = list(opens)
        tail = tokenizer.stretches(opens)[-1:]
        # The text between the last special token and the reply, which decoding goes on from.
        self.lead = tail[0] if tail and isinstance(tail[0], str) else ""
        self._end = tokenizer.special(end)
        special = tokenizer.specials.get
        further = [special(name) for name in (*stops, END_OF_TEXT)]
        self.stop_ids = tuple(dict.fromkeys([self._end, *(i for i in further if i is not None)]))
        # One special token each if the tokenizer has both; otherwise they are ordinary text.
        self._think, self._end_think = special("<think>"), special("</think>")
        self.thinks = self._think is not None and self._end_think is not None
        self._call, self._end_call = special("<|tool_call|>"), special("<|/tool_call|>")

    @abstractmethod
    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]: ...

    def prompt(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> list[int]:
        self._check(messages, media)
        if messages[-1].role == "assistant":
            raise ChatError(
                "the last message is the assistant's: nothing is left to answer",
                fix="end the prompt with a user or tool message",
            )
        return [id_ for turn in self._asked(messages, media) for part in turn for id_ in part]

    def example(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> Example:
        self._check(messages, media)
        if not any(message.role == "assistant" for message in messages):
            raise ChatError(
                "the conversation has no assistant message: nothing to learn",
                fix="add the reply that the model should give",
            )
        tokens, mask = [], []
        for turn in self._turns(messages, media):
            for part, learnt in ((turn.before, False), (turn.reply, True), (turn.after, False)):
                tokens += part
                mask += [learnt] * len(part)
        return Example(tokens=np.array(tokens, np.int32), loss_mask=np.array(mask, np.bool_))

    def parse(self, tokens: Sequence[int]) -> Message:
        ids = list(itertools.takewhile(lambda id_: id_ not in self.stop_ids, tokens))
        if self._think is None or self._end_think is None:
            content, calls, note = self._read_calls(ids, self.lead)
            return split_thinking(Message("assistant", content, tool_calls=calls, note=note))
        if ids[:1] != [self._think]:
            content, calls, note = self._read_calls(ids, self.lead)
            return Message("assistant", content, tool_calls=calls, note=note)
        decode = self._tokenizer.decode
        if self._end_think not in ids:
            return Message("assistant", "", decode(ids[1:]).removeprefix("\n"))
        middle = ids.index(self._end_think)
        thinking = decode(ids[1:middle]).removeprefix("\n").removesuffix("\n")
        content, calls, note = self._read_calls(ids[middle + 1 :], "")
        content = content.removeprefix("\n")
        return Message("assistant", content, thinking, tool_calls=calls, note=note)

    def _read_calls(
        self, ids: list[int], lead: str
    ) -> tuple[str, tuple[ToolCall, ...], str | None]:
        """Content, tool calls, and what could not be read; one bad call leaves all as text."""
        decode_after = self._tokenizer.decode_after
        call, end_call = self._call, self._end_call
        if not self.speaks_tools or call is None or end_call is None or call not in ids:
            return decode_after(lead, ids), (), None
        content, calls, rest = list[int](), list[ToolCall](), ids
        try:
            while call in rest:
                at = rest.index(call)
                content += rest[:at]
                if end_call not in rest[at:]:
                    raise ValueError("it was never closed")
                end = rest.index(end_call, at)
                calls += read_calls(self._tokenizer.decode(rest[at + 1 : end]))
                if len(calls) > MAX_CALLS:
                    raise ValueError(f"more than {MAX_CALLS} calls")
                rest = rest[end + 1 :]
        except ValueError as error:
            text = decode_after(lead, ids, keep_special=True)
            return text, (), f"a tool call could not be read: {error}"
        return decode_after(lead, [*content, *rest]), tuple(calls), None

    def _reply(self, message: Message) -> list[int]:
        """Tokens of an assistant message, its end token included."""
        encode = self._tokenizer.encode
        if message.thinking is not None and self._think is not None and self._end_think is not None:
            thinking = encode(f"\n{message.thinking}\n")
            ids = [self._think, *thinking, self._end_think, *encode(f"\n{message.content}")]
        else:
            ids = self._tokenizer.encode_after(self.lead, with_thinking(message))
        if message.tool_calls:
            call = self._tokenizer.special("<|tool_call|>")
            end_call = self._tokenizer.special("<|/tool_call|>")
            ids += [call, *encode(calls_json(message.tool_calls)), end_call]
        return [*ids, self._end]

    def _questions(
        self, messages: Sequence[Message], media: MediaTokens | None
    ) -> Iterator[list[Part]]:
        """The users' texts, with the tokens of their media in place."""
        texts = [message.content for message in messages if message.role == "user"]
        if media is None:
            return ([text] for text in texts)
        special = self._tokenizer.special
        ids = media.ids or {kind: special(name) for kind, name in self.media_names.items()}
        return iter(expand_placeholders(texts, media, ids=ids))

    def _asked(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        """The turns and the generation prompt."""
        return [*self._turns(messages, media), self._framed(*self._opens)]

    def _framed(self, *parts: Part) -> Turn:
        """A turn without a reply."""
        return Turn(self._tokenizer.encode_parts(parts))

    def _answer(self, message: Message, *, after: str = "") -> Turn:
        """The assistant's turn; `after` is the text that follows its end token."""
        opening = self._tokenizer.encode_parts(self._opens)
        following = self._tokenizer.encode_parts([self._end, after])[1:]
        return Turn(opening, self._reply(message), following)

    def _check(self, messages: Sequence[Message], media: MediaTokens | None) -> None:
        if not messages:
            raise ChatError("the conversation is empty", fix="give at least one message")
        has_tokens = bool(self.media_names) or (media is not None and media.ids is not None)
        if media is not None and not (self.takes_media and has_tokens):
            raise ChatError(f"{self.name} has no tokens for images or audio")
        for message in messages:
            role = message.role
            if message.thinking is not None and role != "assistant":
                raise ChatError(f"a {role} message has thinking; only the assistant thinks")
            if message.tools and role != "system":
                raise ChatError(
                    f"a {role} message offers tools; only a system message does",
                    fix="move the tools to the system message",
                )
            if message.tool_calls and role != "assistant":
                raise ChatError(f"a {role} message calls tools; only the assistant does")
            if (message.tools or message.tool_calls) and not self.speaks_tools:
                raise ChatError(
                    f"{self.name} has no words for tools", fix="describe them in the text instead"
                )


def with_thinking(message: Message) -> str:
    """A reply whose thinking is marked by ordinary text."""
    if message.thinking is None:
        return message.content
    if "</think>" in message.thinking:
        raise ChatError(
            "the thinking holds the text '</think>', which this tokenizer cannot tell "
            "from the end of thinking",
            fix="remove it, or add <think> and </think> as special tokens",
        )
    return f"<think>\n{message.thinking}\n</think>\n{message.content}"


def split_thinking(reply: Message) -> Message:
    """Inverts `with_thinking`."""
    if not reply.content.startswith("<think>"):
        return reply
    thinking, closing, content = reply.content.removeprefix("<think>").partition("</think>")
    thinking = thinking.removeprefix("\n")
    if closing:
        thinking = thinking.removesuffix("\n")
    content = content.removeprefix("\n")
    return Message("assistant", content, thinking, tool_calls=reply.tool_calls, note=reply.note)
