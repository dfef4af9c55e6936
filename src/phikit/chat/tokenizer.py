"""Tokenizers: text to ids and back, over Hugging Face `tokenizers`.

What is unusual: `encode` never yields a special id. Text that looks like `<|end|>` stays text, so a
user cannot forge a turn; special ids come from `special` and `mark`, called by renderers alone.

Byte-level BPE (SmolLM2, tiktoken's encodings, our own) gives back every text. Llama's BPE, which
Phi-3 uses, puts a space before each stretch of text and takes one away again when decoding; only
U+2581, its sign for a space, comes back as a space.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phikit.base.errors import ChatError, DataError
from phikit.base.files import write_atomic
from phikit.chat.tiktoken_ranks import PHI3_SMALL_SPECIALS, Encoding, byte_level_bpe

# GPT-4's split (cl100k_base, tiktoken) with one change: a token holds at most one digit, as
# arithmetic wants; the first may carry the space before it, which shortens traces by a third.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# White space as Rust has it, which decides what a special token swallows; Python's is a bit wider.
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

Part = str | int
"""A piece of a rendered conversation: text, or the id of a special token."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        specials: the id of each special token.
        special_ids: these ids.
        byte_ids: ids of single bytes spelt `<0x0A>`, which Llama's BPE falls back to; else empty.

    Raises:
        ChatError: the text of a special token would be encoded as that token.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        # Checkpoints often add <think> and the like as plain tokens, which text would match.
        markers = [
            AddedToken(t.content, special=True, normalized=False, lstrip=t.lstrip, rstrip=t.rstrip)
            for t in inner.get_added_tokens_decoder().values()
            if not t.special and t.content.startswith("<") and t.content.endswith(">")
        ]
        inner.add_special_tokens(markers)
        inner.encode_special_tokens = True
        self._inner = inner
        added = sorted(inner.get_added_tokens_decoder().items())
        self.specials = {token.content: id_ for id_, token in added if token.special}
        self._eats_left = {id_ for id_, token in added if token.special and token.lstrip}
        self._eats_right = {id_ for id_, token in added if token.special and token.rstrip}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.byte_ids = _byte_ids(inner)
        self.special_ids = frozenset(self.specials.values())
        forgeable = [n for n in self.specials if not self.special_ids.isdisjoint(self.encode(n))]
        if forgeable:
            raise ChatError(
                f"this tokenizer encodes the text {forgeable[0]!r} as a special token",
                fix="give it a pre-tokenizer that splits punctuation from letters",
            )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the tokenizer of a checkpoint folder: `tokenizer.json`, or Phi-3-small's rank file.

        Raises:
            ChatError: there is neither, or it is not a tokenizer.
        """
        path, ranks = Path(folder) / "tokenizer.json", Path(folder) / "cl100k_base.tiktoken"
        if not path.is_file() and ranks.is_file():
            return cls.from_tiktoken(ranks, encoding="cl100k_base", specials=PHI3_SMALL_SPECIALS)
        if not path.is_file():
            raise ChatError(f"{path} does not exist", fix="point at a folder with tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except ChatError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for any fault in the file
            raise ChatError(f"{path} is not a tokenizer: {error}") from error

    @classmethod
    def from_tiktoken(
        cls, path: str | Path, *, encoding: Encoding, specials: Mapping[str, int]
    ) -> Self:
        """Build from a tiktoken rank file, one base64 token and its rank a line.

        Args:
            encoding: whose way of splitting text the ranks were made for.
            specials: special tokens and their ids, which lie beyond the ranks.

        Raises:
            ChatError: the file is missing, damaged or too large, or an id is taken twice.
        """
        inner = byte_level_bpe(Path(path), encoding=encoding, specials=specials)
        inner.add_special_tokens([_special(name) for name in specials])
        return cls(inner)

    @property
    def size(self) -> int:
        """One more than the greatest id: the rows an embedding table needs."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def special(self, name: str) -> int:
        """The id of a special token.

        Raises:
            ChatError: the tokenizer has no such special token.
        """
        if name not in self.specials:
            raise ChatError(
                f"the tokenizer has no special token {name!r}",
                fix=f"use a renderer that fits its special tokens: {' '.join(self.specials)}",
            )
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of the text; never a special id, whatever the text looks like.

        A vocabulary without all 256 bytes (SmolLM2 lacks a few control characters) drops the rest.

        Raises:
            ChatError: the text holds a lone surrogate and is therefore not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(f"not valid Unicode text: {error}", fix="clean the text") from error
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_after(self, lead: str, text: str) -> list[int]:
        """Ids of the text as it reads on from `lead` without a special token between them.

        Where the text would change the ids of `lead` itself, it is encoded alone.
        """
        before, whole = self.encode(lead), self.encode(lead + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.encode(text)

    def decode_after(self, lead: str, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of the ids that `encode_after` gave."""
        before = self.encode(lead)
        whole = self.decode([*before, *ids], keep_special=keep_special)
        return whole[len(self.decode(before)) :]

    def mark(self, text: str) -> list[Part]:
        """The text of a template, cut at the names of special tokens, which become their ids."""
        parts: list[Part] = []
        end = 0
        for match in self._special.finditer(text):
            parts += [text[end : match.start()], self.specials[match[0]]]
            end = match.end()
        return [part for part in [*parts, text[end:]] if part != ""]

    def stretches(self, parts: Iterable[Part]) -> list[Part]:
        """The parts with neighbouring texts joined, as special tokens leave them.

        Some special tokens swallow the white space beside them (`rstrip`, `lstrip`): those of
        Phi-3 eat the newline that its template writes after each.
        """
        joined: list[Part] = []
        for part in parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        for index, part in enumerate(joined):
            if isinstance(part, str):
                if index > 0 and joined[index - 1] in self._eats_right:
                    part = part.lstrip(_SPACE)
                if index + 1 < len(joined) and joined[index + 1] in self._eats_left:
                    part = part.rstrip(_SPACE)
                joined[index] = part
        return [part for part in joined if part != ""]

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Ids of texts and special tokens, each stretch of text encoded by itself.

        These are the ids that `transformers` gives for the whole text.
        """
        return [
            id_
            for part in self.stretches(parts)
            for id_ in (self.encode(part) if isinstance(part, str) else [part])
        ]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, ids beyond `size` vanish."""
        return self._inner.decode(list(ids), skip_special_tokens=not keep_special)

    def decoder(self) -> "StreamDecoder":
        """A fresh decoder for one stream of ids."""
        return StreamDecoder(self)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, readable by every Hugging Face library."""
        write_atomic(Path(folder) / "tokenizer.json", self.to_json())

    def to_json(self) -> str:
        """The content of `tokenizer.json`; equal tokenizers give equal text."""
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, indent=1) + "\n"


class StreamDecoder:
    """Decodes ids one at a time; the pieces joined equal `decode` of the whole.

    A piece is held back while its last bytes may still become a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # shown already, kept since a decoder may look back
        self._held: list[int] = []

    def push(self, id_: int) -> str:
        """Take one id; returns the text that is now certain, perhaps none."""
        if id_ in self._tokenizer.special_ids or id_ >= self._tokenizer.size:
            return ""  # without text, and no end to the pieces before it
        self._held.append(id_)
        # Byte pieces in a row are decoded together, so none is certain before the row ends.
        if id_ in self._tokenizer.byte_ids:
            return ""
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        text = self._pending()
        self._context, self._held = [], []
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]


def train_tokenizer(texts: Iterable[str], *, size: int, specials: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: the training texts; their order does not matter.
        size: number of ids, the special tokens and the 256 bytes included.
        specials: special tokens; they take the ids 0, 1, ... in this order.

    Raises:
        DataError: `size` is too small, or the texts are too poor to fill it.
    """
    least = 256 + len(specials)
    if size < least:
        raise DataError(f"size {size} is too small for a tokenizer", fix=f"give at least {least}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_special(name) for name in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(inner)
    if tokenizer.size < size:
        raise DataError(
            f"the texts give only {tokenizer.size} tokens, {size} were asked for",
            fix="give more text, or a smaller size",
        )
    return tokenizer


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _byte_ids(inner: tokenizers.Tokenizer) -> frozenset[int]:
    if not getattr(inner.model, "byte_fallback", False):
        return frozenset()
    found = (inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id_ for id_ in found if id_ is not None)
