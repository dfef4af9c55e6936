"""Tokenizers: text to ids and back, over Hugging Face `tokenizers`.

What is unusual: `encode` never yields a special id. Text that looks like `<|end|>` stays text, so a
user cannot forge a turn; special ids come from `special`, called by renderers alone.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from phikit.base.errors import ChatError, DataError
from phikit.base.files import write_atomic

# GPT-4's split (cl100k_base, tiktoken) with one change: a token holds at most one digit, as
# arithmetic wants; the first may carry the space before it, which shortens traces by a third.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back.

    Raises:
        ChatError: the text of a special token would be encoded as that token.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        # Checkpoints often add <think> and the like as plain tokens, which text would match.
        markers = [
            token.content
            for token in inner.get_added_tokens_decoder().values()
            if not token.special and token.content.startswith("<") and token.content.endswith(">")
        ]
        inner.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
        inner.encode_special_tokens = True
        self._inner = inner
        added = sorted(inner.get_added_tokens_decoder().items())
        self.specials = {token.content: id_ for id_, token in added if token.special}
        ids = set(self.specials.values())
        forgeable = [name for name in self.specials if not ids.isdisjoint(self.encode(name))]
        if forgeable:
            raise ChatError(
                f"this tokenizer encodes the text {forgeable[0]!r} as a special token",
                fix="give it a pre-tokenizer that splits punctuation from letters",
            )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `tokenizer.json` of a checkpoint folder.

        Raises:
            ChatError: the file is missing or not a tokenizer.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ChatError(f"{path} does not exist", fix="point at a folder with tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except ChatError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for any fault in the file
            raise ChatError(f"{path} is not a tokenizer: {error}") from error

    @classmethod
    def from_parts(
        cls,
        tokens: Sequence[str],
        *,
        merges: Iterable[str],
        special_ids: Collection[int],
        split: Literal["gpt2", "smollm"],
    ) -> Self:
        """Build a byte-level BPE tokenizer from the tables that GGUF files carry.

        Args:
            tokens: the vocabulary in id order, in the byte-level alphabet (`Ġ` is a space).
            merges: `"left right"`, best first.
            special_ids: ids that only a renderer may produce.
            split: GGUF's `tokenizer.ggml.pre`; `smollm` is GPT-2's split after single digits.
        """
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        splits = {"gpt2": byte_level, "smollm": pre_tokenizers.Sequence([digits, byte_level])}
        if split not in splits:
            raise ChatError(
                f"unknown pre-tokenizer {split!r}", fix=f"known: {', '.join(sorted(splits))}"
            )
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        vocabulary = {token: id_ for id_, token in enumerate(tokens)}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        inner.pre_tokenizer = splits[split]
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([_special(tokens[id_]) for id_ in sorted(special_ids)])
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
        self._held.append(id_)
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
