"""Stop strings: texts that end a reply, wherever they fall between tokens and bytes.

What is unusual: nothing is remembered from token to token. One Request has several samples, and an
engine may draw a token and take it back; so each look decodes as many of the last tokens as the
longest stop string can span, and no more.
"""

from collections.abc import Sequence

from phikit.base.errors import ConfigError
from phikit.chat.tokenizer import Tokenizer

OPENS, CLOSES = "<think>", "\n</think>"
"""Tags of a thought: no text of a reply, so not shown in part either."""


class StopStrings:
    """Tells whether a reply has come to a stop string, for `Request.stops`.

    It looks at all the text of a reply, thinking included. Special tokens have no text.

    Args:
        strings: the texts; one is enough.

    Raises:
        ConfigError: a string is empty, or there is none.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise ConfigError(f"stop is {strings!r}", fix="give texts of one character or more")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # Every token that has text at all has at least one byte; one more token in front keeps
        # what comes first in a text, which some decoders strip of its space.
        self._span = 1 + max(len(string.encode()) for string in strings)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the last of the sampled ids has completed a stop string."""
        text = self._tokenizer.decode(tokens[self._start(tokens) :])
        return any(string in text for string in self.strings)

    def _start(self, tokens: Sequence[int]) -> int:
        """Where the tail begins that a stop string ending in the last token can reach back to."""
        size, byte_ids = self._tokenizer.size, self._tokenizer.byte_ids
        start, left = len(tokens), self._span
        while start > 0 and left > 0:
            start -= 1
            left -= tokens[start] not in self._tokenizer.special_ids and tokens[start] < size
        # Byte pieces in a row are decoded together, so a row must not be cut.
        while start > 0 and tokens[start] in byte_ids and tokens[start - 1] in byte_ids:
            start -= 1
        return start


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    places = (text.find(string) for string in strings)
    return text[: min((place for place in places if place >= 0), default=len(text))]


def certain(text: str, strings: Sequence[str]) -> str:
    """The text without an end that later text may make into one of the strings, or a character."""
    text = text.rstrip("\ufffd")
    held = max((_begun(text, string) for string in strings), default=0)
    return text[: len(text) - held]


def _begun(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a longer string."""
    place = text.find(string[0], max(0, len(text) - len(string) + 1))
    while place >= 0 and not string.startswith(text[place:]):
        place = text.find(string[0], place + 1)
    return 0 if place < 0 else len(text) - place


def visible(text: str, strings: Sequence[str], *, tags: Sequence[str] = (OPENS, CLOSES)) -> str:
    """What may be shown of a growing text: never a part of a stop string, nor what follows one.

    Args:
        tags: texts that end nothing, and are not shown in part either.
    """
    shown = cut(text, strings)
    return shown if len(shown) < len(text) else certain(shown, [*strings, *tags])
