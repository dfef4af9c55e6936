"""The checkpoint's own template as a renderer, for checkpoints whose format none of ours speaks.

What is unusual: a template gives plain text, in which a forged `<|end|>` looks like a real one. So
the characters that special tokens begin and end with are replaced in every message by private ones
before rendering, special tokens are looked for in the result, and only then are the characters put
back. No message can forge a token, and a template may still trim or search its texts.

Replies, for the training mask, are found by rendering prefixes: the prompt before each reply must
be a prefix of the whole conversation. A template that rewrites earlier turns (many drop old
thoughts) can therefore prompt, but not train on several turns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.chat.message import Message
from phikit.chat.template_process import TemplateProcess, variables
from phikit.chat.tokenizer import Part, Tokenizer
from phikit.chat.turns import Turn, TurnRenderer, with_thinking

_PRIVATE = range(0xF0000, 0xFFFFE)
_REPLY = chr(_PRIVATE[-1])  # a text that no template contains


class _Texts(NamedTuple):
    """What the template makes of a conversation.

    Attributes:
        whole: the text, its messages disguised.
        prompts: the prompt before each reply.
        said: the conversation up to each reply, that one included.
        show: the character table that takes the disguise off.
    """

    whole: str
    prompts: list[str]
    said: list[str]
    show: dict[int, int]


class TemplateRenderer(TurnRenderer):
    """Renders by a jinja template, in a process with limits; plain conversations, without tools.

    Args:
        bos_token: what the template calls `bos_token`; empty for none.
        eos_token: what it calls `eos_token`, which also ends a reply if it is a special token.

    Raises:
        ChatError: the template fails on a plain exchange, or no special token ends its replies.
    """

    name = "template"
    takes_media = False

    def __init__(
        self, tokenizer: Tokenizer, template: str, *, bos_token: str = "", eos_token: str = ""
    ) -> None:
        self.template = _with_given(template, bos_token=bos_token, eos_token=eos_token)
        self._process = TemplateProcess(self.template)
        ask = [Message("user", "a")]
        prompt, exchange = self._process.render(
            [
                variables(ask, ask=True),
                variables([*ask, Message("assistant", _REPLY)], ask=False),
            ]
        )
        after = tokenizer.mark(exchange.rpartition(_REPLY)[2] if _REPLY in exchange else "")
        names = {id_: name for name, id_ in tokenizer.specials.items()}
        ends = [names[part] for part in after if isinstance(part, int)]
        if not ends:
            raise ChatError(
                "the chat template does not end a reply with a special token",
                fix="name the renderer to use instead",
            )
        stops = [eos_token] if eos_token in tokenizer.specials else []
        super().__init__(tokenizer, opens=tokenizer.mark(prompt), end=ends[0], stops=stops)
        self._end_name = ends[0]
        # What special tokens begin and end with, and so cannot do without.
        self._edges = sorted({edge for name in tokenizer.specials for edge in (name[0], name[-1])})

    def _turns(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        turns = self._cut(self._texts(messages, ask=False))
        if turns is None:
            raise ChatError(
                "this chat template rewrites earlier turns, so replies cannot be told apart",
                fix="train on conversations with one reply, or name the renderer to use",
            )
        return turns

    def _asked(self, messages: Sequence[Message], media: MediaTokens | None) -> list[Turn]:
        texts = self._texts(messages, ask=True)
        turns = self._cut(texts)
        return [self._framed(*self._parts(texts.whole, texts.show))] if turns is None else turns

    def _texts(self, messages: Sequence[Message], *, ask: bool) -> _Texts:
        hide, show = self._disguise(messages)
        hidden = [self._said(message, hide) for message in messages]
        replies = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        whole, *parts = self._process.render(
            [
                variables(hidden, ask=ask),
                *(variables(hidden[:i], ask=True) for i in replies),
                *(variables(hidden[: i + 1], ask=False) for i in replies),
            ]
        )
        return _Texts(whole, parts[: len(replies)], parts[len(replies) :], show)

    def _cut(self, texts: _Texts) -> list[Turn] | None:
        """Each reply with what stands before it, then the rest; None if turns do not extend."""
        encode_parts = self._tokenizer.encode_parts
        turns: list[Turn] = []
        at = 0
        before: Sequence[
            Part
        ] = ()  # the end token of the reply before, which may swallow white space
        for prompt, said in zip(texts.prompts, texts.said, strict=True):
            start = len(prompt)
            found = said.find(self._end_name, start)
            end = found + len(self._end_name)
            extends = said.startswith(prompt) and texts.whole.startswith(said[:end])
            if found < 0 or start < at or not extends:
                return None
            framing = [*before, *self._parts(texts.whole[at:start], texts.show)]
            reply = self._parts(texts.whole[start:end], texts.show)
            turns.append(Turn(encode_parts(framing)[len(before) :], self._said_ids(framing, reply)))
            before, at = [self._end], end
        rest = [*before, *self._parts(texts.whole[at:], texts.show)]
        return [*turns, Turn(encode_parts(rest)[len(before) :])]

    def _said_ids(self, framing: Sequence[Part], reply: Sequence[Part]) -> list[int]:
        """Ids of a reply that reads on from the framing."""
        last = self._tokenizer.stretches(framing)[-1:]
        lead = last[0] if last and isinstance(last[0], str) else ""
        ids: list[int] = []
        for part in reply:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode_after(lead, part)
            lead = ""
        return ids

    def _parts(self, text: str, show: dict[int, int]) -> list[Part]:
        marked = self._tokenizer.mark(text)
        return [part.translate(show) if isinstance(part, str) else part for part in marked]

    def _disguise(self, messages: Sequence[Message]) -> tuple[dict[int, int], dict[int, int]]:
        """Tables that hide the edges of special tokens behind unused characters, and show them."""
        used = set(self.template).union(*(m.content + (m.thinking or "") for m in messages))
        unused = (code for code in _PRIVATE if chr(code) not in used)
        hide = dict(zip(map(ord, self._edges), unused, strict=False))
        return hide, {code: plain for plain, code in hide.items()}

    def _said(self, message: Message, hide: dict[int, int]) -> Message:
        """The message in disguise, its thinking inside its content."""
        content = message.content.translate(hide)
        if message.thinking is None:
            return replace(message, content=content)
        if self._think is None or self._end_think is None:
            with_thinking(message)  # refuses a mark that would be read as the end of thinking
        thinking = message.thinking.translate(hide)
        said = with_thinking(Message("assistant", content, thinking))
        return Message("assistant", said)


def _with_given(template: str, **given: str) -> str:
    """The template with the values of these names written into it, so that it stands alone."""
    sets = [f"{{% set {name} = {value!r} %}}" for name, value in given.items() if value]
    # The empty output keeps a newline that begins the template from being taken for the block's.
    return "".join(sets) + ("{{ '' }}" if sets else "") + template
