"""A model opened for talk, with the engine that its options ask for."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import ConfigError
from phikit.cli.locate import locate

if TYPE_CHECKING:
    from phikit.generate.language_model import LanguageModel


class CacheKind(StrEnum):
    """What `--cache` takes."""

    int8 = "int8"


Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; as stored if not given."),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model with the same tokens guesses ahead. Faster if it guesses well; the "
        "text is the same.",
    ),
]
Lookup = Annotated[
    bool,
    typer.Option(
        "--lookup",
        help="Guess ahead from what was said before: for replies that quote. The text is the same.",
    ),
]
Cache = Annotated[
    CacheKind | None,
    typer.Option(
        metavar="KIND",
        help="int8: keys and values in 8 bits. Half the memory of a long context, a little less "
        "exact.",
    ),
]
NoHistory = Annotated[
    bool,
    typer.Option("--no-history", help="Keep nothing for `phikit history`."),
]


def open_speaker(
    name: str,
    *,
    dtype: str | None = None,
    draft: str | None = None,
    lookup: bool = False,
    cache: CacheKind | None = None,
) -> "LanguageModel":
    """The model that a command was pointed at, able to answer.

    Raises:
        ConfigError: two ways of guessing ahead, or a draft model with other tokens.
    """
    from phikit.generate.engine import Engine
    from phikit.generate.language_model import load
    from phikit.generate.speculate import DraftModel, PromptLookup

    if draft is not None and lookup:
        raise ConfigError("--draft and --lookup both guess ahead", fix="give one of them")
    speaker = load(locate(name).model, dtype=dtype)
    drafter = PromptLookup() if lookup else None
    if draft is not None:
        guesser = load(locate(draft).model, dtype=dtype)
        if not _same_tokens(speaker, guesser):
            raise ConfigError(
                f"{draft} has other tokens than {name}, so it cannot guess for it",
                fix="take a smaller model of the same line, or --lookup",
            )
        drafter = DraftModel(guesser.model)
    if drafter is not None or cache is not None:
        kind = None if cache is None else "int8"
        speaker.use(Engine(speaker.model, drafter=drafter, cache_dtype=kind))
    return speaker


def _same_tokens(a: "LanguageModel", b: "LanguageModel") -> bool:
    probe = "The quick brown fox: 12 + 7 = 19?\n\n    élan ✓ {'a': [1]}"
    return (
        a.config.vocab_size == b.config.vocab_size
        and a.tokenizer.size == b.tokenizer.size
        and a.tokenizer.specials == b.tokenizer.specials
        and a.tokenizer.encode(probe) == b.tokenizer.encode(probe)
    )
