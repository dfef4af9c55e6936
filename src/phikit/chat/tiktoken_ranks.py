r"""tiktoken rank files: the byte-level BPE of cl100k_base and o200k_base, rebuilt with its merges.

A rank file lists tokens in the order in which training formed them: base64 of the bytes, a space,
the rank, which is also the id. Merges are not in it; a token's merge is the last pair that the
lower ranks alone leave of it. Phi-3-small ships cl100k_base in this form.

What is unusual: the file is a stranger's. Its size, the length of its tokens and the work of
recovering its merges are bounded, and a damaged line is named.

Sources: tiktoken (`load.py`, `_educational.py`, `tiktoken_ext/openai_public.py`);
`tokenization_phi3_small.py` of microsoft/Phi-3-small-8k-instruct.
"""

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from phikit.base.errors import ChatError

Encoding = Literal["cl100k_base", "o200k_base"]

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS: Mapping[str, str] = {
    "cl100k_base": _CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k_base": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    + rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

PHI3_SMALL_SPECIALS: Mapping[str, int] = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|system|>": 100261,
    "<|user|>": 100262,
    "<|assistant|>": 100263,
    "<|dummy_id_0|>": 100264,
    "<|dummy_id_1|>": 100265,
    "<|end|>": 100266,
    "<|dummy_id_2|>": 100256,
    **{f"<|dummy_id_{3 + index}|>": 100267 + index for index in range(9)},
    "<|endofprompt|>": 100276,
    **{f"<|dummy_id_{12 + index}|>": 100277 + index for index in range(75)},
}
"""Of Phi-3-small, whose checkpoint holds them only as code."""

MAX_FILE_BYTES = 16 << 20
MAX_IDS = 1 << 20
MAX_WORK = 200_000_000
"""Of recovering the merges: the sum of squared token lengths. o200k_base needs a tenth of it."""


def byte_level_bpe(
    path: Path, *, encoding: Encoding, specials: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The tokenizer of a rank file; the special tokens have their ids, and are not yet special.

    Raises:
        ChatError: as `Tokenizer.from_tiktoken`.
    """
    if encoding not in SPLITS:
        raise ChatError(f"unknown encoding {encoding!r}", fix=f"known: {', '.join(SPLITS)}")
    ranks = read_ranks(path)
    merges = [(_spell(left), _spell(right)) for left, right in recover_merges(ranks, where=path)]
    vocabulary = {_spell(token): rank for token, rank in ranks.items()}
    taken = set(vocabulary.values())
    for name, id_ in specials.items():
        if name in vocabulary or id_ in taken or not 0 <= id_ < MAX_IDS:
            raise ChatError(
                f"the special token {name!r} cannot have the id {id_} in {path}",
                fix=f"give each special token a name and an id of its own, the id below {MAX_IDS}",
            )
        vocabulary[name] = id_
        taken.add(id_)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[encoding]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, by rank.

    Raises:
        ChatError: the file is missing, too large or damaged, or lacks one of the 256 bytes.
    """
    if not path.is_file():
        raise ChatError(f"{path} does not exist", fix="point at a .tiktoken file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ChatError(f"{path} is larger than {MAX_FILE_BYTES} bytes: no rank file we know is")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        token, rank = _read_line(line, where=f"line {number} of {path}")
        if token in ranks:
            raise _damaged(f"line {number} of {path} repeats a token")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _damaged(f"the ranks in {path} are not 0, 1, 2, ... without gaps")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise _damaged(f"{path} lacks some of the 256 bytes")
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def recover_merges(ranks: Mapping[bytes, int], *, where: Path) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte is merged from, best first.

    Raises:
        ChatError: a token cannot be formed from those of lower rank, or the work is too much.
    """
    if sum(len(token) ** 2 for token in ranks) > MAX_WORK:
        raise ChatError(f"the tokens of {where} are too long: no vocabulary we know has such")
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = _merge_below(token, ranks, limit=rank)
        if len(parts) != 2:
            raise _damaged(f"the token of rank {rank} in {where} is not a merge of two others")
        merges.append((parts[0], parts[1]))
    return merges


def _merge_below(token: bytes, ranks: Mapping[bytes, int], *, limit: int) -> list[bytes]:
    """BPE of the token's bytes with only the ranks below `limit`."""
    parts = [token[index : index + 1] for index in range(len(token))]
    # The rank that each part would form with the next one.
    joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
    while joined:
        best = min(joined)
        if best >= limit:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        if at > 0:
            joined[at - 1] = ranks.get(parts[at - 1] + parts[at], limit)
        if at < len(joined):
            joined[at] = ranks.get(parts[at] + parts[at + 1], limit)
    return parts


def _read_line(line: bytes, *, where: str) -> tuple[bytes, int]:
    coded, _, digits = line.partition(b" ")
    try:
        token = base64.b64decode(coded, validate=True)
    except binascii.Error as error:
        raise _damaged(f"{where} does not begin with base64") from error
    if not token:
        raise _damaged(f"{where} holds no token")
    if not digits.isdigit() or len(digits) > 7:
        raise _damaged(f"{where} does not end with a rank")
    return token, int(digits)


def _damaged(what: str) -> ChatError:
    return ChatError(what, fix="copy or download the file again")


def _spellings() -> list[str]:
    """GPT-2's alphabet: printable bytes as themselves, the others as U+0100 and beyond."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_ALPHABET = _spellings()


def _spell(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)
