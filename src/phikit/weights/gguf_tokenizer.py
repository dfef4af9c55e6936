r"""Tokenizers as GGUF keeps them: tables of tokens, and names for what text is split by.

Two kinds are known. "gpt2" is byte-level BPE with its merges; the split before BPE is only named
(`tokenizer.ggml.pre`), and every reader brings the regular expression. "llama" is SentencePiece BPE
(Phi-3, Phi-3.5), which keeps a score per token and no merges: a merge is whatever two tokens make a
third, the best score first.

A tokenizer is written only if what is read back is the same one; llama.cpp knows a closed list of
splits, and under a wrong one a model gets other tokens than it was trained on.

Sources: llama.cpp, `src/llama-vocab.cpp` (splits) and `conversion/base.py` (tables);
transformers, `generate_merges`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phikit.base.errors import ChatError
from phikit.chat.tiktoken_ranks import SPLITS
from phikit.chat.tokenizer import Tokenizer
from phikit.weights.gguf_header import damaged

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`; special tokens are CONTROL."""

_DIGITS, _GPT2 = "single digits", "GPT-2's split"
_CL100K, _O200K = SPLITS["cl100k_base"], SPLITS["o200k_base"]
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_LEAVES_SPACE = ("<|endoftext|>", "<s>", "<unk>")
"""Of the special tokens of Phi-3, those that do not swallow the white space after them."""
LEFT_KEY, RIGHT_KEY = "phikit.tokenizer.lstrip", "phikit.tokenizer.rstrip"
"""Where our own files keep the ids of special tokens that swallow white space beside them."""


class _Split(NamedTuple):
    """What text is cut by before BPE."""

    steps: tuple[str, ...]
    """One after the other: `_DIGITS`, `_GPT2`, or a regular expression."""
    ignore_merges: bool = False
    """Whether a piece that is a token is taken whole, however its merges would go."""


_SPLITS = {
    "gpt-2": _Split((_GPT2,)),
    "phi-2": _Split((_GPT2,)),
    "smollm": _Split((_DIGITS, _GPT2)),
    "dbrx": _Split((_CL100K,)),  # Phi-4
    "gpt-4o": _Split((_O200K,)),  # Phi-4-mini
    "llama-bpe": _Split((_CL100K,), ignore_merges=True),
    "qwen2": _Split((_QWEN2,)),
}
"""By their names in `tokenizer.ggml.pre`; of two that are alike, the first is written."""


class Tables(NamedTuple):
    """The vocabulary of a GGUF file."""

    model: str
    """`tokenizer.ggml.model`: "gpt2" or "llama"."""
    split: str
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    """`"left right"`, best first; of "gpt2" alone."""
    scores: list[float]
    """Of "llama" alone."""
    left: list[int]
    """Ids of special tokens that swallow the white space before them."""
    right: list[int]
    """... and after them."""


# --- Read ---------------------------------------------------------------------------------------


def read_tokenizer(metadata: Mapping[str, Any], *, where: str) -> Tokenizer:
    """The tokenizer that the metadata of a file describe.

    Raises:
        ChatError: it is of another kind, or splits text in a way unknown here.
        WeightsError: its tables are damaged.
    """
    prefix = "tokenizer.ggml."
    model, split = (str(metadata.get(prefix + key)) for key in ("model", "pre"))
    if model not in ("gpt2", "llama"):
        raise ChatError(f"{where} has a tokenizer of kind {model!r}; known are 'gpt2' and 'llama'")
    tokens, kinds = metadata.get(f"{prefix}tokens"), metadata.get(f"{prefix}token_type")
    numbers = metadata.get(f"{prefix}scores")
    if not isinstance(tokens, list) or not isinstance(kinds, np.ndarray):
        raise damaged(where, "its tokenizer has no tokens or no token types")
    scores = numbers.tolist() if isinstance(numbers, np.ndarray) else []
    merges = metadata.get(f"{prefix}merges", [])
    lengths = {len(tokens), len(kinds)} | ({len(scores)} if model == "llama" else set())
    if len(lengths) > 1 or not isinstance(merges, list):
        raise damaged(where, "the tables of its tokenizer do not fit each other")
    if len(set(tokens)) < len(tokens):
        raise damaged(where, "its tokenizer has a token twice")
    if metadata.get(f"{prefix}add_space_prefix", True) is not True and model == "llama":
        raise ChatError(f"{where} has a tokenizer without the space before a text, unknown here")
    try:
        left, right = (list(map(int, metadata.get(key, ()))) for key in (LEFT_KEY, RIGHT_KEY))
        if RIGHT_KEY not in metadata and _is_phi3_name(str(metadata.get("general.name"))):
            right = [i for i, token in enumerate(tokens) if token not in _LEAVES_SPACE]
        return build_tokenizer(
            Tables(model, split, tokens, kinds.tolist(), merges, scores, left, right)
        )
    except ChatError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for faults in the tables
        raise damaged(where, f"its tokenizer cannot be built: {error}") from error


def build_tokenizer(tables: Tables) -> Tokenizer:
    """A tokenizer from its tables; ChatError if its split is unknown."""
    vocabulary = {
        token: id_
        for id_, (token, kind) in enumerate(zip(tables.tokens, tables.kinds, strict=True))
        if kind != UNUSED or token != _padding(id_)
    }
    make = _sentencepiece if tables.model == "llama" else _byte_level
    inner = make(tables, vocabulary)
    left, right = set(tables.left), set(tables.right)
    plain, special = [], []
    for id_, (token, kind) in enumerate(zip(tables.tokens, tables.kinds, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added = AddedToken(
                token,
                special=kind != USER_DEFINED,
                normalized=False,
                lstrip=id_ in left,
                rstrip=id_ in right,
            )
            (plain if kind == USER_DEFINED else special).append(added)
    inner.add_tokens(plain)
    inner.add_special_tokens(special)
    return Tokenizer(inner)


def _byte_level(tables: Tables, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    split = _SPLITS.get(tables.split)
    if split is None:
        raise ChatError(
            f"unknown pre-tokenizer {tables.split!r}", fix=f"known: {', '.join(_SPLITS)}"
        )
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in tables.merges)]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges)
    inner = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    for step in split.steps:
        if step == _DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != _GPT2:
            steps.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in split.steps))
    inner.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(tables: Tables, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_by_score(tables),
        unk_token="<unk>" if "<unk>" in vocabulary else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def _merges_by_score(tables: Tables) -> list[tuple[str, str]]:
    """Every two tokens that make a third, the best third first; then by id, as in Llama's files."""
    ids = {
        token: id_
        for id_, (token, kind) in enumerate(zip(tables.tokens, tables.kinds, strict=True))
        if kind == NORMAL
    }
    found = []
    for token, id_ in ids.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        found += [(-tables.scores[id_], id_, ids[left], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(found)]


def _is_phi3_name(name: str) -> bool:
    """Whether llama.cpp lets the special tokens of a model so called swallow white space."""
    return "phi-3" in name.lower() or "phi3" in name.lower()


# --- Write --------------------------------------------------------------------------------------


def tables_of(tokenizer: Tokenizer, *, rows: int) -> Tables:
    """The tables that give this tokenizer back, padded to the `rows` of the embeddings.

    Raises:
        ChatError: GGUF has no name for how it splits text, or cannot keep its merges, or it has
            more tokens than `rows`.
    """
    if tokenizer.size > rows:
        raise ChatError(
            f"the tokenizer has ids up to {tokenizer.size - 1}, the model embeds {rows}"
        )
    about = json.loads(tokenizer.to_json())
    model = about["model"]
    if model["type"] != "BPE":
        raise ChatError(f"GGUF keeps BPE tokenizers here, and this one is {model['type']}")
    merges = [" ".join(pair) for pair in model["merges"]]
    tokens = [_padding(id_) for id_ in range(rows)]
    kinds = [UNUSED] * rows
    for token, id_ in model["vocab"].items():
        is_byte = model["byte_fallback"] and len(token) == 6 and token.startswith("<0x")
        tokens[id_], kinds[id_] = token, BYTE if is_byte else NORMAL
    for added in about["added_tokens"]:
        id_ = added["id"]
        tokens[id_], kinds[id_] = added["content"], CONTROL if added["special"] else USER_DEFINED
    swallows = [
        [added["id"] for added in about["added_tokens"] if added[side]]
        for side in ("lstrip", "rstrip")
    ]
    if model["byte_fallback"]:
        scores = _scores(tokens, merges)
        tables = Tables("llama", "default", tokens, kinds, [], scores, *swallows)
    else:
        tables = Tables("gpt2", _split_name(about), tokens, kinds, merges, [], *swallows)
    again = json.loads(build_tokenizer(tables).to_json())
    if _merges(again["model"]) != _merges(model) or _text(again) != _text(about):
        raise ChatError(
            "GGUF cannot keep this tokenizer: read back, it would give other tokens",
            fix="save the model in Hugging Face's layout",
        )
    return tables


def is_phi3_vocabulary(tables: Tables) -> bool:
    """Whether the special tokens are those of Phi-3, and swallow white space as they do there.

    llama.cpp refuses a model called Phi-3 without all of these tokens.
    """
    return {"</s>", *_LEAVES_SPACE} <= set(tables.tokens) and bool(tables.right)


def _split_name(about: Mapping[str, Any]) -> str:
    """The name in `tokenizer.ggml.pre` of how a `tokenizer.json` splits text."""
    steps = _steps(about["pre_tokenizer"])
    wanted = _Split(steps, bool(about["model"].get("ignore_merges")))
    for name, split in _SPLITS.items():
        if split == wanted:
            return name
    raise ChatError(
        "llama.cpp has no name for how this tokenizer splits text: " + " then ".join(steps),
        fix="save the model in Hugging Face's layout, or train it with the tokenizer of a known "
        "model",
    )


def _steps(about: Any) -> tuple[str, ...]:
    parts = about["pretokenizers"] if about and about["type"] == "Sequence" else [about]
    steps = []
    for part in parts:
        match part:
            case {"type": "Digits", "individual_digits": True}:
                steps.append(_DIGITS)
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} | {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Removed",
                "invert": True,
            }:
                steps.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}:
                steps += [_GPT2] if use_regex else []
            case _:
                steps.append(json.dumps(part))
    return tuple(steps)


def _merges(model: Mapping[str, Any]) -> Any:
    """What decides of the merges; those that make one token never compete, so any order will do."""
    pairs = [tuple(pair) for pair in model["merges"]]
    if model["byte_fallback"]:
        return set(pairs), list(dict.fromkeys(left + right for left, right in pairs))
    return pairs


def _text(about: Mapping[str, Any]) -> Any:
    """What of a `tokenizer.json` decides about text, beside its merges."""
    ids = about["model"]["vocab"] | {t["content"]: t["id"] for t in about["added_tokens"]}
    sides = {t["content"]: (t["special"], t["lstrip"], t["rstrip"]) for t in about["added_tokens"]}
    return ids, sides, about["normalizer"], _steps(about["pre_tokenizer"])


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by which `_merges_by_score` finds the merges in their order."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _padding(id_: int) -> str:
    """What llama.cpp's converter calls a row of the embeddings that no token uses."""
    return f"[PAD{id_}]"
