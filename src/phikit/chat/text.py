"""The renderer of a checkpoint without a chat template: it continues text and holds no talks."""

from collections.abc import Sequence
from typing import NoReturn

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.base.types import Example
from phikit.chat.message import Message
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import END_OF_TEXT


class TextRenderer:
    """Base models such as phi-2: every conversation is refused, and a reply is plain text.

    Args:
        end: the special token that ends a text; the usual one if it is empty or unknown.

    Raises:
        ChatError: the tokenizer has neither, so nothing would ever end a text.
    """

    name = "text"
    template = ""
    thinks = False

    def __init__(self, tokenizer: Tokenizer, *, end: str = "") -> None:
        self._tokenizer = tokenizer
        self.stop_ids = (tokenizer.special(end if end in tokenizer.specials else END_OF_TEXT),)

    def prompt(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> list[int]:
        """Raises ChatError."""
        self._refuse()

    def example(self, messages: Sequence[Message], *, media: MediaTokens | None = None) -> Example:
        """Raises ChatError."""
        self._refuse()

    def parse(self, tokens: Sequence[int]) -> Message:
        """The text before the first stop token."""
        ends = [index for index, id_ in enumerate(tokens) if id_ in self.stop_ids]
        return Message("assistant", self._tokenizer.decode(tokens[: ends[0]] if ends else tokens))

    def _refuse(self) -> NoReturn:
        raise ChatError(
            "this checkpoint has no chat template, so it can only go on with a text",
            fix="give text in place of messages, or name a renderer that fits how it was trained",
        )
