"""One reply read while it grows: thinking and content in pieces that are never taken back.

`Renderer.parse` says what a whole reply holds, and to ask it after every token would cost the
square of the length. So the pieces come from a walk of one step per token, which is careful to show
a beginning of what `parse` will say: half characters, tags, stop strings and tool calls are held
back. The end is `parse`'s own, and the last piece is what it has beyond the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from phikit.chat.message import Message
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import TurnRenderer, split_thinking
from phikit.generate.language_model import LanguageModel, cut_message
from phikit.generate.stops import CLOSES, OPENS, visible


class Piece(NamedTuple):
    """The next characters of a reply."""

    content: str = ""
    thinking: str = ""


class ReplyReader:
    """Reads one sample, token by token.

    Args:
        strings: the stop strings of the request.
        is_chat: whether the reply is a message, or bare text.
        opening: ids that the prompt ends with and that belong to the reply.
    """

    def __init__(
        self,
        loaded: LanguageModel,
        *,
        strings: Sequence[str] = (),
        is_chat: bool = True,
        opening: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._renderer = loaded.tokenizer, loaded.renderer
        self._strings, self._is_chat = tuple(strings), is_chat
        self._opening = list(opening)
        self.tokens: list[int] = []
        """Sampled so far."""
        self._shown = Piece()
        specials = loaded.tokenizer.specials
        marks = [specials.get(name) for name in ("<think>", "</think>", "<|tool_call|>")]
        self._think, self._end_think, self._call = marks
        self._has_marks = is_chat and self._think is not None and self._end_think is not None
        self._calls = is_chat and getattr(self._renderer, "speaks_tools", False)
        self._is_thinking = False
        self._is_held = bool(opening)
        self._thought: str | None = None
        self._text = ""
        self._decoder = loaded.tokenizer.decoder()
        if is_chat and isinstance(self._renderer, TurnRenderer):
            for id_ in loaded.tokenizer.encode(self._renderer.lead):
                self._decoder.push(id_)

    def push(self, token: int) -> Piece:
        """Take one token; returns what is now certain beyond the pieces before."""
        self.tokens.append(token)
        if self._is_held or not self._read(token):
            return Piece()
        if self._has_marks or not self._is_chat:
            message = Message("assistant", self._text, self._thought)
        else:
            message = split_thinking(Message("assistant", self._text))
        tags = (OPENS, CLOSES) if self._is_chat else ()
        content = visible(message.content, self._strings, tags=tags)
        thinking = ""
        if message.thinking is not None:
            thought = message.thinking.removeprefix("\n")
            is_over = bool(message.content) or (self._has_marks and not self._is_thinking)
            # A line break before the closing tag is no part of the thought.
            certain = thought if is_over else visible(thought, self._strings, tags=tags)
            thinking = certain if is_over else certain.removesuffix("\n")
        return self._show(content, thinking)

    def finish(self, *, closes: Sequence[int] = ()) -> tuple[Piece, Message]:
        """The last piece, and the whole message.

        Args:
            closes: ids that complete the reply, if the engine has ended it by itself.
        """
        ids = [*self._opening, *self.tokens]
        if self._is_chat:
            message = self._renderer.parse([*ids, *closes])
        else:
            message = Message("assistant", self._tokenizer.decode(ids))
        message = cut_message(message, self._strings)
        return self._show(message.content, message.thinking or ""), message

    def _read(self, token: int) -> bool:
        """Whether the token has changed the texts."""
        if self._is_chat and token in self._renderer.stop_ids:
            self._is_held = True
            self._text += self._decoder.flush() if not self._is_thinking else ""
            return False
        if self._calls and token == self._call and not self._is_thinking:
            self._is_held = True
            return False
        if self._has_marks and token == self._think and len(self.tokens) == 1:
            self._is_thinking, self._thought = True, ""
            self._decoder = self._tokenizer.decoder()
            return False
        if self._has_marks and token == self._end_think and self._is_thinking:
            self._is_thinking = False
            self._thought = (self._thought or "") + self._decoder.flush()
            self._thought = self._thought.removesuffix("\n")
            self._decoder = self._tokenizer.decoder()
            return True
        text = self._decoder.push(token)
        if self._is_thinking:
            self._thought = (self._thought or "") + text
        elif self._thought is not None and not self._text:
            self._text = text.removeprefix("\n")
        else:
            self._text += text
        return text != ""

    def _show(self, content: str, thinking: str) -> Piece:
        shown = self._shown
        piece = Piece(_beyond(shown.content, content), _beyond(shown.thinking, thinking))
        self._shown = Piece(
            content if piece.content else shown.content,
            thinking if piece.thinking else shown.thinking,
        )
        return piece


def _beyond(shown: str, text: str) -> str:
    """What a text has beyond what is shown of it; nothing if that is no beginning of it."""
    return text[len(shown) :] if text.startswith(shown) else ""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token inside a text; special tokens by their names."""
    # Some decoders strip the space of what comes first in a text.
    before = tokenizer.encode("a")
    return tokenizer.decode([*before, token], keep_special=True)[len(tokenizer.decode(before)) :]
